"""The training loop with its data stream, in this process and as the worker of a Ray cluster, in turn: images a second
of both, the share of time spent waiting for data, and the ratio.

The network has 1.6 M parameters, the images are 32x32 PNGs in shards on the local disk, read by one reader. Wall time:
it asks for an idle machine with two cores, one for the network and one for everything else.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from jobs.benchmark.step import machine
from jobs.benchmark.step_contestants import BASE32
from jobs.cli import console
from pipeline.config import RunConfig, from_plain
from pipeline.data.making.generated import GeneratedSet, commit, write_slice
from pipeline.data.sets.manifest import ImageSpec
from pipeline.training import events as say

BATCH, WINDOW = 16, 4  # images a step, steps between two points of the loss curve
WARM_WINDOWS = 3  # of every run, that do not count
BARS = {"ray_over_local": 1.03, "data_wait": 0.02}
Arm = Callable[[RunConfig, Callable[[say.Event], None]], object]


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each arm [5]")
    parser.add_argument("--steps", type=int, default=60, help="steps of a training [60]")
    parser.add_argument("--json", type=Path, help="write the record there")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.steps < WINDOW * (WARM_WINDOWS + 2):
        raise ValueError(f"--rounds must be at least 1, --steps at least {WINDOW * (WARM_WINDOWS + 2)}")
    return args


def shard_set(url: str, images: int = 2048) -> None:
    """Smooth random pictures: PNGs of them are about as large as those of photographs."""
    made = GeneratedSet(url, ImageSpec(32, 3, "png"), images, images // 4, (), {"made_for": "benchmark loop"})
    rng = np.random.default_rng(0)
    for index in range(made.slices):
        coarse = rng.normal(128, 48, (len(made.indices(index)), 8, 8, 3)).repeat(4, 1).repeat(4, 2)
        pixels = (coarse + rng.normal(0, 8, coarse.shape)).clip(0, 255).astype(np.uint8)
        write_slice(made, index, pixels, None)
    commit(made)


def run_config(folder: Path, name: str, steps: int) -> RunConfig:
    """A training of `steps` steps on one worker, without samples or held-out images."""
    data = str(folder / "data")
    off = dict.fromkeys(
        ("evaluate_images", "sample_images", "evaluate_every_images", "sample_every_images", "checkpoint_every_images"),
        0,
    )
    return from_plain(
        {
            "name": name,
            "output": str(folder / name),
            "shard": {"source": "made", "url": data, "image_size": 32, "channels": 3},
            "stream": {"url": data, "batch_size": BATCH, "logical_shards": 1, "readers": 1, "reader_cpus": 1.0},
            "model": {"size": 32, "channels": 3, "classes": 0, "network": {"name": "unet", **asdict(BASE32)}},
            "training": {"images": steps * BATCH, "log_every_images": WINDOW * BATCH, **off},
            "cluster": {"workers": 1, "cpus_per_worker": 1.0},
        }
    )


@contextmanager
def arms() -> Iterator[dict[str, Arm]]:
    """What is compared: the loop in this process on one thread, and in the worker of a Ray session."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from pipeline.cluster.session import session

    with session():
        import torch

        from pipeline.assembly import train_here
        from pipeline.cluster.train import fit

        torch.set_num_threads(1)

        def local(config: RunConfig, on_event: Callable[[say.Event], None]) -> None:
            for event in train_here(config):
                on_event(event)

        yield {"local": local, "ray": fit}


def measured(arm: Arm, config: RunConfig) -> dict[str, float]:
    """Medians over a training's windows."""
    windows: list[dict[str, float]] = []
    arm(config, lambda event: windows.append(event.metrics) if isinstance(event, say.Step) else None)
    counted = windows[WARM_WINDOWS:]
    return {name: median(window[name] for window in counted) for name in ("images_per_s", "data_wait")}


def main(argv: list[str]) -> int:
    args = options(argv)
    with tempfile.TemporaryDirectory(prefix="raydiffusion-loop-") as name, arms() as contestants:
        folder = Path(name)
        shard_set(str(folder / "data"))
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
        for number in range(args.rounds):
            for name in list(contestants)[:: 1 if number % 2 else -1]:
                found = measured(contestants[name], run_config(folder, f"{name}-{number}", args.steps))
                rounds[name].append(found)
                rate, wait = found["images_per_s"], found["data_wait"]
                console.print(f"  {name:<6} {rate:6.1f} images/s, waits for data {wait:.2%} of the time")
    both = zip(rounds["local"], rounds["ray"], strict=True)
    found = {
        "ray_over_local": median(here["images_per_s"] / there["images_per_s"] for here, there in both),
        "data_wait": median(each["data_wait"] for each in rounds["ray"]),
    }
    for name, value in found.items():
        console.print(f"  {name} {value:.3f}, at most {BARS[name]:.2f} is asked")
    if args.json:
        record: dict[str, Any] = {"benchmark": "loop", **found, "rounds": rounds, "machine": machine("cpu")}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(value > BARS[name] for name, value in found.items()) else 0
