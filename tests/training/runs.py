"""Small real trainings for the tests, in this process or in fresh ones.

`python -m tests.training.runs '{"store": ..., "images": ...}'` runs one rank and prints its events as JSON lines.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from pipeline import backbones
from pipeline.data import storage
from pipeline.data.stream import Batch
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objective import OBJECTIVES
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.randomness import keyed_generator
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.training import checkpoint
from pipeline.training import events as say
from pipeline.training.loop import Hooks, Task, TrainingConfig, train
from pipeline.training.step import Place

ROOT = Path(__file__).parent.parent.parent
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
        objective=OBJECTIVES[objective](),
        classes=CLASSES,
        open_batches=lambda step: Scans(step, place.shards(SHARDS)),
        batch_size=BATCH,
        logical_shards=SHARDS,
        seed=5,
        store=store,
        identity={"width": width},
        place=place,
        hooks=hooks or Hooks(),
    )


def losses(events: list[say.Event]) -> list[float]:
    return [event.metrics["loss"] for event in events if isinstance(event, say.Step)]


def spawn(store: str, world: int = 1, **over: Any) -> list[list[say.Event]]:
    """A training in `world` fresh processes; the events of each rank."""
    meeting = f"{store}-meeting-{os.urandom(4).hex()}"
    given = {"store": store, "world": world, "meeting": meeting, **over}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.runs", json.dumps({**given, "rank": rank})],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == (-signal.SIGKILL if "die_after" in over else 0), errors
    return [[say.decode(line) for line in out.splitlines() if line.startswith("{")] for out, _ in outputs]


def main() -> None:
    options = json.loads(sys.argv[1])
    rank, world = options.pop("rank", 0), options.pop("world", 1)
    meeting, store = options.pop("meeting", ""), options.pop("store")
    die_after = options.pop("die_after", None)  # step: SIGKILL ourselves once its checkpoint is committed
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for event in train(task(store, Place(rank, world), **options)):
        print(say.encode(event), flush=True)
        if die_after is not None and isinstance(event, say.CheckpointSaved) and event.step == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
