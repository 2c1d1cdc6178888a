"""Numbers that go wrong on one rank of two: the same decision on every rank, and no trace in the final weights."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.data.reading.stream import Batch
from pipeline.diffusion.objectives.loss import Loss
from pipeline.training import events as say
from pipeline.training import loop
from pipeline.training.learner import Learner, StepOutcome
from pipeline.training.loop import train
from pipeline.training.step import Place
from tests.training.runs import BATCH, digests, in_group, losses, task

STEPS, EVERY = 9, 3
OVER: dict[str, Any] = {"images": STEPS * BATCH, "checkpoint_every_images": EVERY * BATCH}


class Injector(Learner):
    """A learner that poisons itself once, in the step that comes after `step` others."""

    def __init__(self, *given: Any, place: str, step: int) -> None:
        super().__init__(*given)
        self.what, self.at, self.injected = place, step, 0

    def step(self, batches: Sequence[Batch], wishes: Sequence[bool]) -> StepOutcome:
        if self.progress.step != self.at or self.injected:
            return super().step(batches, wishes)
        undo = PLACES[self.what](self)
        try:
            return super().step(batches, wishes)
        finally:
            undo()

    def poisoned(self, tensor: Tensor, value: float = math.nan) -> Tensor:
        """A copy with one bad number in it."""
        self.injected += 1
        bad = torch.zeros(tensor.shape, dtype=tensor.dtype)
        bad.view(-1)[bad.numel() // 2] = value
        return tensor + bad

    def once(self, tensor: Tensor, value: float = math.nan) -> Tensor:
        """Of all the calls of a step the first is poisoned."""
        return tensor if self.injected else self.poisoned(tensor, value)


def _state(pick: Callable[[Learner], Tensor]) -> Callable[[Injector], Callable[[], None]]:
    def inject(learner: Injector) -> Callable[[], None]:
        tensor = pick(learner)
        with torch.no_grad():
            tensor.copy_(learner.poisoned(tensor))
        return lambda: None

    return inject


def _gradient(learner: Injector) -> Callable[[], None]:
    """In the backward pass, before ranks meet."""
    return next(learner.denoiser.parameters()).register_hook(learner.once).remove


def _reduced(learner: Injector) -> Callable[[], None]:
    """After ranks met: this rank alone has it."""
    inner = learner.reduction.backward

    def backward(*given: Any) -> list[Loss]:
        found = inner(*given)
        gradient = next(learner.denoiser.parameters()).grad
        assert gradient is not None
        gradient.copy_(learner.poisoned(gradient))
        return found

    learner.reduction.backward = backward  # pyright: ignore[reportAttributeAccessIssue]
    return lambda: setattr(learner.reduction, "backward", inner)


def _loss(value: float, factor: float = 1.0) -> Callable[[Injector], Callable[[], None]]:
    def inject(learner: Injector) -> Callable[[], None]:
        def hook(module: nn.Module, given: Any, loss: Loss) -> Loss:
            per_image = learner.once(loss.per_image, value) if factor == 1.0 else loss.per_image * factor
            learner.injected += factor != 1.0
            return Loss(per_image, loss.parts, loss.gamma, loss.observed)

        return learner.module.register_forward_hook(hook).remove

    return inject


def _data(learner: Injector) -> Callable[[], None]:
    """The noisy image as the network gets it."""

    def hook(module: nn.Module, given: Any) -> Any:
        return learner.once(given[0]), *given[1:]

    return learner.denoiser.network.register_forward_pre_hook(hook).remove


def _output(pick: Callable[[nn.Module], nn.Module]) -> Callable[[Injector], Callable[[], None]]:
    def inject(learner: Injector) -> Callable[[], None]:
        def hook(module: nn.Module, given: Any, out: Tensor) -> Tensor:
            return learner.once(out)

        return pick(learner.denoiser.network).register_forward_hook(hook).remove

    return inject


def _last(network: nn.Module) -> nn.Module:
    return [part for part in network.modules() if isinstance(part, nn.Conv2d)][-2]


PLACES: dict[str, Callable[[Injector], Callable[[], None]]] = {
    "loss": _loss(math.nan),
    "infinite loss": _loss(math.inf),
    "data": _data,
    "network output": _output(lambda network: network),
    "activation": _output(_last),
    "gradient": _gradient,
    "gradient after reduction": _reduced,
    "weights": _state(lambda learner: next(learner.denoiser.parameters())),
    "ema": _state(lambda learner: next(learner.ema.model.parameters())),
    "optimizer mean": _state(lambda learner: learner.optimizer._means[3]),
    "optimizer square": _state(lambda learner: learner.optimizer._squares[5]),
}
STATE = ("weights", "ema", "optimizer mean", "optimizer square")

# (place, rank, steps done before it: at least one, for the first backward passes only settle DDP's buckets)
CAMPAIGN = [
    *(("loss", 1, 4), ("ema", 1, 4), ("optimizer mean", 1, 3), ("gradient after reduction", 1, 7)),
    *(("loss", 0, 2), ("infinite loss", 1, 2), ("infinite loss", 0, 8), ("data", 1, 4), ("data", 0, 8)),
    *(("network output", 1, 2), ("network output", 0, 5), ("activation", 1, 6), ("gradient", 0, 1)),
    *(("gradient", 1, 5), ("gradient after reduction", 0, 3), ("weights", 0, 4), ("weights", 1, 6)),
    *(("ema", 0, 7), ("optimizer mean", 0, 8), ("optimizer square", 1, 5)),
]
DEFAULT = 3


def run(place: Place, store: str, injected: tuple[str, int] | None = None, **over: Any) -> tuple[list[say.Event], int]:
    """A training's events, and how many bad numbers were put in on this rank."""
    made: list[Injector] = []

    def learner(given: Any) -> Learner:
        made.append(
            Injector(given, place=injected[0], step=injected[1]) if injected else Injector(given, place="", step=-1)
        )
        return made[0]

    before, loop.Learner = loop.Learner, learner  # pyright: ignore[reportAttributeAccessIssue]
    try:
        events = list(train(task(store, place, **{**OVER, **over})))
    finally:
        loop.Learner = before
    return events, made[0].injected


