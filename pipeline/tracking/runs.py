"""A training run in MLflow: one MLflow run, kept across restarts, fed from the loop's events.

Events go to a local spool, and a thread carries them to the server, so that an outage never stops or slows the
training. Each (key, step) arrives once: at a start the server is asked for every key's highest step, and only later
ones are sent. Steps are images seen.
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data import storage
from pipeline.tracking import facts
from pipeline.tracking.client import connect, first_line, without_secret
from pipeline.tracking.spool import Spool
from pipeline.training import events as say

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.config import RunConfig
    from pipeline.data.manifest import Manifest

STORED = "mlflow.json"  # beside the run's output: which MLflow run it is
RETRY_S = (1.0, 30.0)
FLUSH_S = 0.5
CLOSE_S = 20.0
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "PERMISSION_DENIED")


def open_run(config: "RunConfig", manifest: "Manifest", warn: Callable[[str], None] = print) -> "TrackedRun":
    """The MLflow run of this training: the one it had before, or a new one with run file, data set and git commit.

    warn: told once when the server cannot be reached later on, and once when it is back.

    Raises:
        ValueError: a tracking URI that MLflow cannot use, or a server that does not answer.
    """
    from mlflow.exceptions import MlflowException

    client = connect(config.tracking.uri)
    try:
        experiment = _experiment(client, config)
        run_id = _stored(client, config)
        highest: dict[str, int] = {}
        if run_id is None:
            run_id = client.create_run(experiment, run_name=config.name, tags=facts.tags(config, manifest)).info.run_id
            _store(config, run_id)
            facts.describe(client, run_id, config, manifest)
        else:
            client.update_run(run_id, status="RUNNING")
            highest = _highest(client, run_id)
        facts.log_parameters(client, run_id, config)
    except MlflowException as error:
        raise ValueError(f"MLflow at {without_secret(config.tracking.uri)}: {first_line(error)}") from None
    return TrackedRun(client, run_id, experiment, Spool(_spool_path(config)), highest, warn)


class TrackedRun:
    """Takes events (`handle`) and brings them to MLflow in a thread of its own; `close` when the training ended."""

    def __init__(
        self,
        client: "MlflowClient",
        run_id: str,
        experiment_id: str,
        spool: Spool,
        highest: dict[str, int],
        warn: Callable[[str], None],
    ) -> None:
        self.run_id, self.experiment_id = run_id, experiment_id
        self._client, self._spool, self._highest, self._warn = client, spool, highest, warn
        self._waiting: list[tuple[int, say.Event]] = []
        self._away = False
        self._closed = threading.Event()
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def handle(self, event: say.Event) -> None:
        """Never waits and never fails for the server's sake."""
        self._spool.append(json.dumps({"ms": int(time.time() * 1000), "line": say.encode(event)}))

    def close(self, status: str = "FINISHED") -> bool:
        """Brings the rest, ends the MLflow run as FINISHED, FAILED or KILLED; whether the server has everything.

        Where the server is away, it gives up after CLOSE_S; the spool stays, and the next start brings it.
        """
        self._deadline = time.monotonic() + CLOSE_S
        self._closed.set()
        self._thread.join()
        delivered = not self._waiting
        if delivered:
            delivered = self._tried(lambda: self._client.set_terminated(self.run_id, status))
        if not delivered:
            self._warn(f"MLflow does not answer; what it has not got is kept in {self._spool.path}")
        self._spool.close(delivered)
        return delivered

    def _run(self) -> None:
        pause = RETRY_S[0]
        while True:
            closing = self._closed.wait(FLUSH_S)
            for line in self._spool.take():
                entry = json.loads(line) if line.startswith('{"ms"') and line.endswith("}") else None
                if entry is not None:
                    self._waiting.append((entry["ms"], say.decode(entry["line"])))
            if self._tried(self._deliver):
                pause = RETRY_S[0]
                if closing:
                    return
            else:
                if closing and time.monotonic() + pause > self._deadline:
                    return
                time.sleep(pause) if closing else self._closed.wait(pause)
                pause = min(2 * pause, RETRY_S[1])

    def _tried(self, call: Callable[[], object]) -> bool:
        """Whether the call went through; a server that is away is told of once."""
        from mlflow.exceptions import MlflowException

        try:
            call()
        except (MlflowException, OSError) as error:
            if not self._away:
                self._warn(f"MLflow does not answer ({first_line(error)}); the training goes on and metrics are kept")
            self._away = True
            return False
        if self._away:
            self._warn("MLflow answers again")
        self._away = False
        return True

    def _deliver(self) -> None:
        """Sends what waits, in order; what was sent no longer waits, also where a later part fails."""
        from mlflow.exceptions import MlflowException

        while self._waiting:
            ready = _run_of_metrics(self._waiting)
            try:
                if ready:
                    self._send_metrics(self._waiting[:ready])
                else:
                    self._send(*self._waiting[0])
            except MlflowException as error:
                if error.error_code not in REFUSALS:
                    raise
                self._warn(f"MLflow refused a record: {first_line(error)}")
            del self._waiting[: max(1, ready)]

    def _send_metrics(self, entries: Sequence[tuple[int, say.Event]]) -> None:
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        highest = dict(self._highest)
        for ms, event in entries:
            for key, value in getattr(event, "metrics", {}).items():
                if event.images > highest.get(key, -1):
                    metrics.append(Metric(key, value, ms, event.images))
                    highest[key] = event.images
        for start in range(0, len(metrics), 500):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 500])
        self._highest = highest

    def _send(self, ms: int, event: say.Event) -> None:
        tag = self._client.set_tag
        if isinstance(event, say.Samples):
            if event.images > self._highest.get("samples", -1):
                self._client.log_image(
                    self.run_id, grid(event.pixels), key="samples", step=event.images, synchronous=True
                )
                self._highest["samples"] = event.images
        elif isinstance(event, say.CheckpointSaved):
            tag(self.run_id, "checkpoint", event.checkpoint)
        elif isinstance(event, say.CheckpointFailed):
            tag(self.run_id, "alarm", f"checkpoint of step {event.step} not saved: {event.reason}"[:5000])
        elif isinstance(event, say.Skipped):
            tag(self.run_id, "last_skipped_step", event.reason[:5000])
        elif isinstance(event, say.Started):
            tag(self.run_id, "parameters", str(event.parameters))
            tag(self.run_id, "world_size", str(event.world_size))
            if event.checkpoint is not None:
                tag(self.run_id, "resumed_from", event.checkpoint)
        elif isinstance(event, say.Prepared):
            tag(self.run_id, "precision", event.precision)
            tag(
                self.run_id,
                "prepared",
                json.dumps({k: v for k, v in vars(event).items() if k not in ("step", "images")}),
            )
        elif isinstance(event, say.Finished):
            tag(self.run_id, "ended", event.reason)


