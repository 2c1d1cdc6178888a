"""Going on with a run by what it left behind: its run file, kept at its output and in its MLflow run."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from pipeline import assembly, storage
from pipeline.config import RunConfig, TrackingConfig, parse, to_yaml
from pipeline.tracking.facts import RUN_FILE, without_credentials
from pipeline.tracking.results import run_file

_MLFLOW_RUN = re.compile(r"[0-9a-f]{32}")


def with_full_paths(config: RunConfig) -> RunConfig:
    """The same run with absolute local paths: workers and readers run elsewhere, and so may the job that goes on."""

    def full(url: str) -> str:
        path = storage.local_path(url)
        return url if path is None else os.path.abspath(path)

    return replace(config, output=full(config.output), stream=replace(config.stream, url=full(config.stream.url)))


def keep(config: RunConfig) -> None:
    """Writes the run file at the output."""
    storage.write_bytes(storage.join(config.output, RUN_FILE), to_yaml(without_credentials(config)).encode())


def resumed(run: str, overrides: Sequence[str]) -> RunConfig:
    """The run whose output (a folder or URL) or MLflow run id this is, with overrides such as `training.images=9000`.

    A folder that was moved or copied goes on where it is now, not at the place that its run file names.
    An MLflow run is looked for at the override of tracking.uri, else MLFLOW_TRACKING_URI, else the default.

    Raises:
        ValueError: there is no such run, or an override would make it another one; names which.
    """
    text, source = _from_mlflow(run, overrides) if _MLFLOW_RUN.fullmatch(run) else _from_output(run)
    before, now = parse(text, [], source), parse(text, overrides, source)
    if not _MLFLOW_RUN.fullmatch(run):
        local = storage.local_path(run)
        here = run.rstrip("/") if local is None else os.path.abspath(local)
        now = replace(now, output=here if now.output == before.output else now.output)
        before = replace(before, output=here)
    was, is_now = _unchangeable(before), _unchangeable(now)
    changed = [f"{key} was {was.get(key)!r}, is {value!r}" for key, value in is_now.items() if was.get(key) != value]
    changed += [f"{key} was {value!r}, is gone" for key, value in was.items() if key not in is_now]
    if changed:
        raise ValueError(f"--resume {run}: this would be another run: {'; '.join(changed)}")
    return now


def _unchangeable(config: RunConfig) -> dict[str, object]:
    return {"name": config.name, "output": config.output, **assembly.choices(config)}


def _from_output(url: str) -> tuple[str, str]:
    source = storage.join(url, RUN_FILE)
    try:
        return storage.read_bytes(source).decode(), source
    except FileNotFoundError:
        raise ValueError(f"--resume {url}: no run was started there: it has no {RUN_FILE}") from None


def _from_mlflow(run_id: str, overrides: Sequence[str]) -> tuple[str, str]:
    given = [value.partition("=")[2] for value in overrides if value.startswith("tracking.uri=")]
    uri = (given or [os.environ.get("MLFLOW_TRACKING_URI", TrackingConfig().uri)])[-1]
    return run_file(uri, run_id), f"{RUN_FILE} of MLflow run {run_id}"
