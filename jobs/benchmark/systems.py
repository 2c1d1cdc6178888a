"""Ten published systems, one table: each run file jobs/configs/digits_SYSTEM.yaml is trained by jobs.train on the same
images with the same network for the same number of images, and evaluated by jobs.evaluate with its own sampler and
every likelihood estimator. A system that is trained and evaluated already is not done again.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from jobs import cli, evaluate, train
from jobs.progress import bar
from pipeline.choose import choose
from pipeline.config import RunConfig, load_config
from pipeline.data.sets.manifest import HELD_OUT, TRAIN, Manifest
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.evaluation.measure import Evaluation
from pipeline.evaluation.statistics import Estimate
from pipeline.model import build
from pipeline.model import load as load_model

CONFIGS = Path(__file__).parent.parent / "configs"
RESULTS = "tests/benchmarks/results"
SYSTEMS = {  # name -> how its row is called
    "ddpm": "DDPM",
    "iddpm_hybrid": "IDDPM, hybrid loss",
    "iddpm_vlb": "IDDPM, L_vlb",
    "vdm": "VDM",
    "ncsn": "NCSN",
    "ve_sde": "VE SDE",
    "vp_sde": "VP SDE",
    "subvp_sde": "sub-VP SDE",
    "edm": "EDM",
    "flow": "Rectified flow",
}
OWN = ("level_scale", "fourier_exponents")  # of the network's options: how a system shows it level and image
SIZE_TOLERANCE = 0.01  # of the number of parameters: a variance head, Fourier features
TRAINED = re.compile(r"train: ([\d,]+)/[\d,]+ images")  # jobs.progress, where there is no terminal


@dataclass(frozen=True)
class System:
    """A run file as it will be run: the arguments of a job, and the configuration they come to."""

    name: str
    arguments: list[str]
    config: RunConfig

    @property
    def title(self) -> str:
        return SYSTEMS[self.name]


def load_systems(names: Sequence[str], overrides: Sequence[str], runs: str | None) -> list[System]:
    """runs: folder that holds a folder a system; None: where the run files say.

    Raises:
        ValueError: unknown system, or what the run file refuses.
    """
    found: list[System] = []
    for name in names:
        choose(SYSTEMS, name, "system")
        own = [] if runs is None else [f"output={runs}/{name}"]
        file = str(CONFIGS / f"digits_{name}.yaml")
        found.append(System(name, [file, *overrides, *own], load_config(file, [*overrides, *own])))
    outputs = {system.config.output for system in found}
    if len(outputs) < len(found) or len({system.config.name for system in found}) < len(found):
        raise ValueError("systems: each has a name and an output of its own; use --runs FOLDER to put them elsewhere")
    return found


# --- the same data, images seen and network for all ----------------------------------------------------------------


def parameters(config: RunConfig) -> int:
    """Of the network alone."""
    with torch.random.fork_rng(devices=[]):
        return sum(p.numel() for p in build(config.model).network.parameters())


def shared(config: RunConfig) -> dict[str, Any]:
    """What all systems must have in common, by key of the run file."""
    found: dict[str, Any] = {"seed": config.seed, "training.images": config.training.images}
    for section, keys in {
        "stream": ("url", "batch_size", "flip"),
        "model": ("size", "channels", "classes"),
        "evaluation": ("samples", "images", "features", "judge_images", "seed"),
    }.items():
        found |= {f"{section}.{key}": getattr(getattr(config, section), key) for key in keys}
    found["model.network"] = {key: value for key, value in config.model.network.items() if key not in OWN}
    return found


def check_alike(systems: Sequence[System]) -> None:
    """Raises ValueError where two systems do not see the same images equally often with networks of one size."""
    first, *others = systems
    expected, size = shared(first.config), parameters(first.config)
    for system in others:
        for key, value in shared(system.config).items():
            if value != expected[key]:
                raise ValueError(
                    f"systems must share {key}: it is {expected[key]!r} in {first.name}, {value!r} in {system.name}"
                )
        count = parameters(system.config)
        if abs(count - size) > SIZE_TOLERANCE * size:
            raise ValueError(
                f"systems must have networks of one size: {size:,} parameters in {first.name}, {count:,} in "
                f"{system.name}, more than {SIZE_TOLERANCE:.0%} apart"
            )


def data(config: RunConfig) -> Manifest:
    """The shard set, made of scikit-learn's digits where it is not there."""
    from jobs.quickstart import write_digits
    from pipeline import storage
    from pipeline.data.making.shards import shard_in_process

    folder = storage.local_path(config.shard.source)
    if folder is not None:
        write_digits(Path(folder))
    return shard_in_process(config.shard)


# --- training and evaluation, several at once ----------------------------------------------------------------------


