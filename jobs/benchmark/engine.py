"""What the serving engine costs: 1 to 64 live requests of an image each, against a bare loop of the same batch.

Both do DDIM on the same network; the engine answers one procedure a request and calls the network on as many rows as
there are requests, the loop is one procedure of all of them. They take turns, the ratio is the median of the rounds.
Also: seconds of the first calls, and the memory of several models. Needs torch, numpy, PyYAML and safetensors alone.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.published import DDPM_CIFAR10, DDPMPP_CIFAR10
from pipeline.backbones.table import Architecture
from pipeline.backbones.unet import UNetConfig
from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.procedure import Procedure, drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.sampling.grids import grid
from pipeline.diffusion.sampling.samplers import ddim
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.serving.engine import Engine

BAR = 0.9
MIB = 1 << 20
NETWORKS: dict[str, tuple[UNetConfig, int, int]] = {  # configuration, size, channels
    "ddpm_cifar10": (DDPM_CIFAR10, 32, 3),
    "ddpmpp_cifar10": (replace(DDPMPP_CIFAR10, augmentation_labels=0), 32, 3),
    "tiny": (UNetConfig(base_width=16, multipliers=(1, 2), blocks=1, attention_at=(4,)), 8, 1),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --- what is measured ------------------------------------------------------------------------------------------------


class Graphed(nn.Module):
    """A network as one CUDA graph a number of rows: the processor launches it whole, not kernel by kernel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """As the network's own; conditioning without labels."""
        if z.shape not in self.graphs:
            self.graphs[z.shape] = self._captured(z, level, conditioning)
        graph, z_in, level_in, output = self.graphs[z.shape]
        z_in.copy_(z)
        level_in.copy_(level)
        graph.replay()
        return output.clone()

    def _captured(
        self, z: Tensor, level: Tensor, conditioning: Conditioning
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        z_in, level_in = z.clone(), level.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.network(z_in, level_in, conditioning)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.network(z_in, level_in, conditioning)
        return graph, z_in, level_in, output


def compiled(network: nn.Module) -> nn.Module:
    """By torch.compile: fused kernels."""
    network.compile()
    return network


PATHS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda network: network,
    "compiled": compiled,
    "graph": Graphed,
}


def denoiser(name: str, device: torch.device, dtype: torch.dtype, path: str) -> Denoiser:
    """A network with random weights."""
    config, size, channels = choose(NETWORKS, name, "network")
    network = Architecture(replace(config, dropout=0.0), channels, size, 0, channels).build()
    network = network.eval().requires_grad_(False).to(device, dtype)
    network = choose(PATHS, path, "path")(network)
    return Denoiser(network, SCHEDULES["cosine"](), Parameterization("eps", "vp"), level="step_index", dtype=dtype)


def images(model: Denoiser, seeds: Sequence[int], shape: Sequence[int], steps: int, device: str) -> Procedure[Tensor]:
    """DDIM from fresh noise."""
    noise = Noise(seeds, device)
    y = noise.normal_(torch.empty(len(seeds), *shape, device=device)).mul_(model.process.prior_variance**0.5)
    return ddim(y, grid("uniform_t", model.schedule, steps), noise, Conditioning())


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Contest:
    """The engine and the loop on one network."""

    def __init__(self, model: Denoiser, shape: tuple[int, ...], steps: int, device: torch.device) -> None:
        self.model, self.shape, self.steps, self.device = model, shape, steps, device

    def procedure(self, seeds: Sequence[int]) -> Procedure[Tensor]:
        """One of them for these images."""
        return images(self.model, seeds, self.shape, self.steps, self.device.type)

    def loop(self, live: int, requests: int) -> float:
        """Rows a second of the bare loop, `live` images at a time."""
        settle(self.device)
        started = time.perf_counter()
        for first in range(0, requests, live):
            drive(self.procedure(range(first, first + live)), self.model)
        settle(self.device)
        return requests * self.steps / (time.perf_counter() - started)

    def engine(self, live: int, requests: int) -> float:
        """The same of an engine with `live` requests at a time."""
        with Engine({"main": self.model}, chunk=live, max_live_rows=live, threads=torch.get_num_threads()) as engine:
            settle(self.device)
            started = time.perf_counter()
            asked = [engine.submit(partial(self.procedure, [seed]), cost=self.steps) for seed in range(requests)]
            for future in asked:
                future.result()
            settle(self.device)
            return requests * self.steps / (time.perf_counter() - started)

    def row(self, live: int, rounds: int, batches: int) -> dict[str, Any]:
        """Medians and the ratio of the rounds; the first round of each warms up."""
        requests = live * batches
        self.loop(live, live)
        self.engine(live, live)
        pairs: list[tuple[float, float]] = []
        for turn in range(rounds):
            first, second = (self.engine, self.loop) if turn % 2 else (self.loop, self.engine)
            one, other = first(live, requests), second(live, requests)
            pairs.append((one, other) if turn % 2 else (other, one))
        return {
            "live": live,
            "engine_rows_per_s": median(engine for engine, _ in pairs),
            "loop_rows_per_s": median(loop for _, loop in pairs),
            "ratio": median(engine / loop for engine, loop in pairs),
            "ratios": [round(engine / loop, 3) for engine, loop in pairs],
        }