def _run_of_metrics(entries: Sequence[tuple[int, say.Event]]) -> int:
    """How many of the first entries are metrics only: they go in one request."""
    count = 0
    for _, event in entries[:100]:
        if not isinstance(event, say.Step | say.Evaluated):
            break
        count += 1
    return count


def grid(pixels: Any) -> Any:
    """Images uint8 (n, C, H, W) as one picture, array (height, width, 3): white lines between, small ones enlarged."""
    import math

    import numpy as np

    images = pixels.numpy()
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    page = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        page[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    scale = max(1, 256 // max(page.shape[:2]))
    return page.repeat(scale, 0).repeat(scale, 1)


# --- finding it again -------------------------------------------------------------------------------------------------


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


def _stored(client: "MlflowClient", config: "RunConfig") -> str | None:
    """The MLflow run that this output belongs to, if that server still has it."""
    from mlflow.exceptions import MlflowException

    try:
        stored = json.loads(storage.read_bytes(storage.join(config.output, STORED)))
    except FileNotFoundError:
        return None
    if stored.get("uri") != without_secret(config.tracking.uri):
        return None
    try:
        run = client.get_run(stored["run_id"])
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run.info.run_id if run.info.lifecycle_stage == "active" else None


def _store(config: "RunConfig", run_id: str) -> None:
    stored = {"run_id": run_id, "uri": without_secret(config.tracking.uri)}
    storage.write_bytes(storage.join(config.output, STORED), json.dumps(stored).encode())


def _highest(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """The highest step that the server has of each key, pictures included."""
    keys = client.get_run(run_id).data.metrics
    highest = {key: max(metric.step for metric in client.get_metric_history(run_id, key)) for key in keys}
    for file in client.list_artifacts(run_id, "images"):
        parts = Path(file.path).name.replace("+", "%").split("%")  # samples%step%1024%timestamp%...
        if len(parts) > 2 and parts[1] == "step":
            highest[parts[0]] = max(highest.get(parts[0], -1), int(parts[2]))
    return highest


def _spool_path(config: "RunConfig") -> Path:
    local = storage.local_path(config.output)
    return (
        Path(tempfile.gettempdir()) / f"raydiffusion-{config.name}.spool" if local is None else local / "mlflow.spool"
    )
