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
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.randomness import key_seed
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.model import Model, Sampling
from pipeline.serving.engine import Engine

MOST_SAMPLES = 512  # a shard: what a killed task loses at most, and the step of the progress
SHARD_BYTES = 64 << 20  # of pixels
LIVE_CHUNKS = 4  # chunks of images in progress at once


@dataclass(frozen=True)
class SliceWork:
    """Makes one slice's images and writes their shard. asked: of the images in turn, a row each."""

    made: GeneratedSet
    index: int
    seed: int
    asked: Conditioning
    how: Sampling
    chunk: int

    @property
    def images(self) -> int:
        """How many it makes."""
        return len(self.made.indices(self.index))

    def run(self, model: Model) -> SliceDone:
        """Raises NotFinite where the network or the sampler comes to NaN, ValueError for what the sampler refuses."""
        rows = self.made.indices(self.index)
        turn = torch.tensor([i % max(1, self.asked.rows) for i in rows])
        asked = self.asked[turn]
        pixels = sampled(model, [key_seed("sample", self.seed, i) for i in rows], asked, self.how, self.chunk)
        labels = asked.label.tolist() if asked.label is not None and self.made.class_names else None
        return write_slice(self.made, self.index, pixels, labels)


def sampled(
    model: Model, seeds: Sequence[int], asked: Conditioning, how: Sampling, chunk: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image a seed, uint8 (n, H, W, C), through an engine: each as the endpoint answers it with this chunk."""
    cost = choose(SAMPLERS, how.sampler, "sampler").evaluations(how.steps, **how.options)
    parts = [slice(start, start + chunk) for start in range(0, len(seeds), chunk)]
    with Engine(model.networks, chunk=chunk, max_live_rows=LIVE_CHUNKS * chunk, name="sample") as engine:
        futures = [
            engine.submit(
                partial(model.sampling, seeds[part], asked[part], how),
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
            made.append(model.space.decode(x).cpu())
    return np.ascontiguousarray(torch.cat(made).permute(0, 2, 3, 1).numpy())


def generated_set(
    url: str, model: Model, images: int, seed: int, asked: Conditioning | None, how: Sampling, chunk: int
) -> tuple[GeneratedSet, list[SliceWork]]:
    """The set of `images` images, and the work that makes it. asked: of the images in turn, a row each; None:
    every class or tag.

    Raises:
        ValueError: no images, or what sampler and grid refuse.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    config = model.config
    conditioner = model.conditioner
    asked = conditioner.in_turn(range(len(conditioner.names))) if asked is None else asked
    labels = None if asked.label is None else asked.label.tolist()
    if labels and len(set(labels)) > 1 and -1 in labels:
        raise ValueError("labels: -1 (no class) does not go with others, a shard set has classes for all or for none")
    trial = model.sampling([0], asked[:1], how)
    next(trial)  # what the sampler refuses, it refuses before its first query
    trial.close()
    labelled = labels is not None and -1 not in labels
    image = ImageSpec(config.size, config.channels, ENCODING)
    facts = {
        "model": model.digest,
        "seed": seed,
        "labels": labels,
        **({} if asked.tags is None else {"tags": [conditioner.echo(asked, row)["tags"] for row in range(asked.rows)]}),
        "sampling": asdict(how),
        "chunk": chunk,
    }
    per_shard = max(1, min(MOST_SAMPLES, SHARD_BYTES // image.bytes))
    names = conditioner.names if labelled else ()
    made = GeneratedSet(url, image, images, per_shard, names, facts)
    return made, [SliceWork(made, index, seed, asked, how, chunk) for index in range(made.slices)]
