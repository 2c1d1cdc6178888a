"""A model is warmed up and tested before it gets a request."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.procedure import Procedure
from pipeline.model import Model, Sampling
from pipeline.serving.engine import Engine
from pipeline.serving.outcomes import NotFinite

SELF_TEST_SEED = 20_240_229


@dataclass(frozen=True)
class SelfTest:
    """digest: sha256 of the images of a known seed; seconds: how long the whole test took, warm-up included."""

    digest: str
    seconds: float


def self_test(engine: Engine, model: Model) -> SelfTest:
    """Warm up, then make two images of a known seed alone and again beside other requests: the same pixels, all finite.

    Raises:
        ValueError: they differ, or are not finite.
    """
    started = time.perf_counter()
    asked = model.conditioner.in_turn((0, 0))

    def ask(seed: int, steps: int) -> Callable[[], Procedure[Tensor]]:
        return lambda: model.sampling((seed, seed + 1), asked, Sampling(steps=steps))

    try:
        alone = engine.submit(ask(SELF_TEST_SEED, 3), rows=2, name="self-test").result()
        beside = [engine.submit(ask(SELF_TEST_SEED + index, 2 + index % 4), rows=2) for index in (-3, -2, -1)]
        again = engine.submit(ask(SELF_TEST_SEED, 3), rows=2, name="self-test").result()
        for other in beside:
            other.result()
    except NotFinite as error:
        raise ValueError(f"self-test: {error}") from None
    if not torch.equal(alone.value, again.value):
        raise ValueError("self-test: an image differs when other requests run beside it")
    if not bool(torch.isfinite(alone.value).all()):
        raise ValueError("self-test: the model made pixels that are not finite")
    digest = hashlib.sha256(model.space.decode(alone.value).cpu().numpy().tobytes()).hexdigest()
    return SelfTest(digest, time.perf_counter() - started)
