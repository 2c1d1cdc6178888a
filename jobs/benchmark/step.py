"""Images a second of a whole training step (forward, backward, clipping, AdamW, moving average) beside what a user
would pick instead, and beside a bare convolution.

Every contestant runs in a process of its own, so that none changes another's memory allocator, and they take turns:
one round is a step of each. Reported are medians over the rounds, on a CPU of the processor time the step took. With
--device cuda also the share of the peak: the operations of a step against the best square product measured there.
Needs the repository and torch; diffusers and accelerate for their contestant.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
H100_BF16 = 989e12  # dense, as NVIDIA states it for H100 SXM and H200
WITHOUT_PEER = ("edm_cifar10",)  # diffusers has no such network
BARS = {
    "diffusers": 1.10,
    "lucidrains": 1.40,
    "conv3x3": 0.70,
    "diffusers_tail": 2.5,
}  # on a CPU, for model base32 in float32


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--model",
        default="base32",
        help="base32, base32_at_8, ddpm_cifar10, edm_cifar10, adm_imagenet64, dit_xl2 [base32]",
    )
    add("--batch", type=int, help="images a step [16 on a CPU, 512 on a GPU]")
    add("--rounds", type=int, default=9, help="steps of each contestant that count [9]")
    add("--steps", type=int, help="steps a round [1 on a CPU, 10 on a GPU]")
    add("--precision", choices=("fp32", "bf16"), help="[fp32 on a CPU, bf16 on a GPU]")
    add("--compile", default="none", help="none, default, reduce-overhead, max-autotune-no-cudagraphs; ours by blocks")
    add("--contestants", help="comma-separated: ours, diffusers, diffusers_compiled, lucidrains, conv3x3, ...")
    add("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of one contestant")
    add("--peer-width", type=int, default=34, help="width of lucidrains' Unet, for equal operations [34]")
    add("--profile", action="store_true", help="also say where the time of our step goes")
    add("--json", type=Path, help="write the record there")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    args.batch = args.batch or (512 if gpu else 16)
    args.steps = args.steps or (10 if gpu else 1)
    args.precision = args.precision or ("bf16" if gpu else "fp32")
    if min(args.batch, args.rounds, args.steps) < 1:
        raise ValueError("--batch, --rounds and --steps must be at least 1")
    return args


# --- one contestant's process -----------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> int:
    """Says what it is, then makes `args.steps` steps for each line it is sent, and says what they took."""
    import resource

    import torch

    from jobs.benchmark.step_contestants import CONTESTANTS, versions
    from pipeline.choose import choose
    from pipeline.training import hardware

    if args.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device(args.device)
    name = args.worker.removesuffix("_compiled")
    made = choose(CONTESTANTS, name, "contestant")(args)
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in made.module.parameters()), "versions": versions()}
    start = time.perf_counter()
    made.step()
    hardware.finish(device)
    facts |= {"first_step_s": time.perf_counter() - start, "start_to_first_step_cpu_s": time.process_time()}
    made.step()
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps(profiled(made.step, args.device)), flush=True)
            continue
        if line.strip() == "count":  # last: what it allocates would change the steps after it
            print(json.dumps({"flops_per_image": made.forward and counted(made.forward) / args.batch}), flush=True)
            continue
        if device.type == "cuda":
            made.step()  # its memory was given back at the end of the last round
        hardware.finish(device)
        faults, cpu, wall = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time(), time.perf_counter()
        for _ in range(args.steps):
            made.step()
        hardware.finish(device)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        found = {"cpu_s": cpu / args.steps, "wall_s": wall / args.steps, "page_faults": faults / args.steps}
        print(json.dumps({**found, "peak_memory": hardware.peak_memory(device)}), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def counted(forward: Any) -> float:
    """Operations of a step's forward and backward, under the plain form of attention, which the counter knows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward().backward()
    return float(counter.get_total_flops())


