"""Many images from one model, by the endpoint's own engine: image i is that of (model, seed, i), whoever makes it.

The set is cut into slices; each is one piece of work for `evaluation.work`'s workers (this process, or Ray tasks) and
leaves one finished shard.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.choose import choose
from pipeline.data.making.generated import ENCODING, GeneratedSet, write_slice
from pipeline.data.making.slices import SliceDone
from pipeline.data.sets.manifest import ImageSpec
from pipeline.diffusion.pixels import to_pixels
from pipeline.diffusion.randomness import key_seed
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.model import Model, Sampling
from pipeline.serving.engine import Engine
from pipeline.serving.plans import class_names

MOST_SAMPLES = 512  # a shard: what a killed task loses at most, and the step of the progress
SHARD_BYTES = 64 << 20  # of pixels
LIVE_CHUNKS = 4  # chunks of images in progress at once


@dataclass(frozen=True)
class SliceWork:
    """Makes one slice's images and writes their shard. labels: of all images in turn, None where they have none."""

    made: GeneratedSet
    index: int
    seed: int
    labels: tuple[int, ...] | None
    how: Sampling
    chunk: int

    @property
    def images(self) -> int:
        """How many it makes."""
        return len(self.made.indices(self.index))

    def run(self, model: Model) -> SliceDone:
        """Raises NotFinite where the network or the sampler comes to NaN, ValueError for what the sampler refuses."""
        rows = self.made.indices(self.index)
        labels = None if self.labels is None else [self.labels[i % len(self.labels)] for i in rows]
        pixels = sampled(model, [key_seed("sample", self.seed, i) for i in rows], labels, self.how, self.chunk)
        return write_slice(self.made, self.index, pixels, labels if self.made.class_names else None)


def sampled(
    model: Model, seeds: Sequence[int], labels: Sequence[int] | None, how: Sampling, chunk: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image a seed, uint8 (n, H, W, C), through an engine: each as the endpoint answers it with this chunk."""
    cost = choose(SAMPLERS, how.sampler, "sampler").evaluations(how.steps, **how.options)
    parts = [slice(start, start + chunk) for start in range(0, len(seeds), chunk)]
    with Engine(model.networks, chunk=chunk, max_live_rows=LIVE_CHUNKS * chunk, name="sample") as engine:
        futures = [
            engine.submit(
                partial(model.sampling, seeds[part], None if labels is None else labels[part], how),
                rows=len(seeds[part]),
                cost=cost * len(seeds[part]),
            )
            for part in parts
        ]
        made: list[torch.Tensor] = []
        for future in futures:
            x = future.result().value
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"sampler '{how.sampler}' came to a value that is not finite; change its options")
            made.append(to_pixels(x).cpu())
    return np.ascontiguousarray(torch.cat(made).permute(0, 2, 3, 1).numpy())


def generated_set(
    url: str, model: Model, images: int, seed: int, labels: Sequence[int] | None, how: Sampling, chunk: int
) -> tuple[GeneratedSet, list[SliceWork]]:
    """The set of `images` images, and the work that makes it. labels: given to the images in turn; None: all classes.

    Raises:
        ValueError: no images, labels that the model has not, or what sampler and grid refuse.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    config = model.config
    if labels is None and config.classes:
        labels = range(config.classes)
    taken = None if labels is None else tuple(labels)
    model.conditioning(taken, len(taken or ()))  # refuses labels that are not there
    if taken is not None and len(set(taken)) > 1 and -1 in taken:
        raise ValueError("labels: -1 (no class) does not go with others, a shard set has classes for all or for none")
    trial = model.sampling([0], None if taken is None else taken[:1], how)
    next(trial)  # what the sampler refuses, it refuses before its first query
    trial.close()
    labelled = taken is not None and -1 not in taken
    image = ImageSpec(config.size, config.channels, ENCODING)
    facts = {
        "model": model.digest,
        "seed": seed,
        "labels": None if taken is None else list(taken),
        "sampling": asdict(how),
        "chunk": chunk,
    }
    per_shard = max(1, min(MOST_SAMPLES, SHARD_BYTES // image.bytes))
    names = tuple(class_names(model)) if labelled else ()
    made = GeneratedSet(url, image, images, per_shard, names, facts)
    return made, [SliceWork(made, index, seed, taken, how, chunk) for index in range(made.slices)]
