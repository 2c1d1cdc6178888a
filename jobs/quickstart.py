"""The whole run on real images: shard, train, evaluate, register, serve, report.

scikit-learn's bundled digits become a folder of PNG files, shards, a trained class-conditional diffusion model, a model
version and an endpoint, each through the job a user would call. Run it again and it continues: finished stages are
verified and kept, a training that was cut off goes on.
"""

import argparse
import base64
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from jobs import cli, evaluate, register, shard, train
from jobs.resources import PeakMemory
from pipeline import storage
from pipeline.cluster.session import prepare_environment, session
from pipeline.config import RunConfig, load_config, to_yaml
from pipeline.data.formats import codecs
from pipeline.data.reading.stream import held_out, train_images
from pipeline.data.sets.manifest import HELD_OUT, TRAIN, Manifest
from pipeline.evaluation.charts import Curve
from pipeline.evaluation.features import Labelled
from pipeline.evaluation.measure import Evaluation, rows
from pipeline.evaluation.report import Link, Report, Stage, write
from pipeline.serving.ports import free_port, is_free
from pipeline.tracking.registry import Version

RUN_FILE = "jobs/configs/digits.yaml"
SERVE_START_S = 120.0
SERVE_STOP_S = 60.0


def write_digits(folder: Path) -> int:
    """scikit-learn's digits as FOLDER/CLASS/NNNN.png; returns how many there are.

    1,797 real scans of 8x8 pixels and 17 grey levels, 0..16 spread over 0..255.
    """
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    if folder.exists():
        return len(digits.images)
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    building = folder.with_name(folder.name + ".building")
    for index, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        path = building / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(codecs.encode_png(image[:, :, None]))
    building.rename(folder)  # the folder appears whole or not at all
    return len(pixels)


def write_images(url: str) -> int:
    """`write_digits` at any URL; on S3 a file that is there already is written once more."""
    local = storage.local_path(url)
    if local is not None:
        local.parent.mkdir(parents=True, exist_ok=True)
        return write_digits(local)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        count = write_digits(folder)
        files = sorted(folder.rglob("*.png"))

        def upload(file: Path) -> None:
            storage.write_bytes(storage.join(url, file.relative_to(folder).as_posix()), file.read_bytes())

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(upload, files))
    return count


@dataclass
class Stages:
    """Names, times and peak memory of the stages, told as they begin."""

    names: tuple[str, ...] = ("shard", "train", "evaluate", "register", "serve", "report")
    done: list[Stage] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # from the start to the end of the last stage

    @contextmanager
    def stage(self, name: str, what: str, memory: PeakMemory) -> Iterator[None]:
        number = self.names.index(name) + 1
        cli.console.print(f"[bold]\\[{number}/{len(self.names)}] {name}[/]  {what}")
        memory.take()
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self.done.append(Stage(name, ended - started, memory.take()))
        self.seconds = ended - self.started


# --- the endpoint
# ------------------------------------------------------------------------------------------------------