def profiled(step: Any, device: str) -> dict[str, float]:
    """Share of the time of the operations that take most, over three steps."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as found:
        for _ in range(3):
            step()
    column = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = {row.key: float(getattr(row, column)) for row in found.key_averages()}
    total = sum(rows.values()) or 1.0
    return {name: value / total for name, value in sorted(rows.items(), key=lambda row: -row[1])[:20]}


# --- the comparison ---------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """A contestant's process. facts: what it said of itself; rounds: what each round took."""

    name: str
    process: subprocess.Popen[str]
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)

    def told(self, line: str | None = None) -> dict[str, Any]:
        """What it answers to a line. ValueError where it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if line is not None:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        while answer := self.process.stdout.readline():
            if answer.startswith("{"):
                return json.loads(answer)
        raise ValueError(f"contestant {self.name} ended with exit code {self.process.wait()}; its reason is above")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def median(self, key: str) -> float:
        return median(found[key] for found in self.rounds)


def started(args: argparse.Namespace, name: str) -> Runner:
    pythons = dict(item.split("=", 1) for item in args.python)
    compiled = args.compile if name == "ours" else ("default" if name.endswith("_compiled") else "none")
    command = [pythons.get(name, sys.executable), "-m", "jobs.benchmark", "step", "--worker", name]
    for option in ("device", "model", "batch", "steps", "precision"):
        command += [f"--{option}", str(getattr(args, option))]
    command += ["--compile", compiled, "--peer-width", str(args.peer_width)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {})
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    runner = Runner(name, process)
    try:
        runner.facts = runner.told()
    except BaseException:
        runner.end()
        raise
    return runner


def compare(args: argparse.Namespace, names: list[str]) -> Iterator[Runner]:
    """All contestants, after their rounds."""
    runners: list[Runner] = []
    try:
        for name in names:
            runners.append(started(args, name))
        for number in range(args.rounds + 1):
            for runner in runners if number % 2 else runners[::-1]:
                found = runner.told("go")
                if number:  # the first warms up
                    runner.rounds.append(found)
        if args.profile:
            runners[0].facts["profile"] = runners[0].told("profile")
        for runner in runners:
            runner.facts |= runner.told("count")
        yield from runners
    finally:
        for runner in runners:
            runner.end()


def record(args: argparse.Namespace, runners: list[Runner]) -> dict[str, Any]:
    """Everything found. Ratios: how many times as fast as the contestant ours is, median of the rounds' ratios; for a
    convolution: the share of its rate of operations that ours reaches."""
    clock = "wall_s" if args.device == "cuda" else "cpu_s"
    rows: dict[str, Any] = {}
    ours = next((runner for runner in runners if runner.name in ("ours", "our_tail")), None)
    loop = next((runner for runner in runners if runner.name == "our_loop"), None)
    for runner in runners:
        step_s, flops = runner.median(clock), runner.facts.get("flops_per_image")
        row = {
            **runner.facts,
            "step_s": step_s,
            "images_per_s": args.batch / step_s,
            **{f"{key}_median": runner.median(key) for key in ("cpu_s", "wall_s", "page_faults", "peak_memory")},
            "rounds_s": [round(found[clock], 6) for found in runner.rounds],
        }
        rate = flops and flops * args.batch / step_s
        if ours is not None and runner.name.split("_")[0] not in ("ours", "our", "conv3x3"):
            row["ours_is_times_as_fast"] = ratio(runner, ours, clock)
            row["ours_starts_times_as_fast"] = started_in(runner) / started_in(ours)
        if ours is not None and runner.name == "our_loop":
            row["over_bare_step"] = ratio(runner, ours, clock)
        if loop is not None and runner.name == "our_passes":
            beyond = (whole[clock] - passes[clock] for whole, passes in zip(loop.rounds, runner.rounds, strict=True))
            row["host_s"] = median(beyond)
        if runner.name.startswith("conv3x3"):
            rate = row["flops_per_s"] = 4 * 3 * 2 * args.batch * 32 * 32 * 64 * 64 * 9 / step_s
            row["share_of_it"] = ours and ours.facts["flops_per_image"] * args.batch / ours.median(clock) / rate
        elif rate:
            row["flops_per_s"] = rate
        rows[runner.name] = row
    what = {key: getattr(args, key) for key in ("device", "model", "batch", "rounds", "steps", "precision", "compile")}
    return {"benchmark": "step", "clock": clock, **what, "machine": machine(args.device), "contestants": rows}


def ratio(runner: Runner, ours: Runner, clock: str) -> float:
    """How many times as long a step of `runner` takes: the median of the rounds' ratios."""
    return median(theirs[clock] / mine[clock] for theirs, mine in zip(runner.rounds, ours.rounds, strict=True))