def warm_up(contest: Contest, live: int) -> dict[str, float]:
    """Seconds of the first network calls of a fresh process, and of a later one."""
    seconds: list[float] = []
    for _ in range(4):
        settle(contest.device)
        started = time.perf_counter()
        drive(images(contest.model, range(live), contest.shape, 1, contest.device.type), contest.model)
        settle(contest.device)
        seconds.append(time.perf_counter() - started)
    return {"first_s": seconds[0], "second_s": seconds[1], "later_s": seconds[-1]}


def memory(name: str, device: torch.device, dtype: torch.dtype, models: int) -> dict[str, Any]:
    """Bytes of the weights of one model, and on a GPU what `models` of them take."""
    kept = [denoiser(name, device, dtype, "eager") for _ in range(models)]
    weights = sum(value.numel() * value.element_size() for value in kept[0].state_dict().values())
    found: dict[str, Any] = {"models": models, "weights_bytes_each": weights}
    if device.type == "cuda":
        found["allocated_bytes"] = torch.cuda.memory_allocated(device)
    return found


# --- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--network", default="ddpm_cifar10", help=f"{', '.join(NETWORKS)} [ddpm_cifar10]")
    add("--dtype", default="float32", help=f"of the network: {', '.join(DTYPES)} [float32]")
    add("--path", default="eager", help=f"how the network runs: {', '.join(PATHS)} [eager]")
    add("--live", default="1,2,4,8,16,32,64", metavar="N,...", help="requests at a time [1,2,4,8,16,32,64]")
    add("--steps", type=int, default=20, help="of each request [20]")
    add("--rounds", type=int, default=5, help="turns of each that count [5]")
    add("--batches", type=int, default=2, help="requests a turn, in numbers of live ones [2]")
    add("--models", type=int, default=3, help="whose memory is told [3]")
    add("--threads", type=int, default=1, help="of torch on the CPU [1]")
    add("--json", type=Path, help="write the record there")
    return parser


def _costs(warm: dict[str, float], held: dict[str, Any]) -> str:
    calls = f"the first network call {warm['first_s']:.3f} s, the second {warm['second_s']:.3f} s"
    taken = held.get("allocated_bytes", held["models"] * held["weights_bytes_each"])
    each = f"{held['weights_bytes_each'] / MIB:.1f} MiB of weights each"
    return f"{calls}, later ones {warm['later_s']:.4f} s\n{held['models']} models: {taken / MIB:.1f} MiB, {each}"


def main(argv: list[str]) -> int:
    """1 where the bar is missed on a GPU, else 0. Raises ValueError, OSError for what a user can mend."""
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if args.path == "graph" and args.device != "cuda":
        raise ValueError("--path graph needs --device cuda")
    try:
        live = [int(part) for part in args.live.split(",")]
    except ValueError:
        raise ValueError(f"--live must be numbers with commas between them, got '{args.live}'") from None
    if min(*live, args.steps, args.rounds, args.batches, args.models, args.threads) < 1:
        raise ValueError("--live, --steps, --rounds, --batches, --models and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), choose(DTYPES, args.dtype, "dtype")
    _, size, channels = choose(NETWORKS, args.network, "network")
    torch.manual_seed(0)
    record: dict[str, Any] = {"benchmark": "engine", "network": args.network, "dtype": args.dtype, "path": args.path}
    record["memory"] = memory(args.network, device, dtype, args.models)
    contest = Contest(denoiser(args.network, device, dtype, args.path), (channels, size, size), args.steps, device)
    record["warm_up"] = warm_up(contest, max(live))
    print(_costs(record["warm_up"], record["memory"]))
    print(f"{'live':>5} {'engine rows/s':>14} {'loop rows/s':>14} {'ratio':>7}", flush=True)
    rows: list[dict[str, Any]] = []
    for count in live:
        rows.append(contest.row(count, args.rounds, args.batches))
        row = rows[-1]
        print(
            f"{count:>5} {row['engine_rows_per_s']:>14,.1f} {row['loop_rows_per_s']:>14,.1f} {row['ratio']:>7.3f}",
            flush=True,
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    record |= {"rows": rows, "steps": args.steps, "bar": BAR, "device": name, "cores": os.cpu_count()}
    record |= {"torch": torch.__version__, "python": platform.python_version()}
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    worst = min(rows, key=lambda row: row["ratio"])
    print(f"worst ratio {worst['ratio']:.3f} at {worst['live']} live; the bar is {BAR}")
    return int(device.type == "cuda" and worst["ratio"] < BAR)
