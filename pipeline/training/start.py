"""Before the first step: what the machine can do, and the network made ready to train on it."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed

from pipeline.data.reading.stream import Batch
from pipeline.diffusion.randomness import StepKey
from pipeline.training import events as say
from pipeline.training import hardware
from pipeline.training.config import AUTOCAST
from pipeline.training.learner import Learner
from pipeline.training.memory import check_memory, fits
from pipeline.training.prepare import checkpoint_blocks, compile_blocks
from pipeline.training.reduction import reduction
from pipeline.training.step import backward


def make_ready(learner: Learner, mine: Sequence[Batch]) -> say.Prepared:
    """Settles the precision, wraps the blocks, and sets the learner's reduction. mine: this rank's first batches."""
    config, place, network = learner.config, learner.place, learner.denoiser.network
    flops = hardware.training_flops(network, mine[0].images.shape[1:], learner.task.conditioner.nothing(1))
    if config.checkpoint_activations:
        checkpoint_blocks(network)
    tried = {} if config.precision == "fp32" else _tried(learner, mine[-1])
    precision = min(tried, key=lambda name: tried[name]) if config.precision == "auto" else config.precision
    learner.module.autocast = AUTOCAST[precision]
    compile_blocks(network, config.compile)
    check_memory(learner.module, mine[-1], _key(learner), place, learner.task.batch_size)
    learner.reduction = reduction(config.reduction, learner.module, place)
    return say.Prepared(
        step=learner.progress.step,
        images=learner.progress.images,
        precision=precision,
        forward_backward_s=tried,
        flops_per_image=flops,
        peak_flops=hardware.peak_rate(place.device, AUTOCAST[precision] or torch.float32),
        compile=config.compile,
        checkpoint_activations=config.checkpoint_activations,
        reduction=config.reduction,
        deterministic=config.deterministic,
    )


def _tried(learner: Learner, batch: Batch) -> dict[str, float]:
    """Seconds of a logical shard's forward and backward pass in each precision of this hardware, the mean over ranks,
    so that all of them decide alike.
    """
    place, key = learner.place, _key(learner)
    found: dict[str, float] = {}
    for name, kind in AUTOCAST.items():
        if kind is None or hardware.has_bf16(place.device):
            learner.module.autocast = kind
            run = partial(backward, learner.module, [batch], [key], place)
            room = fits(learner.module, batch, key, place, len(batch.images))
            found[name] = hardware.seconds(run, place.device) if room else math.inf
    learner.module.zero_grad(set_to_none=True)
    times = torch.tensor(list(found.values()), device=place.device)
    if place.world > 1:
        torch.distributed.all_reduce(times)
    return dict(zip(found, (times / place.world).tolist(), strict=True))


def _key(learner: Learner) -> StepKey:
    """Of this rank's last logical shard in the coming step."""
    return learner.keys(learner.place.shards(learner.task.logical_shards))[-1]
