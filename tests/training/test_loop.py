"""The loop: what it says, that it goes on bit for bit, that workers do not change it, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch

from pipeline import storage
from pipeline.data.reading.stream import Batch
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objectives.loss import Loss, Objective
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.randomness import StepKey
from pipeline.training import checkpoint
from pipeline.training import events as say
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import Diverged, RunError, train
from pipeline.training.step import Place
from pipeline.training.task import HeldOut, Hooks, Task
from tests.training.runs import BATCH, SHARDS, Scans, digests, losses, spawn, task


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


Kind = TypeVar("Kind", bound=say.Event)


def held_out(bits: list[float]) -> HeldOut:
    """Made-up scores, every image asked at one level."""
    values = torch.tensor(bits, dtype=torch.float64)
    return HeldOut(values, torch.zeros(len(bits), 1, dtype=torch.float64), values[:, None])


def kinds(events: list[say.Event], wanted: type[Kind]) -> list[Kind]:
    return [event for event in events if isinstance(event, wanted)]


def test_40_steps_equal_20_and_a_fresh_process_and_20(tmp_path: Path) -> None:
    whole = spawn(str(tmp_path / "whole"))[0]
    halves = str(tmp_path / "halves")
    killed = spawn(halves, checkpoint_every_images=20 * BATCH, die_after=20)[0]
    assert not kinds(killed, say.Finished)
    rest = spawn(halves, checkpoint_every_images=20 * BATCH)[0]
    assert isinstance(rest[0], say.Started)
    assert rest[0].step == 20
    assert rest[0].checkpoint == checkpoint.folder(halves, 20)
    assert losses(whole)[20:] == losses(rest)
    assert digests(str(tmp_path / "whole"), 40) == digests(halves, 40)
    assert set(digests(halves, 40)) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}


def test_images_that_others_stand_in_for_are_counted(tmp_path: Path) -> None:
    class Damaged(Scans):
        def __next__(self) -> Batch:
            batch = super().__next__()
            return replace(batch, lost=(7, 9)) if (batch.step, batch.logical_shard) == (3, 1) else batch

    whole = task(str(tmp_path), images=6 * BATCH, log_every_images=2 * BATCH)
    events = list(train(replace(whole, open_batches=lambda step: Damaged(step, [0, 1, 2, 3]))))
    assert [event.metrics.get("lost_images", 0) for event in kinds(events, say.Step)] == [0, 2, 0]


def test_workers_do_not_change_the_losses(tmp_path: Path) -> None:
    """4 logical shards; of 3 workers one has two of them."""
    one = losses(list(train(task(str(tmp_path / "one"), images=10 * BATCH))))
    for world in (2, 3):
        ranks = [losses(events) for events in spawn(str(tmp_path / f"{world}"), world, images=10 * BATCH)]
        assert all(rank == ranks[0] for rank in ranks)
        worst = max(abs(a - b) / abs(a) for a, b in zip(one, ranks[0], strict=True))
        print(f"largest relative difference of a step's loss, 1 to {world} workers: {worst:.1e}")
        assert worst <= 1e-6


@pytest.mark.slow
def test_three_workers_go_on_bit_for_bit(tmp_path: Path) -> None:
    """More than one DDP bucket (4 MB of gradients): without the settling backwards the weights differ here."""
    over = {"width": 64, "images": 8 * BATCH, "checkpoint_every_images": 4 * BATCH}
    spawn(str(tmp_path / "whole"), 3, **over)
    halves = str(tmp_path / "halves")
    store = checkpoint.folder(halves, 4)
    spawn(halves, 3, **{**over, "images": 4 * BATCH})
    assert Path(store).exists()
    rest = spawn(halves, 3, **over)[0]
    assert rest[0].step == 4
    assert digests(str(tmp_path / "whole"), 8) == digests(halves, 8)


def test_a_finished_training_stays_finished(tmp_path: Path) -> None:
    first = list(train(task(str(tmp_path), images=3 * BATCH)))
    before = digests(str(tmp_path), 3)
    again = list(train(task(str(tmp_path), images=3 * BATCH)))
    assert [type(event) for event in again] == [say.Started, say.Finished]
    assert first[-1] == again[-1]
    longer = list(train(task(str(tmp_path), images=5 * BATCH)))
    assert [event.step for event in kinds(longer, say.Step)] == [4, 5]
    assert digests(str(tmp_path), 3) == before


def test_stop_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    hooks = Hooks(stop=lambda: next(asked))
    events = list(train(task(str(tmp_path / "a"), hooks=hooks, images=6 * BATCH)))
    assert events[-1] == say.Finished(3, 3 * BATCH, "stopped", checkpoint.folder(str(tmp_path / "a"), 3))
    rest = list(train(task(str(tmp_path / "a"), images=6 * BATCH)))
    list(train(task(str(tmp_path / "b"), images=6 * BATCH)))
    assert isinstance(rest[-1], say.Finished)
    assert rest[-1].reason == "budget"
    assert digests(str(tmp_path / "a"), 6) == digests(str(tmp_path / "b"), 6)


def test_events_come_at_multiples_of_images(tmp_path: Path) -> None:
    seen: list[bool] = []

    def evaluate(denoiser: Denoiser, place: Place) -> HeldOut:
        seen.append(denoiser.training or any(p.requires_grad for p in denoiser.parameters()))
        return held_out([1.0, 2.0, 3.0, 6.0])

    hooks = Hooks(evaluate, lambda denoiser: torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    every: dict[str, Any] = {
        "evaluate_every_images": 30,
        "sample_every_images": 40,
        "checkpoint_every_images": 36,
        "log_every_images": 24,
    }
    events = list(train(task(str(tmp_path), hooks=hooks, images=7 * BATCH, **every)))
    assert [event.step for event in kinds(events, say.Evaluated)] == [3, 5, 7]  # 36, 60, the end
    assert [event.step for event in kinds(events, say.Samples)] == [4, 7]
    assert [event.step for event in kinds(events, say.CheckpointBegun)] == [3, 6, 7]
    assert [event.step for event in kinds(events, say.CheckpointSaved)] == [3, 6, 7]
    assert [event.step for event in kinds(events, say.Step)] == [2, 4, 6, 7]
    assert [event.step for event in kinds(events, say.Curve)] == [3, 5, 7]
    assert seen == [False] * 6  # the EMA and the weights themselves
    metrics = kinds(events, say.Evaluated)[0].metrics
    assert metrics["held_out/bits_per_dim"] == 3.0
    assert metrics["held_out/standard_error"] == pytest.approx(torch.tensor([1.0, 2.0, 3.0, 6.0]).std().item() / 2)
    assert {"loss", "grad_norm", "learning_rate", "images_per_s", "data_wait"} <= set(
        kinds(events, say.Step)[0].metrics
    )


def test_the_weights_themselves_are_looked_at_beside_their_average(tmp_path: Path) -> None:
    made: list[Task] = []

    def scale(denoiser: Denoiser) -> float:
        return sum(float(p.abs().sum()) for p in denoiser.parameters())

    def evaluate(denoiser: Denoiser, place: Place) -> HeldOut:
        return held_out([scale(denoiser)] * 2)

    hooks = Hooks(evaluate, lambda denoiser: torch.full((1, 1, 8, 8), int(scale(denoiser)) % 256).byte())
    made.append(task(str(tmp_path), hooks=hooks, images=4 * BATCH, sample_raw=True))
    events = list(train(made[0]))
    kept = checkpoint.read(str(tmp_path), 4).tensors
    (evaluated,) = kinds(events, say.Evaluated)
    grids = {event.weights: event.pixels for event in kinds(events, say.Samples)}
    for weights, stem, key in (("ema", "ema", "held_out/bits_per_dim"), ("raw", "model", "held_out/raw_bits_per_dim")):
        names = dict(made[0].denoiser.named_parameters())
        expected = sum(float(kept[stem][name].abs().sum()) for name in names)
        assert evaluated.metrics[key] == pytest.approx(expected, rel=1e-6)
        assert int(grids[weights][0, 0, 0, 0]) == int(expected) % 256
    assert evaluated.metrics["held_out/bits_per_dim"] != evaluated.metrics["held_out/raw_bits_per_dim"]
    (curve,) = kinds(events, say.Curve)
    assert len(curve.edges) == 17
    assert len(curve.held_out) == len(curve.raw) == len(curve.training) == 16
    assert curve.held_out[0] is None or curve.held_out[-1] is None, "all levels were one"
    assert sum(loss is not None for loss in curve.training) > 4


def test_a_checkpoint_of_version_1_is_gone_on_from(tmp_path: Path) -> None:
    """Rewritten as that version wrote it: the same weights at the end."""
    whole, store = str(tmp_path / "whole"), str(tmp_path / "old")
    list(train(task(whole, images=5 * BATCH)))
    list(train(task(store, images=5 * BATCH, max_steps=3)))
    url = Path(checkpoint.folder(store, 3))
    facts = json.loads((url / "state.json").read_text())["facts"]
    facts = {name: facts[name] for name in ("identity", "images", "skipped", "skipped_in_a_row")} | {"finished": False}
    (url / "state.json").write_text(json.dumps({"step": 3, "facts": facts}, indent=1, sort_keys=True))
    record: dict[str, Any] = {"version": 1, "step": 3, "files": json.loads((url / "commit.json").read_text())["files"]}
    data = (url / "state.json").read_bytes()
    record["files"]["state.json"] = {"sha256": storage.digest(data), "bytes": len(data)}
    record["sha256"] = storage.digest(json.dumps(record, indent=1, sort_keys=True).encode())
    (url / "commit.json").write_text(json.dumps(record, indent=1, sort_keys=True))
    rest = list(train(task(store, images=5 * BATCH)))
    assert rest[0].step == 3
    assert digests(store, 5) == digests(whole, 5)


def test_a_learned_schedule_is_trained_and_averaged(tmp_path: Path) -> None:
    made = task(str(tmp_path), objective="vlb", schedule="learned", images=6 * BATCH, warmup_images=0)
    schedule = cast(torch.nn.Module, made.denoiser.schedule)
    before = {name: p.clone() for name, p in schedule.named_parameters() if p.requires_grad}
    assert before
    list(train(made))
    averaged = checkpoint.read(str(tmp_path), 6).tensors["ema"]
    for name, value in before.items():
        now = schedule.get_parameter(name)
        assert not torch.equal(now, value)
        assert not torch.equal(averaged[f"schedule.{name}"], now)


class Poisoned:
    """An objective whose loss or gradient is not finite at chosen (step, shard)."""

    def __init__(self, where: set[tuple[int, int]], what: str) -> None:
        self.inner: Objective = OBJECTIVES["simple"]()
        self.where, self.what, self.hits = where, what, 0

    def loss(self, denoiser: Denoiser, x: torch.Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        loss = self.inner.loss(denoiser, x, conditioning, key)
        if (key.step, key.shard) not in self.where:
            return loss
        self.hits += 1
        if self.what == "loss":
            return Loss(loss.per_image * math.nan, loss.parts, loss.gamma)
        flat = loss.per_image - loss.per_image.detach()  # zero, with a gradient
        return Loss(loss.per_image.detach() + flat * math.inf * 0 + flat * 1e300 * 1e300, loss.parts, loss.gamma)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(tmp_path: Path, what: str) -> None:
    made = task(str(tmp_path), images=4 * BATCH)
    poisoned = Poisoned({(2, 1)}, what)
    made = made.__class__(**{**vars(made), "objective": poisoned})
    weights: list[torch.Tensor] = []
    events: list[say.Event] = []
    for event in train(made):
        events.append(event)
        if isinstance(event, say.Step | say.Skipped):
            weights.append(torch.cat([p.detach().flatten() for p in made.denoiser.parameters()]))
    assert poisoned.hits == 1
    (skipped,) = kinds(events, say.Skipped)
    assert skipped.step == 3
    assert "logical shard" in skipped.reason
    assert "gamma" in skipped.reason
    assert torch.equal(weights[1], weights[2])  # steps 2 and 3
    assert not torch.equal(weights[2], weights[3])
    assert torch.isfinite(weights[3]).all()
    assert checkpoint.read(str(tmp_path), 4).facts["skipped"] == 1


def test_too_many_bad_steps_stop_the_run(tmp_path: Path) -> None:
    made = task(str(tmp_path), images=9 * BATCH, skip_limit=3)
    poisoned = Poisoned({(step, 3) for step in range(2, 9)}, "loss")
    made = made.__class__(**{**vars(made), "objective": poisoned})
    with pytest.raises(
        Diverged,
        match=r"3 steps in a row .* step 5: loss not finite; in logical shard 3 \(rank 0\), gamma",
    ):
        list(train(made))


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    list(train(task(str(tmp_path), images=2 * BATCH)))
    with pytest.raises(RunError, match=r"of another run: width was 8, is 16"):
        list(train(task(str(tmp_path), images=4 * BATCH, width=16)))
    made = task(str(tmp_path), images=4 * BATCH, width=16)
    with pytest.raises(RunError, match="does not fit the network"):
        list(train(made.__class__(**{**vars(made), "identity": {}})))


def test_more_workers_than_logical_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"7 workers for {SHARDS} logical shards"):
        next(train(task(str(tmp_path), Place(0, 7))))


def test_a_full_disk_does_not_stop_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = checkpoint.storage.write_bytes, []

    def write(url: str, data: bytes) -> None:
        if "step-000000002/ema" in url:
            refused.append(url)
            raise OSError(28, "No space left on device")
        real(url, data)

    monkeypatch.setattr(checkpoint.storage, "write_bytes", write)
    events = list(train(task(str(tmp_path), images=4 * BATCH, checkpoint_every_images=BATCH)))
    assert len(refused) == 1
    (failed,) = kinds(events, say.CheckpointFailed)
    assert failed.step == 2
    assert "No space left" in failed.reason
    assert checkpoint.committed(str(tmp_path)) == [4, 3, 1]


def test_the_data_is_closed_when_the_training_is_left(tmp_path: Path) -> None:
    opened: list[object] = []
    made = task(str(tmp_path))
    inner = made.open_batches

    def open_batches(step: int):
        opened.append(inner(step))
        return opened[-1]

    made = made.__class__(**{**vars(made), "open_batches": open_batches})
    course = train(made)
    for event in course:
        if isinstance(event, say.Step):
            break
    course.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert [stream.closed for stream in opened] == [True]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"images": 0}, r"training\.images must be at least 1, got 0"),
        ({"learning_rate": -1.0}, r"training\.learning_rate must be 0 or more"),
        ({"betas": (0.9, 1.0)}, r"training\.betas must lie in \[0, 1\)"),
        ({"precision": "fp16"}, r"training\.precision must be one of fp32, bf16, auto, got 'fp16'"),
        ({"law": "cosin"}, r"unknown training\.law 'cosin' \(did you mean 'cosine'"),
        ({"ema_ramp_up": 0.0}, r"training\.ema_ramp_up must be positive or null"),
    ],
)
def test_bad_values_are_named(over: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**over)  # pyright: ignore[reportArgumentType]


def test_events_survive_their_json_line(tmp_path: Path) -> None:
    hooks = Hooks(lambda denoiser, place: held_out([1.0] * 3), lambda denoiser: torch.randint(256, (2, 1, 8, 8)).byte())
    for event in train(task(str(tmp_path), hooks=hooks, images=2 * BATCH)):
        again = say.decode(say.encode(event))
        assert type(again) is type(event)
        if isinstance(event, say.Samples) and isinstance(again, say.Samples):
            assert torch.equal(event.pixels, again.pixels)
        else:
            assert again == event
    with pytest.raises(ValueError, match="not an event"):
        say.decode('{"event": "Unknown"}')


def test_batch_shape_is_what_the_helper_says() -> None:
    from tests.training.runs import batch_of

    batch = batch_of(3, 2)
    assert isinstance(batch, Batch)
    assert batch.images.shape == (BATCH // SHARDS, 1, 8, 8)
