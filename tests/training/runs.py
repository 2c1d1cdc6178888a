"""Small real trainings for the tests, in this process or in fresh ones."""

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from pipeline import backbones, storage
from pipeline.conditioner import numbered
from pipeline.data.reading.stream import Batch
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objectives.objective import OBJECTIVES, DiscreteVLB, Objective
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.pixels import Pixels
from pipeline.diffusion.randomness import keyed_generator
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.training import checkpoint
from pipeline.training import events as say
from pipeline.training.loop import Hooks, Task, TrainingConfig, train
from pipeline.training.step import Place

PROCESSES = multiprocessing.get_context("forkserver")  # a clean process that has imported everything forks the ranks
PROCESSES.set_forkserver_preload(["pytest", "tests.training.runs"])
BATCH, SHARDS, SIZE, CLASSES = 12, 4, 8, 3

PLAIN = {
    "images": 40 * BATCH,
    "warmup_images": 5 * BATCH,
    "learning_rate": 1e-3,
    "ema_half_life_images": 10.0 * BATCH,
    "log_every_images": BATCH,
    "evaluate_every_images": 0,
    "sample_every_images": 0,
    "checkpoint_every_images": 0,
}


def denoiser(width: int = 8, schedule: str = "cosine") -> Denoiser:
    """A U-Net with dropout and attention, seeded. Width 64 has more than one DDP bucket (the first holds 1 MiB)."""
    torch.manual_seed(0)
    config = backbones.UNetConfig(
        base_width=width, multipliers=(1, 2), blocks=1, attention_at=(4,), dropout=0.1, last_gain=0.1
    )
    network = backbones.build(config, channels=1, size=SIZE, classes=CLASSES, out_channels=1)
    learned = schedule == "learned"
    return Denoiser(
        network,
        SCHEDULES[schedule](),
        Parameterization("eps", "vp"),
        level="normalised_gamma" if learned else "step_index",
    )


class Scans:
    """Keyed blobs with a label each: any rank can make any step's batch."""

    def __init__(self, step: int, shards: list[int]) -> None:
        self._batches = self._generate(step, shards)
        self.closed = False

    def _generate(self, step: int, shards: list[int]) -> Iterator[Batch]:
        while True:
            for shard in shards:
                yield batch_of(step, shard)
            step += 1

    def __iter__(self) -> "Scans":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        self.closed = True


def batch_of(step: int, shard: int) -> Batch:
    generator = keyed_generator("scans", step, shard)
    count = BATCH // SHARDS
    labels = torch.randint(CLASSES, (count,), generator=generator)
    low = torch.rand(count, 1, SIZE // 2, SIZE // 2, generator=generator)
    images = torch.nn.functional.interpolate(low, scale_factor=2, mode="bilinear") * 80 + labels.view(-1, 1, 1, 1) * 80
    return Batch(step, shard, images.byte(), labels, torch.arange(count))


def digests(store: str, step: int) -> dict[str, str]:
    """sha256 of each tensor file of a checkpoint, from its commit record."""
    record = json.loads(storage.read_bytes(f"{checkpoint.folder(store, step)}/{checkpoint.COMMIT}"))
    return {name: facts["sha256"] for name, facts in record["files"].items() if name.endswith(".safetensors")}


def task(
    store: str, place: Place | None = None, objective: str = "simple", hooks: Hooks | None = None, **over: Any
) -> Task:
    place = place or Place()
    width, schedule = over.pop("width", 8), over.pop("schedule", "cosine")
    return Task(
        config=TrainingConfig(**{**PLAIN, **over}),
        denoiser=denoiser(width, schedule),
        objective=_objective(objective),
        conditioner=numbered("labels", CLASSES),
        space=Pixels((1, SIZE, SIZE)),
        open_batches=lambda step: Scans(step, place.shards(SHARDS)),
        batch_size=BATCH,
        logical_shards=SHARDS,
        seed=5,
        store=store,
        identity={"width": width},
        place=place,
        hooks=hooks or Hooks(),
    )


def _objective(name: str) -> Objective:
    """One of OBJECTIVES, or 'importance': levels drawn by the losses that were seen."""
    return DiscreteVLB(importance=True) if name == "importance" else OBJECTIVES[name]()


def losses(events: list[say.Event]) -> list[float]:
    return [event.metrics["loss"] for event in events if isinstance(event, say.Step)]


def in_group(meeting: str, world: int, function: Callable[..., Any], *given: Any) -> list[str]:
    """`function(place, say, *given)` on `world` fresh processes that can talk; the lines that each rank said.

    A rank that fails says why and ends with exit code 1.
    """
    meeting = f"{meeting}-meeting-{os.urandom(4).hex()}"
    ranks = [PROCESSES.Process(target=_rank, args=(meeting, rank, world, function, given)) for rank in range(world)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(timeout=240)
    finally:
        for process in ranks:
            process.kill()
    said = [Path(f"{meeting}-{rank}").read_text() for rank in range(world)]
    codes = [process.exitcode for process in ranks]
    if codes[0] == -signal.SIGKILL:  # as asked; the others fail for it
        assert 0 not in codes[1:], said
    else:
        assert codes == [0] * world, said
    return said


def _rank(meeting: str, rank: int, world: int, function: Callable[..., Any], given: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    with open(f"{meeting}-{rank}", "w", buffering=1) as said:
        try:
            if world > 1:
                method = f"file://{meeting}"
                torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
            function(Place(rank, world), lambda line: said.write(line + "\n"), *given)
            if world > 1:
                torch.distributed.destroy_process_group()
        except BaseException:
            said.write(traceback.format_exc())
            os._exit(1)


def spawn(store: str, world: int = 1, **over: Any) -> list[list[say.Event]]:
    """A training in `world` fresh processes; the events of each rank.

    die_after: step; rank 0 is killed by SIGKILL once its checkpoint is committed.
    """
    said = in_group(store, world, _training, store, over)
    return [[say.decode(line) for line in out.splitlines() if line.startswith("{")] for out in said]


def _training(place: Place, tell: Callable[[str], Any], store: str, over: dict[str, Any]) -> None:
    die_after = over.pop("die_after", None)
    for event in train(task(store, place, **over)):
        tell(say.encode(event))
        if die_after is not None and isinstance(event, say.CheckpointSaved) and event.step == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
