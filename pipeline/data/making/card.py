"""The dataset card: what a set holds, in numbers."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.data.config import ShardConfig
from pipeline.data.sets.manifest import HELD_OUT, SPLITS, TRAIN, Manifest, Names
from pipeline.data.sets.tables import Table

Sums = dict[str, list[Any]]


def make_card(
    config: ShardConfig,
    before: Manifest | None,
    names: Names,
    shards: list[dict[str, Any]],
    removed: Table,
    counts: tuple[int, int, int, int, int],
    sums: Sums,
) -> dict[str, Any]:
    """Counts and statistics of a set of all versions.

    Args:
        shards: rows of SHARDS_SCHEMA, of all versions.
        removed: what readers leave out; it still counts in `per_class` and in the channels' statistics.
        counts: entries listed; of this version images rejected, members that gave labels, things left out of which no
            image was expected; exact duplicates in all versions.
        sums: by split, this version's channel sums and sums of squares, (2, C) each.
    """
    listed, rejected, sides, others, duplicates = counts
    split_of = {row["url"]: row["split"] for row in shards}
    gone = [split_of[shard] for shard in removed["shard"].to_pylist()]
    stored = {split: sum(row["samples"] for row in shards if row["split"] == split) for split in SPLITS}
    per_class = {name: dict.fromkeys(SPLITS, 0) for name in names.classes}
    for row in shards:
        for label, count in zip(row["classes"], row["class_counts"], strict=True):
            per_class[names.classes[label]][row["split"]] += count
    old = before.card["channel_sums"] if before else {}
    whole: dict[str, np.ndarray[Any, Any]] = {
        split: np.sum([np.array(old.get(split, [[0] * config.channels] * 2), dtype=object), *values], axis=0)
        for split, values in sums.items()
    }
    split = TRAIN if stored[TRAIN] else HELD_OUT
    pixels = stored[split] * math.prod(config.spec.shape[1:])
    mean, squares = (np.array([int(value) for value in row], dtype=np.float64) / pixels for row in whole[split])
    return {
        "samples": {split: stored[split] - gone.count(split) for split in SPLITS},
        "removed": {split: gone.count(split) for split in SPLITS},
        "shards": {split: sum(row["split"] == split for row in shards) for split in SPLITS},
        "bytes": sum(row["size"] for row in shards),
        "classes": list(names.classes),
        "per_class": per_class,
        "tags": len(names.tags),
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(np.maximum(squares - mean**2, 0.0)).tolist(),
        "channel_statistics_of": f"{split}, in grey levels 0..255",
        "channel_sums": {split: [[int(value) for value in row] for row in values] for split, values in whole.items()},
        "listed": listed,
        "rejected": rejected + (before.card["rejected"] if before else 0),
        "sides": sides + (before.card.get("sides", 0) if before else 0),
        "others": others + (before.card.get("others", 0) if before else 0),
        "exact_duplicates": duplicates,
        "image": asdict(config.spec),
        "source": config.source,
        "policy": config.policy,
    }