@dataclass
class Workers:
    """Runs `python -m jobs.VERB`, `side_by_side` at once with a share of the cores each; `tell` hears every line."""

    side_by_side: int
    tell: Callable[[str, str], None]
    live: list[subprocess.Popen[str]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def job(self, name: str, verb: str, *arguments: str, allowed: tuple[int, ...] = (0,)) -> None:
        """Raises ValueError with its last line where the job fails, KeyboardInterrupt where it was stopped."""
        if self.stopped.is_set():
            raise KeyboardInterrupt
        threads = max(1, (os.cpu_count() or 1) // self.side_by_side)
        command = [sys.executable, "-m", f"jobs.{verb}", *arguments]
        last = ""
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "COLUMNS": "400"},
        ) as process:
            self.live.append(process)
            for line in process.stdout or ():
                last = line.strip() or last
                self.tell(name, last)
        self.live.remove(process)
        if process.returncode in allowed:
            return
        self.stopped.set()  # before another one begins
        if process.returncode in (130, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt
        raise ValueError(f"{name}: jobs.{verb} ended with {process.returncode}: {last}")

    def stop(self) -> None:
        """Each live job saves and ends, as after Ctrl-C."""
        self.stopped.set()
        for process in list(self.live):
            process.terminate()


def done(config: RunConfig) -> Evaluation | None:
    """The evaluation of this system as it is configured now; None where there is something left to do."""
    try:
        model = load_model(evaluate.model_url(config))
    except FileNotFoundError:
        return None
    card = model.card
    same = (
        model.config == config.model
        and card["objective"] == json.loads(json.dumps(config.objective))
        and card["seed"] == config.seed
        and card["images_seen"] >= config.training.images
    )
    return evaluate.stored(config) if same else None


def run(systems: Sequence[System], side_by_side: int) -> dict[str, Evaluation]:
    """Train and evaluate what is left to do; all evaluations, by name.

    Raises:
        ValueError: a job failed; says which and its last line.
    """
    left = [system for system in systems if done(system.config) is None]
    if side_by_side == 1:
        _one_by_one(left)
    elif left:
        _side_by_side(left, min(side_by_side, len(left)), len(systems))
    found = {system.name: done(system.config) for system in systems}
    missing = [name for name, evaluation in found.items() if evaluation is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: no evaluation of these settings after the run; is the output shared?")
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def _one_by_one(systems: Sequence[System]) -> None:
    """In this process."""
    for index, system in enumerate(systems, 1):
        cli.console.print(f"[bold]{system.title}[/], {index} of {len(systems)}")
        if train.run(system.config, local=True).reason != "budget":
            raise KeyboardInterrupt
        evaluate.run(system.config, local=True)


def _side_by_side(systems: Sequence[System], count: int, of: int) -> None:
    """Each in processes of its own, `count` of them at once; the bar counts images trained on."""
    from pipeline.tracking.client import connect

    connect(systems[0].config.tracking.uri)  # makes a database that is not there, before several want to
    seen, notes, finished = dict.fromkeys([s.name for s in systems], 0), dict[str, str](), of - len(systems)
    with bar("systems", sum(system.config.training.images for system in systems), "images") as live:

        def tell(name: str, line: str) -> None:
            nonlocal finished
            trained = TRAINED.search(line)
            if trained:
                seen[name] = int(trained[1].replace(",", ""))
            notes[name] = f"{name} {line}"
            if not line:
                finished += 1
                del notes[name]
            live.update(sum(seen.values()), "; ".join([f"{finished} of {of} done", *notes.values()]))

        _in_pool(systems, Workers(count, tell))


def _in_pool(systems: Sequence[System], workers: Workers) -> None:
    def one(system: System) -> None:
        workers.job(system.name, "train", *system.arguments, "--local")
        images = f"{system.config.training.images:,}"
        workers.tell(system.name, f"train: {images}/{images} images")
        workers.job(system.name, "evaluate", *system.arguments, "--local", allowed=(0, 1))  # 1: near-copies, say
        workers.tell(system.name, "")

    with ThreadPoolExecutor(workers.side_by_side) as pool:
        futures = [pool.submit(one, system) for system in systems]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if not all(future.done() and future.exception() is None for future in futures):
                workers.stop()
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, KeyboardInterrupt))  # the cause, not what was stopped


# --- the table -----------------------------------------------------------------------------------------------------


def _bits(evaluation: Evaluation, estimator: str) -> str:
    scores = evaluation.scores.get(estimator)
    return "–" if scores is None else f"{scores.mean:.3f} ± {scores.standard_error:.3f}"


def _interval(found: Estimate, scale: float, digits: int, unit: str) -> str:
    value, low, high = (f"{scale * number:.{digits}f}" for number in (found.value, found.low, found.high))
    return f"{value}{unit} ({low}–{high})"


def _sampler(config: RunConfig) -> str:
    how = config.evaluation.sampling
    evaluations = choose(SAMPLERS, how.sampler, "sampler").evaluations(how.steps, **how.options)
    return f"{how.sampler.replace('_', ' ')}, {evaluations}"


