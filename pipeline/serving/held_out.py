"""The scores of the held-out images, from the model's card: where an image lies among them."""

import bisect
from collections.abc import Mapping
from typing import Any

import numpy as np

HISTOGRAM_BINS = 40
HELD_OUT = "held_out_bits_per_dim"  # the card's entry: {estimator: [bits/dim of each held-out image]}


def held_out_scores(card: Mapping[str, Any]) -> dict[str, list[float]]:
    """Sorted bits/dim of the held-out images by estimator; empty where the card has none."""
    table = card.get(HELD_OUT) or {}
    return {str(name): sorted(float(value) for value in values) for name, values in table.items() if values}


def percentile(scores: list[float], value: float) -> float:
    """Share of `scores`, in percent, that lie below `value` (ties count half)."""
    below, through = bisect.bisect_left(scores, value), bisect.bisect_right(scores, value)
    return 50.0 * (below + through) / len(scores)


def histogram(scores: list[float]) -> dict[str, Any]:
    counts, edges = np.histogram(scores, bins=HISTOGRAM_BINS)
    return {"count": len(scores), "counts": counts.tolist(), "edges": [round(float(edge), 6) for edge in edges]}