def decisions(events: list[say.Event]) -> list[Any]:
    """What was decided, in order."""
    picked = (say.Skipped, say.RolledBack, say.CheckpointBegun, say.Finished)
    return [json.loads(say.encode(event)) for event in events if isinstance(event, picked)]


def campaign(place: Place, tell: Callable[[str], Any], root: str, cases: list[tuple[str, int, int]]) -> None:
    """Each case, and what it is compared with."""
    run(place, f"{root}/whole")
    for number, (what, rank, step) in enumerate(cases):
        events, injected = run(place, f"{root}/{number}", (what, step) if place.rank == rank else None)
        same = f"{root}/whole"
        if what not in STATE:
            same = f"{root}/told-{step}"
            if not Path(same).exists():
                run(place, same, skip_steps=(step + 1,))
        tell(json.dumps({"injected": injected, "decisions": decisions(events), "same": same}))


@pytest.mark.parametrize("count", [DEFAULT, pytest.param(len(CAMPAIGN), marks=pytest.mark.slow)])
def test_a_bad_number_on_one_rank(tmp_path: Path, count: int) -> None:
    cases = CAMPAIGN[:count]
    said = in_group(str(tmp_path / "group"), 2, campaign, str(tmp_path), cases)
    ranks = [[json.loads(line) for line in out.splitlines()] for out in said]
    for number, ((what, rank, step), *told) in enumerate(zip(cases, *ranks, strict=True)):
        case = f"{what} on rank {rank} in step {step + 1}"
        assert told[rank]["injected"] == 1, case
        assert told[1 - rank]["injected"] == 0, case
        assert told[0]["decisions"] == told[1]["decisions"], case
        kinds = {decision["event"] for decision in told[0]["decisions"]}
        assert ("RolledBack" if what in STATE else "Skipped") in kinds, (case, told[0]["decisions"])
        assert digests(f"{tmp_path}/{number}", STEPS) == digests(told[0]["same"], STEPS), case
    print(f"{len(cases)} bad numbers injected, as many times the weights of the run without them")


# --- spikes -----------------------------------------------------------------------------------------------------------

SPIKY: dict[str, Any] = {"spike_window": 4, "spike_factor": 5.0, "log_every_images": BATCH}
PLACES["spike"] = _loss(0.0, factor=1000.0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_spike_is_left_out(tmp_path: Path) -> None:
    events, injected = run(Place(), str(tmp_path / "spike"), ("spike", 6), **SPIKY)
    told, _ = run(Place(), str(tmp_path / "told"), skip_steps=(7,), **SPIKY)
    assert injected > 0
    (skipped,) = (event for event in events if isinstance(event, say.Skipped))
    assert (skipped.step, skipped.cause) == (7, "spike")
    assert "loss" in skipped.reason
    assert "times the median of the last 4 steps" in skipped.reason
    assert losses(events) == losses(told)
    assert digests(str(tmp_path / "spike"), STEPS) == digests(str(tmp_path / "told"), STEPS)


def test_a_spike_rolls_back_and_its_batches_are_left_out(tmp_path: Path) -> None:
    over = {**SPIKY, "on_spike": "rollback", "rollback_skips": 2}
    events, _ = run(Place(), str(tmp_path / "spike"), ("spike", 7), **over)
    (back,) = (event for event in events if isinstance(event, say.RolledBack))
    assert (back.step, back.from_step, back.cause, back.skip_steps) == (6, 8, "spike", (7, 8))
    run(Place(), str(tmp_path / "told"), skip_steps=(7, 8), **SPIKY)
    assert digests(str(tmp_path / "spike"), STEPS) == digests(str(tmp_path / "told"), STEPS)


def test_no_spike_is_seen_where_none_is_asked_for(tmp_path: Path) -> None:
    events, injected = run(Place(), str(tmp_path), ("spike", 6), **{**SPIKY, "on_spike": "none"})
    assert injected > 0
    assert not [event for event in events if isinstance(event, say.Skipped | say.RolledBack)]


def test_a_broken_state_without_a_checkpoint_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(loop.Diverged, match="model not finite at step 2, and there is no checkpoint to go back to"):
        run(Place(), str(tmp_path), ("weights", 1))


def test_a_state_that_breaks_again_and_again_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(self: Any, beta: float) -> None:
        self._averages[0].data.view(-1)[0] = math.nan

    list(train(task(str(tmp_path), images=3 * BATCH)))
    monkeypatch.setattr("pipeline.training.ema.EMA.update", update)
    with pytest.raises(loop.Diverged, match="went back 2 times without coming to another checkpoint; ema not finite"):
        run(Place(), str(tmp_path), skip_limit=2)