def started_in(runner: Runner) -> float:
    """Processor seconds from the start of the process to the end of its first step."""
    return float(runner.facts["start_to_first_step_cpu_s"])


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions, commit; on a GPU the best rate of square products."""
    import torch

    from pipeline.training import hardware

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() + (" and changes" if dirty.stdout.strip() else ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["peak_bf16_flops_per_s"] = hardware.peak_rate(torch.device("cuda"), torch.bfloat16)
    return found


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(found: dict[str, Any]) -> None:
    peak = found["machine"].get("peak_bf16_flops_per_s")
    what = ", ".join(str(found[key]) for key in ("model", "precision", "device"))
    print(f"{what}, batch {found['batch']}, torch {found['machine']['torch']}")
    for name, row in found["contestants"].items():
        line = f"  {name:<20}{1e3 * row['step_s']:9.1f} ms/step {row['images_per_s']:9.1f} images/s"
        if row.get("flops_per_s"):
            line += f" {row['flops_per_s'] / 1e9:10.0f} GFLOP/s"
        if peak and row.get("flops_per_s"):
            line += (
                f", {row['flops_per_s'] / peak:.1%} of the measured peak, {row['flops_per_s'] / H100_BF16:.1%} of 989"
            )
        if row.get("ours_is_times_as_fast"):
            line += f"; ours is {row['ours_is_times_as_fast']:.2f} times as fast"
            line += f", starts {row['ours_starts_times_as_fast']:.2f} times as fast"
        if row.get("over_bare_step"):
            line += f"; {row['over_bare_step']:.3f} of the bare step"
        if row.get("host_s"):
            line += f"; the loop takes {1e3 * row['host_s']:.1f} ms more a step"
        if row.get("share_of_it"):
            line += f"; ours reaches {row['share_of_it']:.2f} of it"
        print(
            line + f"; {row['page_faults_median']:.0f} page faults a step, {row['peak_memory_median'] / 2**30:.2f} GiB"
        )
    for name, share in found["contestants"].get("ours", {}).get("profile", {}).items():
        print(f"  {share:6.1%}  {name}")


def missed(found: dict[str, Any]) -> list[str]:
    """The bars that this comparison has and that ours does not reach."""
    rows = found["contestants"]
    if (found["device"], found["precision"]) != ("cpu", "fp32") or ("ours" in rows and found["model"] != "base32"):
        return []
    values = {
        name: rows[name].get("ours_is_times_as_fast", rows[name].get("share_of_it")) for name in BARS if name in rows
    }
    return [
        f"{name}: {value:.2f}, {BARS[name]:.2f} is asked"
        for name, value in values.items()
        if value and value < BARS[name]
    ]


def main(argv: list[str]) -> int:
    args = options(argv)
    if args.worker:
        return work(args)
    peers = ["diffusers"] + (["diffusers_compiled"] if args.device == "cuda" else [])
    default = ["ours", *(peers if args.model not in WITHOUT_PEER else [])]
    default += ["conv3x3", "conv3x3_kept", "conv3x3_kept_nhwc"] if args.device == "cpu" else []
    names = args.contestants.split(",") if args.contestants else default
    found = record(args, list(compare(args, names)))
    show(found)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    short = missed(found)
    for line in short:
        print(f"  missed {line}")
    return 1 if short else 0
