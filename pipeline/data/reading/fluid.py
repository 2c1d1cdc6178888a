"""The stream as a WebDataset pipeline; see `pipeline.data.webdataset`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import get_worker_info
from webdataset.compat import FluidWrapper

from pipeline.choose import choose
from pipeline.data.config import StreamConfig
from pipeline.data.reading.stream import Batch, Stream, ThreadReaders
from pipeline.data.sets import manifest as manifests
from pipeline.data.sets.manifest import Manifest

FIELDS = ("images", "labels", "ids", "tags", "captions")
SETTINGS = dict.fromkeys(name for name in StreamConfig.__dataclass_fields__ if name != "url")


def webdataset(
    url: str, place: tuple[int, int], start: int, settings: dict[str, Any]
) -> Any:  # its stubs know no iteration
    """place: rank and world; settings: of `StreamConfig`.

    Raises:
        ValueError: as `pipeline.data.webdataset`.
    """
    rank, world = place
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 <= rank < world; got rank {rank} of world {world}")
    if start < 0:
        raise ValueError(f"start must not be negative: it is the number of batches consumed; got {start}")
    for name in settings:
        choose(SETTINGS, name, "setting of the stream")
    usual = StreamConfig.logical_shards
    values: dict[str, Any] = {"logical_shards": world if usual % world else usual} | settings
    config = StreamConfig(url, **values)
    if config.logical_shards % world:
        raise ValueError(f"world must divide logical_shards; got {world} and {config.logical_shards}")
    return FluidWrapper(partial(_batches, config, manifests.load(url), place, start))


def _batches(config: StreamConfig, found: Manifest, place: tuple[int, int], start: int) -> Iterator[dict[str, Any]]:
    """This process's share of a rank's batches."""
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    parts = range(place[0], config.logical_shards, place[1])
    readers = ThreadReaders(config.readers)
    with Stream(config, found, parts, start + worker, readers, every=workers) as stream:
        while True:
            yield _sample([next(stream) for _ in parts])


def _sample(parts: list[Batch]) -> dict[str, Any]:
    """The parts of one step, end to end."""
    sample: dict[str, Any] = {"__key__": f"{parts[0].step:08d}", "step": parts[0].step}
    for name in FIELDS:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            continue
        if name == "captions":
            sample[name] = [caption for part in values for caption in part]
        else:
            sample[name] = values[0] if len(values) == 1 else torch.cat(values)
    return sample