def start_serving(config: RunConfig, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`python -m jobs.serve` in a process group of its own; the process and the URL, once the endpoint is ready."""
    host, wanted = config.serving.host, config.serving.port
    port = wanted if wanted and is_free(host, wanted) else free_port(host)
    config = replace(config, serving=replace(config.serving, port=port))
    run_file, log = folder / "serve.yaml", folder / "serve.log"
    run_file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "jobs.serve", str(run_file)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://{config.serving.host}:{port}"
    try:
        _wait_until_ready(process, url, log)
    except BaseException:
        stop_serving(process)
        raise
    return process, url


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + SERVE_START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise ValueError(f"the endpoint did not start: {last[0]} (all of it in {log})")
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.25)
    raise ValueError(f"the endpoint was not ready after {SERVE_START_S:.0f} s; its log is {log}")


def stop_serving(process: subprocess.Popen[bytes]) -> None:
    """End the endpoint and everything it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(SERVE_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(url: str, held: Labelled, classes: int) -> dict[str, Any]:
    """One request to each endpoint, and the page; what was answered, for the report. classes: the model's, 0 for none.

    Raises:
        ValueError: an answer other than 200.
    """
    with httpx.Client(base_url=url, timeout=60) as client:
        wanted = {"labels": [index % classes for index in range(10)]} if classes else {}
        made = _answer(client.post("/v1/images/generations", json={"n": 10, "seed": 1, **wanted}))
        encoded = [base64.b64encode(codecs.encode_png(i.permute(1, 2, 0).numpy())).decode() for i in held.images[:4]]
        labels = held.labels[:4].tolist() if classes and held.labels is not None else None
        scored = _answer(client.post("/v1/likelihood", json={"images": encoded, "labels": labels, "seed": 1}))
        page = client.get("/")
        if page.status_code != 200 or "<form" not in page.text:
            raise ValueError(f"{url}/ did not answer with the page: {page.status_code}")
    return {"generations": made, "likelihood": scored}


def _answer(response: httpx.Response) -> Mapping[str, Any]:
    if response.status_code != 200:
        raise ValueError(f"{response.request.url} answered {response.status_code}: {response.text[:300]}")
    return response.json()


# --- the report
# --------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What the stages came to."""

    manifest: Manifest
    evaluation: Evaluation
    version: Version
    url: str
    answers: dict[str, Any]
    images_seen: int


def write_report(config: RunConfig, found: Found, stages: Stages, held: Labelled, page: Path) -> None:
    from pipeline.tracking.results import history

    def curve(name: str, key: str, error: str | None = None) -> Curve:
        x, y = history(config.tracking.uri, found.version.run_id, key)
        band = history(config.tracking.uri, found.version.run_id, error)[1] if error else None
        return Curve(name, x, y, band)

    manifest, version = found.manifest, found.version
    real = train_images(manifest, config.evaluation.judge_images)
    made = found.answers["generations"]
    counts = ((TRAIN, "training"), (HELD_OUT, "held-out"))
    lineage = [
        Link(
            "Shards",
            [("manifest", manifest.digest[:12]), *((say, f"{manifest.split(s).total:,}") for s, say in counts)],
        ),
        Link("Run", [("MLflow run", version.run_id[:12]), ("images seen", f"{found.images_seen:,}")]),
        Link("Version", [("model", version.url), ("digest", version.digest[:12])]),
        Link("Endpoint", [("at", found.url), ("answers with digest", made["model_digest"][:12])]),
    ]
    write(
        str(page),
        Report(
            title=f"{config.name}: from images to an endpoint",
            subtitle=f"a {'class-conditional ' if config.model.classes else ''}diffusion model, trained, measured, "
            "registered and served by one run",
            evaluation=found.evaluation,
            config=config.evaluation,
            train=Labelled(real.images, real.labels),
            held_out=held,
            class_names=manifest.class_names,
            losses=[curve("training loss", "loss")],
            likelihoods=[curve("held-out, bound", "held_out/bits_per_dim", "held_out/standard_error")],
            lineage=lineage,
            stages=stages.done,
            seconds=stages.seconds,
            commands=commands(config, page),
        ),
    )


def commands(config: RunConfig, page: Path) -> list[tuple[str, str]]:
    """How to look on."""
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return [
        ("This report", str(page)),
        ("The MLflow UI", f"{python.parent}/mlflow ui --workers 1 --backend-store-uri {config.tracking.uri}"),
        ("The MLflow UI's page", "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"),
        ("The page and the API", f"{python} -m jobs.serve {RUN_FILE}"),
    ]


# --- the run
# -------------------------------------------------------------------------------------------------------------


def run(config: RunConfig, folder: Path, keep: bool) -> None:
    prepare_environment()
    stages = Stages()
    with ExitStack() as stack:
        memory = stack.enter_context(PeakMemory())
        with session(config.cluster.address):
            with stages.stage("shard", "images to WebDataset shards, by Ray tasks", memory):
                count = write_digits(Path(config.shard.source))
                cli.console.print(f"  {count:,} scans of digits in {config.shard.source}")
                manifest = shard.run(config)
            with stages.stage("train", f"{config.cluster.most_workers} DDP workers under Ray Train", memory):
                finished = train.run(config)
                if finished.reason != "budget":
                    raise KeyboardInterrupt
            with stages.stage("evaluate", "likelihood, sample quality, memorisation", memory):
                evaluation = evaluate.run(config)
            with stages.stage("register", f"models:/{config.registered_model}", memory):
                version = register.run(config, evaluation)
        real = held_out(manifest)
        held = Labelled(real.images, real.labels)
        with stages.stage("serve", "Ray Serve: sampling, likelihood, page", memory):
            process, url = start_serving(config, folder)
            if not keep:
                stack.callback(stop_serving, process)
            else:
                stack.callback(_stop_on_error, process)
            answers = ask(url, held, config.model.classes)
            _tell_answers(answers, url)
        page = folder / "report.html"
        with stages.stage("report", str(page), memory):
            measured = list(stages.done), stages.seconds  # as the page has them: without itself
            found = Found(manifest, evaluation, version, url, answers, finished.images)
            write_report(config, found, stages, held, page)
        _tell_times(*measured)
        evaluate.show(rows(evaluation, config.evaluation))
        cli.console.print()
        for what, command in commands(config, page):
            cli.console.print(f"{what}:  [bold]{command}[/]", soft_wrap=True)
        if keep:
            cli.console.print(f"\nthe endpoint runs on at [bold]{url}[/]; end it with: kill {process.pid}")


def _stop_on_error(process: subprocess.Popen[bytes]) -> None:
    if sys.exc_info()[0] is not None:
        stop_serving(process)


def _tell_times(stages: list[Stage], seconds: float) -> None:
    peak = max(stage.memory_bytes or 0 for stage in stages)
    cli.console.print()
    for stage in stages:
        cli.console.print(f"  {stage.name:<10}{stage.seconds:6.1f} s  {(stage.memory_bytes or 0) / 2**30:5.2f} GiB")
    cli.console.print(f"  {'all':<10}{seconds:6.1f} s  {peak / 2**30:5.2f} GiB at most\n")


def _tell_answers(answers: Mapping[str, Any], url: str) -> None:
    made, scored = answers["generations"], answers["likelihood"]
    cli.console.print(f"  POST {url}/v1/images/generations: {len(made['data'])} images of {made['model']}")
    values = ", ".join(f"{item['bits_per_dim']:.2f}" for item in scored["data"])
    cli.console.print(f"  POST {url}/v1/likelihood: {values} bits/dim of four held-out images")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"values laid on top of {RUN_FILE}")
    parser.add_argument("--images-only", action="store_true", help="write the images at shard.source, and nothing else")
    parser.add_argument("--keep", action="store_true", help="leave the endpoint running")
    args = parser.parse_intermixed_args()

    def job() -> None:
        config = load_config(RUN_FILE, args.overrides)
        if args.images_only:
            count = write_images(config.shard.source)
            cli.console.print(f"{count:,} scans of digits in {config.shard.source}", soft_wrap=True)
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if cores < config.cluster.fewest_workers:
            config = replace(config, cluster=replace(config.cluster, workers=1))
        folder = storage.local_path(config.output)
        if folder is None:
            raise ValueError(f"the quickstart writes to a local folder; output is {config.output}")
        folder = folder.parent
        folder.mkdir(parents=True, exist_ok=True)
        run(config, folder, args.keep)

    cli.main(job)


if __name__ == "__main__":
    main()