def table(systems: Sequence[System], found: Mapping[str, Evaluation]) -> list[list[str]]:
    """The header and a row a system, as text: held-out bits/dim with standard errors by every estimator, share of
    samples that show the asked class and Fréchet distance in floors with 95% intervals.
    """
    lines = [["", *ESTIMATORS, "asked class", "Fréchet", "sampler, evaluations"]]
    for system in systems:
        evaluation = found[system.name]
        agreement, bits = evaluation.agreement, [_bits(evaluation, estimator) for estimator in ESTIMATORS]
        share = "–" if agreement is None else _interval(agreement.share, 100, 1, "%")
        ratio = _interval(evaluation.frechet.ratio, 1, 2, "")
        lines.append([system.title, *bits, share, ratio, _sampler(system.config)])
    return lines


def reasons(systems: Sequence[System]) -> list[str]:
    """Why a cell is empty, a line each."""
    return [
        f"{system.title}: no '{estimator}', which evaluation.estimators of its run file does not ask for"
        for system in systems
        for estimator in ESTIMATORS
        if estimator not in system.config.evaluation.estimators
    ]


def markdown(lines: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The table ready for a README, the least bits/dim of each column in bold."""
    header, *rows = [list(line) for line in lines]
    for column in range(1, 1 + len(ESTIMATORS)):
        values = {index: float(row[column].split()[0]) for index, row in enumerate(rows) if row[column] != "–"}
        if values:
            best = min(values, key=lambda index: values[index])
            rows[best][column] = f"**{rows[best][column]}**"
    text = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
    return "\n".join([text, *(f"\n{note}" for note in notes), ""])


def show(lines: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    header, *rows = lines
    shown = Table(*header, show_edge=False)
    for row in rows:
        shown.add_row(*row)
    cli.console.print(shown)
    for note in notes:
        cli.console.print(f"  {note}", soft_wrap=True)


def record(systems: Sequence[System], found: Mapping[str, Evaluation], manifest: Manifest) -> dict[str, Any]:
    """All figures, and what they were found with."""
    from pipeline.tracking.facts import git_commit

    def of(system: System) -> dict[str, Any]:
        config, evaluation = system.config, found[system.name]
        return {
            "parameters": parameters(config),
            "model": asdict(config.model),
            "objective": config.objective,
            "learning_rate": config.training.learning_rate,
            "sampling": asdict(config.evaluation.sampling),
            "estimators": config.evaluation.estimators,
            "metrics": evaluation.metrics(),
            "parts": {estimator: scores.parts for estimator, scores in evaluation.scores.items()},
            "evaluations": {estimator: scores.evaluations for estimator, scores in evaluation.scores.items()},
            "class_agreement": None if evaluation.agreement is None else asdict(evaluation.agreement.share),
            "frechet_ratio": asdict(evaluation.frechet.ratio),
        }

    splits = {split: manifest.split(split).total for split in (TRAIN, HELD_OUT)}
    return {
        "benchmark": "systems",
        "images_seen": systems[0].config.training.images,
        "data": {"digest": manifest.digest, **splits},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "torch": torch.__version__,
        "commit": git_commit(),
        "systems": {system.name: of(system) for system in systems},
    }


# --- the command ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark systems",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid on top of every run file")
    parser.add_argument("--only", metavar="NAME,...", help=f"these systems alone, of {', '.join(SYSTEMS)}")
    parser.add_argument("--side-by-side", type=int, metavar="N", help="systems at once [as many as there are cores]")
    parser.add_argument("--runs", metavar="FOLDER", help="where the trained systems go [what each run file says]")
    parser.add_argument("--results", metavar="FOLDER", default=RESULTS, help=f"of systems.json and .md [{RESULTS}]")
    return parser


def main(argv: list[str]) -> int:
    """The exit code. Raises ValueError, OSError for what a user can mend."""
    args = _parser().parse_intermixed_args(argv)
    side_by_side = (os.cpu_count() or 1) if args.side_by_side is None else args.side_by_side
    if side_by_side < 1:
        raise ValueError(f"--side-by-side must be at least 1, got {side_by_side}")
    names = list(SYSTEMS) if args.only is None else [name.strip() for name in args.only.split(",")]
    systems = load_systems(names, args.overrides, args.runs)
    check_alike(systems)
    started = time.monotonic()
    manifest = data(systems[0].config)
    found = run(systems, side_by_side)
    lines, notes = table(systems, found), reasons(systems)
    show(lines, notes)
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "systems.json").write_text(json.dumps(record(systems, found, manifest), indent=1) + "\n")
    (folder / "systems.md").write_text(markdown(lines, notes))
    took = time.monotonic() - started
    cli.console.print(f"  {folder}/systems.json and systems.md, after {took:,.0f} s", soft_wrap=True)
    return 0
