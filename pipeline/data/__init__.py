"""Shard sets: making them, what they are, reading them in an exact order."""

from typing import Any


def webdataset(
    url: str, *, seed: int = 0, rank: int = 0, world: int = 1, batch: int = 128, start: int = 0, **options: Any
) -> Any:
    """The exact stream as an endless WebDataset pipeline (a `FluidWrapper`), for a training loop of one's own.

    loader = DataLoader(pipeline.data.webdataset(url, batch=64).to_tuple("images", "labels"), batch_size=None)

    Each item is a dict: `images` (batch / world, C, H, W) uint8, `ids`, and where the set has them `labels`, `tags`,
    `captions`; `step`, and `__key__` as WebDataset's own stages want it. Of W loader processes, w yields batches w,
    w + W, ..., so that a DataLoader hands them out in order; give it `batch_size=None`.

    Args:
        url: the shard set; its newest version now is what is read to the end.
        rank, world: which of how many trainers this is; together their batches are the global batch.
        batch: images of the global batch, over all ranks.
        start: the state: how many batches the loop has *consumed*. Only the loop knows it, since loaders read ahead.
        options: further settings of `StreamConfig`, such as window or flip. The order depends on `logical_shards`,
            which `world` must divide: fix it where `world` may change (2 if `world` divides that, else `world`).

    Raises:
        ValueError: a setting out of range; no set at the URL.
    """
    from pipeline.data.reading import fluid

    return fluid.webdataset(url, (rank, world), start, {"seed": seed, "batch_size": batch, **options})
