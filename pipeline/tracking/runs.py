"""The MLflow run of a training: one run, kept across restarts, found again by what is stored at the output."""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.tracking import facts
from pipeline.tracking.client import Away, client_of, connect, first_line, without_secret
from pipeline.tracking.delivery import TrackedRun
from pipeline.tracking.spool import Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.config import RunConfig
    from pipeline.data.sets.manifest import Manifest

STORED = "mlflow.json"  # beside the run's output: which MLflow run it is


def open_run(config: "RunConfig", manifest: "Manifest", warn: Callable[[str], None] = print) -> TrackedRun:
    """The MLflow run of this training: the one it had before, or a new one with run file, data set and git commit.

    A run that goes on does so without its server, which gets everything once it answers. The copy of an output is a
    run of its own. warn: told once when the server cannot be reached, once when it is back, and of a copy.

    Raises:
        ValueError: a tracking URI that MLflow cannot use; for a new run a server that does not answer.
    """
    from mlflow.exceptions import MlflowException

    run_id, original = _stored(config), _original(config)
    try:
        client = connect(config.tracking.uri)
        if original is not None:
            _spool_path(config).unlink(missing_ok=True)  # what the original has yet to deliver
            warn(f"{config.output} is a copy of {original}: it goes on in an MLflow run of its own")
        if run_id is None or not _is_there(client, run_id):
            run_id = _create(client, config, manifest)
        else:
            _store(config, run_id)  # it may have been moved since
    except Away:
        if run_id is None:
            raise
        client = client_of(config.tracking.uri)
    except MlflowException as error:
        raise ValueError(f"MLflow at {without_secret(config.tracking.uri)}: {first_line(error)}") from None

    def attach() -> None:
        client.update_run(run_id, status="RUNNING")
        facts.log_parameters(client, run_id, config)

    def attach_files() -> None:
        facts.log_run_file(client, run_id, config)

    return TrackedRun(client, run_id, Spool(_spool_path(config)), attach, attach_files, warn)


def began(config: "RunConfig") -> bool:
    """Whether this training has an MLflow run at the place that its run file names."""
    return _stored(config) is not None


def _stored(config: "RunConfig") -> str | None:
    """The run id at the output, where it is of the run file's server and the output no copy."""
    found = _read(config)
    if found is None or found.get("uri") != without_secret(config.tracking.uri) or _is_copy(found, config.output):
        return None
    return found["run_id"]


def _original(config: "RunConfig") -> str | None:
    """Of which place the output is a copy; None where it is none."""
    found = _read(config)
    return found["place"]["output"] if found is not None and _is_copy(found, config.output) else None


def _read(config: "RunConfig") -> dict[str, Any] | None:
    path = storage.join(config.output, STORED)
    try:
        stored = dict(json.loads(storage.read_bytes(path)))
        run_id = stored["run_id"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not say which MLflow run this training is ({type(error).__name__}: {error}): remove it, and "
            f"the training goes on in a new MLflow run"
        ) from None
    if not isinstance(run_id, str):
        raise ValueError(f"{path}: run_id must be a string, got {run_id!r}: remove it, and a new MLflow run is made")
    return stored


def _place(output: str) -> dict[str, Any]:
    """What tells a place from its copies. folder: its inode, which a copy does not have, and a moved folder keeps."""
    local = storage.local_path(output)
    if local is None:
        return {"output": output, "host": None, "folder": None}
    local.mkdir(parents=True, exist_ok=True)
    return {"output": os.path.abspath(local), "host": platform.node(), "folder": local.stat().st_ino}


def _is_copy(stored: Mapping[str, Any], output: str) -> bool:
    """Whether the original of what was stored may be there as well. A folder that was moved, that came back from a
    backup, or that another machine sees too, is no copy.
    """
    before = stored.get("place")
    if not isinstance(before, dict):
        return False
    now = _place(output)
    if before["host"] != now["host"]:  # of another machine's folders there is no more to know
        return before["folder"] != now["folder"]
    if before["output"] == now["output"] or not storage.exists(storage.join(before["output"], STORED)):
        return False
    return now["host"] is None or not os.path.samefile(before["output"], now["output"])


def _store(config: "RunConfig", run_id: str) -> None:
    stored = {"run_id": run_id, "uri": without_secret(config.tracking.uri), "place": _place(config.output)}
    storage.write_bytes(storage.join(config.output, STORED), json.dumps(stored).encode())


def _is_there(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _create(client: "MlflowClient", config: "RunConfig", manifest: "Manifest") -> str:
    experiment = _experiment(client, config)
    copied = {"raydiffusion.copy_of": found["run_id"]} if (found := _read(config)) and _original(config) else {}
    tags = facts.tags(config, manifest) | copied
    run_id = client.create_run(experiment, run_name=config.name, tags=tags).info.run_id
    client.set_tag(run_id, "mlflow.note.content", facts.note(config, manifest, run_id))
    _store(config, run_id)
    facts.log_data(client, run_id, config, manifest)
    return run_id


def _experiment(client: "MlflowClient", config: "RunConfig") -> str:
    name, uri = config.tracking.experiment, config.tracking.uri
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != "active":
            raise ValueError(f"MLflow's experiment '{name}' is deleted: restore it or set tracking.experiment")
        return found.experiment_id
    place = None
    if uri.startswith("sqlite:"):  # no server: pictures and files beside the database, not in the working directory
        place = str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlflow-artifacts" / name)
    return client.create_experiment(name, artifact_location=place)


def _spool_path(config: "RunConfig") -> Path:
    local = storage.local_path(config.output)
    if local is not None:
        return local / "mlflow.spool"
    place = storage.digest(config.output.encode())[:12]  # two outputs of one name are two runs
    return Path(tempfile.gettempdir()) / f"raydiffusion-{config.name}-{place}.spool"
