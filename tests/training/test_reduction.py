"""`reduction: exact`: the same weights, bit for bit, for any number of workers, through kills and resizes."""

import time
import warnings
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.distributed

from pipeline import backbones
from pipeline.conditioner import numbered
from pipeline.data.reading.stream import Batch
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.pixels import Pixels
from pipeline.diffusion.randomness import StepKey
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.training import checkpoint
from pipeline.training import events as say
from pipeline.training.loop import train
from pipeline.training.prepare import laid_out
from pipeline.training.reduction import Reduction, reduction
from pipeline.training.step import Place, TrainingModule
from tests.training.runs import BATCH, PROCESSES, SHARDS, digests, losses, spawn, task


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_two_three_one_workers_with_kills_between(tmp_path: Path) -> None:
    """4 logical shards: of 3 workers one has two. Weights, EMA, optimizer, losses and held-out scores are the same."""
    over = {"reduction": "exact", "images": 9 * BATCH, "checkpoint_every_images": 3 * BATCH}
    whole = list(train(task(str(tmp_path / "whole"), **over)))
    store = str(tmp_path / "resized")
    parts = [
        spawn(store, 2, die_after=3, **over)[0],
        spawn(store, 3, die_after=6, **over)[0],
        spawn(store, 1, **over)[0],
    ]
    starts = [part[0].step for part in parts]
    assert starts[0] == 0
    assert starts[1] in (3, 6)  # the killed process may have come a checkpoint further
    assert starts[2] in (6, 9)
    assert digests(store, 9) == digests(str(tmp_path / "whole"), 9)
    told = {event.step: event.metrics["loss"] for part in parts for event in part if isinstance(event, say.Step)}
    assert [told[step] for step in sorted(told)] == losses(whole)
    assert checkpoint.read(store, 9).facts["guard"] == checkpoint.read(str(tmp_path / "whole"), 9).facts["guard"]
    assert SHARDS % 3 != 0


@pytest.mark.slow
def test_an_objective_with_memory_and_several_buckets(tmp_path: Path) -> None:
    """4 MB of gradients, levels drawn by what was seen: the same through 3 -> 2 -> 1 workers, and 12 steps of 3."""
    over = {"reduction": "exact", "width": 64, "objective": "importance", "images": 12 * BATCH}
    spawn(str(tmp_path / "whole"), 3, **over)
    store = str(tmp_path / "resized")
    for world, images in ((3, 4 * BATCH), (2, 8 * BATCH), (1, 12 * BATCH)):
        spawn(store, world, **{**over, "images": images})
    assert digests(store, 12) == digests(str(tmp_path / "whole"), 12)
    assert "objective.safetensors" in digests(store, 12)


@pytest.mark.slow
def test_cost_beside_ddp(tmp_path: Path) -> None:
    """Forward and backward of a 1.1 M U-Net at 32x32 on 2 ranks, taking turns: at most 15% more."""
    for shards, rows in ((2, 8), (4, 4)):
        ranks = [
            PROCESSES.Process(target=_cost, args=(str(tmp_path / f"{shards}"), rank, shards, rows)) for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        ratio = float((tmp_path / f"{shards}-ratio").read_text())
        print(f"{shards} logical shards of {rows} images on 2 ranks: exact takes {ratio:.3f} of ddp's time")
        assert ratio <= 1.15


def _cost(meeting: str, rank: int, shards: int, rows: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    place = Place(rank, 2)
    made = {kind: _reduced(kind, place) for kind in ("ddp", "exact")}
    images = torch.randint(256, (rows, 3, 32, 32), dtype=torch.uint8)
    batches = [Batch(0, shard, images, None, torch.arange(rows)) for shard in place.shards(shards)]
    times: dict[str, list[float]] = {kind: [] for kind in made}
    for turn in range(12):
        keys = [StepKey(0, turn, shard, shards) for shard in place.shards(shards)]
        for kind in sorted(made, reverse=turn % 2 == 0):
            module, reduced = made[kind]
            module.zero_grad(set_to_none=False)
            torch.distributed.barrier()
            start = time.perf_counter()
            reduced.backward(batches, keys)
            torch.distributed.barrier()
            times[kind].append(time.perf_counter() - start)
    ratios = [exact / ddp for exact, ddp in zip(times["exact"][1:], times["ddp"][1:], strict=True)]
    if rank == 0:
        Path(f"{meeting}-ratio").write_text(str(median(ratios)))
    torch.distributed.destroy_process_group()


def _reduced(kind: str, place: Place) -> tuple[TrainingModule, Reduction]:
    torch.manual_seed(0)
    options = backbones.UNetConfig(base_width=32, multipliers=(1, 2, 2), blocks=1, attention_at=(16,))
    network = backbones.build(options, channels=3, size=32, classes=0, out_channels=3)
    denoiser = Denoiser(network, SCHEDULES["cosine"](), Parameterization("eps", "vp"), level="step_index")
    network = laid_out(denoiser, place.device).train()
    module = TrainingModule(network, OBJECTIVES["weighted"](), numbered("labels", 0), Pixels((3, 32, 32)))
    return module, reduction(kind, module, place)
