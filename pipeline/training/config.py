"""The run file's `training` section: how long and how to train, what is kept, what guards a run left alone."""

from dataclasses import dataclass
from typing import Annotated

import torch

from pipeline.choose import choose
from pipeline.training.optim import LAWS
from pipeline.training.prepare import COMPILE

AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
PRECISIONS = (*AUTOCAST, "auto")
REDUCTIONS = ("ddp", "exact")
ON_SPIKE = ("none", "skip", "rollback")

AT_LEAST_1 = ("images", "log_every_images", "keep", "skip_limit", "spike_window", "rollback_skips")
AT_LEAST_0 = (
    *("learning_rate", "warmup_images", "weight_decay", "clip_norm", "ema_half_life_images", "max_steps", "max_hours"),
    *("evaluate_every_images", "evaluate_images", "sample_every_images", "sample_images", "checkpoint_every_images"),
    *("keep_best", "keep_every_images", "target_bits_per_dim"),
)


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how to train. Laws are counted in images, so that another batch size keeps them."""

    images: Annotated[int, "images to see in all"] = 200_000
    max_steps: Annotated[int, "stop after this many steps, the laws unchanged; 0: no such limit"] = 0
    max_hours: Annotated[float, "stop after this many hours of training, restarts included; 0: no such limit"] = 0.0
    target_bits_per_dim: Annotated[float, "stop when held-out bits/dim is at most this; 0: no such limit"] = 0.0
    learning_rate: Annotated[float, "peak learning rate of AdamW"] = 2e-4
    law: Annotated[str, "learning rate after the warm-up: " + ", ".join(LAWS)] = "constant"
    warmup_images: Annotated[int, "images of linear warm-up from 0"] = 10_000
    betas: Annotated[tuple[float, float], "AdamW's decay rates of mean and square"] = (0.9, 0.999)
    weight_decay: Annotated[float, "AdamW's decay of matrices and kernels"] = 0.0
    clip_norm: Annotated[float, "largest gradient norm; 0 never clips"] = 1.0
    ema_half_life_images: Annotated[float, "half-life of the weights' moving average, images"] = 500_000
    ema_ramp_up: Annotated[float | None, "the half-life is at most this share of the images seen; null: no ramp"] = 0.05
    label_dropout: Annotated[float, "share of images trained without their label, for guidance"] = 0.0
    precision: Annotated[str, "fp32, bf16 (autocast, where the hardware has it), or auto: the faster here"] = "fp32"
    compile: Annotated[str, "of the network's blocks, at the first step: " + ", ".join(COMPILE)] = "none"
    checkpoint_activations: Annotated[bool, "keep less memory and compute each block twice"] = False
    reduction: Annotated[
        str, "ddp: workers add up gradients as they come; exact: in shard order, the same bits for any number of them"
    ] = "ddp"
    deterministic: Annotated[bool, "same bits from run to run on a GPU too, which costs speed there"] = False
    log_every_images: Annotated[int, "images between two points of the loss curve"] = 2_048
    evaluate_every_images: Annotated[int, "images between two held-out bits/dim; 0: at the end only"] = 50_000
    evaluate_images: Annotated[int, "held-out images of such a measurement; 0: none is made"] = 1_000
    evaluate_levels: Annotated[int, "network evaluations an image of such a measurement"] = 8
    evaluate_raw: Annotated[bool, "measure the weights themselves too, not their EMA alone: twice the cost"] = True
    sample_every_images: Annotated[int, "images between two sample grids; 0: at the end only"] = 50_000
    sample_images: Annotated[int, "images of a sample grid; 0: none is made"] = 64
    sample_raw: Annotated[bool, "a grid of the weights themselves too: twice the cost"] = False
    checkpoint_every_images: Annotated[int, "images between two checkpoints; 0: at the end only"] = 50_000
    keep: Annotated[int, "checkpoints kept, the newest ones"] = 3
    keep_best: Annotated[int, "and so many with the best held-out bits/dim, of those measured when saved"] = 1
    keep_every_images: Annotated[int, "and the first one after each multiple of so many images; 0: none"] = 0
    skip_limit: Annotated[int, "steps in a row that may be left out by a guard before the run stops"] = 10
    on_spike: Annotated[
        str, "none, skip: leave the step out, rollback: to the newest checkpoint, then leave its batches out"
    ] = "skip"
    spike_factor: Annotated[float, "a spike is a loss or gradient norm above so many times its running median"] = 20.0
    spike_window: Annotated[int, "steps of that median; no step before them is a spike"] = 100
    rollback_skips: Annotated[int, "batches left out after a rollback: that of the spike and those before it"] = 8
    skip_steps: Annotated[tuple[int, ...], "steps whose batch is read and left out; the first step is 1"] = ()

    def __post_init__(self) -> None:
        for least, names in ((1, AT_LEAST_1), (0, AT_LEAST_0)):
            for name in names:
                if not getattr(self, name) >= least:
                    allowed = "at least 1" if least else "0 or more"
                    raise ValueError(f"training.{name} must be {allowed}, got {getattr(self, name)}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"training.label_dropout must be a share, 0 to below 1, got {self.label_dropout:g}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas must lie in [0, 1), got {list(self.betas)}")
        if self.ema_ramp_up is not None and not self.ema_ramp_up > 0:
            raise ValueError(f"training.ema_ramp_up must be positive or null, got {self.ema_ramp_up}")
        if not self.spike_factor > 1:
            raise ValueError(f"training.spike_factor must be above 1, got {self.spike_factor:g}")
        if any(step < 1 for step in self.skip_steps):
            raise ValueError(f"training.skip_steps: the first step is 1, got {list(self.skip_steps)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"training.precision must be one of {', '.join(PRECISIONS)}, got '{self.precision}'")
        for name, valid in (("law", LAWS), ("compile", COMPILE), ("reduction", REDUCTIONS), ("on_spike", ON_SPIKE)):
            choose(dict.fromkeys(valid), getattr(self, name), f"training.{name}")
