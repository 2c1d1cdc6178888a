"""The run file's `training` section: how long and how to train, what is kept, what guards a run left alone."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from pipeline.choose import choose
from pipeline.ranges import Range, check
from pipeline.training.optim import LAWS
from pipeline.training.prepare import COMPILE

AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
PRECISIONS = (*AUTOCAST, "auto")
REDUCTIONS = ("ddp", "exact")
ON_SPIKE = ("none", "skip", "rollback")

# what the weights follow from, beside the run's identity
MAKES_WEIGHTS = (
    *("images", "learning_rate", "law", "warmup_images", "betas", "weight_decay", "clip_norm", "ema_half_life_images"),
    *("ema_ramp_up", "label_dropout", "precision", "reduction", "skip_steps", "on_spike", "spike_factor"),
    *("spike_window", "rollback_skips"),
)


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how to train. Laws are counted in images, so that another batch size keeps them."""

    images: Annotated[int, "images to see in all", Range(ge=1)] = 200_000
    max_steps: Annotated[int, "stop after this many steps, the laws unchanged; 0: no such limit", Range(ge=0)] = 0
    max_hours: Annotated[
        float, "stop after this many hours of training, restarts included; 0: no such limit", Range(ge=0)
    ] = 0.0
    target_bits_per_dim: Annotated[
        float, "stop when held-out bits/dim is at most this; 0: no such limit", Range(ge=0)
    ] = 0.0
    learning_rate: Annotated[float, "peak learning rate of AdamW", Range(ge=0)] = 2e-4
    law: Annotated[str, "learning rate after the warm-up: " + ", ".join(LAWS)] = "constant"
    warmup_images: Annotated[int, "images of linear warm-up from 0", Range(ge=0)] = 10_000
    betas: Annotated[tuple[float, float], "AdamW's decay rates of mean and square", Range(ge=0, lt=1)] = (0.9, 0.999)
    weight_decay: Annotated[float, "AdamW's decay of matrices and kernels", Range(ge=0)] = 0.0
    clip_norm: Annotated[float, "largest gradient norm; 0 never clips", Range(ge=0)] = 1.0
    ema_half_life_images: Annotated[float, "half-life of the weights' moving average, images", Range(ge=0)] = 500_000
    ema_ramp_up: Annotated[
        float | None, "the half-life is at most this share of the images seen; null: no ramp", Range(gt=0)
    ] = 0.05
    label_dropout: Annotated[float, "share of images trained without their label, for guidance", Range(ge=0, lt=1)] = (
        0.0
    )
    precision: Annotated[str, "fp32, bf16 (autocast, where the hardware has it), or auto: the faster here"] = "fp32"
    compile: Annotated[str, "of the network's blocks, at the first step: " + ", ".join(COMPILE)] = "none"
    checkpoint_activations: Annotated[bool, "keep less memory and compute each block twice"] = False
    reduction: Annotated[
        str, "ddp: workers add up gradients as they come; exact: in shard order, the same bits for any number of them"
    ] = "ddp"
    deterministic: Annotated[bool, "same bits from run to run on a GPU too, which costs speed there"] = False
    log_every_images: Annotated[int, "images between two points of the loss curve", Range(ge=1)] = 2_048
    evaluate_every_images: Annotated[int, "images between two held-out bits/dim; 0: at the end only", Range(ge=0)] = (
        50_000
    )
    evaluate_images: Annotated[int, "held-out images of such a measurement; 0: none is made", Range(ge=0)] = 1_000
    evaluate_levels: Annotated[int, "network evaluations an image of such a measurement"] = 8
    evaluate_raw: Annotated[bool, "measure the weights themselves too, not their EMA alone: twice the cost"] = True
    sample_every_images: Annotated[int, "images between two sample grids; 0: at the end only", Range(ge=0)] = 50_000
    sample_images: Annotated[int, "images of a sample grid; 0: none is made", Range(ge=0)] = 64
    sample_raw: Annotated[bool, "a grid of the weights themselves too: twice the cost"] = False
    checkpoint_every_images: Annotated[int, "images between two checkpoints; 0: at the end only", Range(ge=0)] = 50_000
    checkpoint_every_minutes: Annotated[
        float, "and at most so many minutes of work without one; 0: no such limit", Range(ge=0)
    ] = 10.0
    keep: Annotated[int, "checkpoints kept, the newest ones", Range(ge=1)] = 3
    keep_best: Annotated[
        int, "and so many with the best held-out bits/dim, of those measured when saved", Range(ge=0)
    ] = 1
    keep_every_images: Annotated[
        int, "and the first one after each multiple of so many images; 0: none", Range(ge=0)
    ] = 0
    skip_limit: Annotated[int, "steps in a row that may be left out by a guard before the run stops", Range(ge=1)] = 10
    on_spike: Annotated[
        str, "none, skip: leave the step out, rollback: to the newest checkpoint, then leave its batches out"
    ] = "skip"
    spike_factor: Annotated[
        float, "a spike is a loss or gradient norm above so many times its running median", Range(gt=1)
    ] = 20.0
    spike_window: Annotated[int, "steps of that median; no step before them is a spike", Range(ge=1)] = 100
    rollback_skips: Annotated[
        int, "batches left out after a rollback: that of the spike and those before it", Range(ge=1)
    ] = 8
    skip_steps: Annotated[
        tuple[int, ...], "steps whose batch is read and left out; the first step is 1", Range(ge=1)
    ] = ()

    def __post_init__(self) -> None:
        check(self, "training")
        if self.precision not in PRECISIONS:
            raise ValueError(f"training.precision must be one of {', '.join(PRECISIONS)}, got '{self.precision}'")
        for name, valid in (("law", LAWS), ("compile", COMPILE), ("reduction", REDUCTIONS), ("on_spike", ON_SPIKE)):
            choose(dict.fromkeys(valid), getattr(self, name), f"training.{name}")

    @property
    def settings(self) -> dict[str, Any]:
        """What the weights follow from, JSON values."""
        values = {name: getattr(self, name) for name in MAKES_WEIGHTS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
