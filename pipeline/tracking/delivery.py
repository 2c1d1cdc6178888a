"""From a training's events to its MLflow run: a spool that takes them at once, and a thread that carries them over.

An outage never stops or slows the training. Each (key, step) arrives once: at the start and after every failure the
server is asked for each key's highest step, and only later ones are sent.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.tracking import records
from pipeline.tracking.client import first_line
from pipeline.tracking.spool import Spool
from pipeline.training import events as say

if TYPE_CHECKING:
    from mlflow import MlflowClient

RETRY_S = (1.0, 30.0)
FLUSH_S = 0.5
CLOSE_S = 20.0
BATCH = 500  # metrics a request; MLflow takes 1,000
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "PERMISSION_DENIED")


class TrackedRun:
    """Takes events (`handle`) and brings them to MLflow in a thread of its own; `close` when the training ended.

    attach: called before the first delivery and again after every failure; what it raises is a failure too.
    """

    def __init__(
        self,
        client: "MlflowClient",
        run_id: str,
        spool: Spool,
        attach: Callable[[], None],
        warn: Callable[[str], None],
    ) -> None:
        self.run_id = run_id
        self._client, self._spool, self._attach, self._warn = client, spool, attach, warn
        self._highest: dict[str, int] | None = None  # None: to be asked for
        self._waiting: list[tuple[int, say.Event]] = []
        self._away = self._full = False
        self._closed = threading.Event()
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def handle(self, event: say.Event) -> None:
        """Never waits and never fails, neither for the server's sake nor for that of a full disk."""
        try:
            self._spool.append(json.dumps({"ms": int(time.time() * 1000), "line": say.encode(event)}))
        except OSError as error:
            if not self._full:
                self._warn(f"{self._spool.path}: {error}; the training goes on, what it tells meanwhile is lost")
            self._full = True

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
            self._waiting += [entry for line in self._spool.take() if (entry := _entry(line)) is not None]
            if self._tried(self._deliver):
                self._spool.delivered()
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
            self._away, self._highest = True, None
            return False
        if self._away:
            self._warn("MLflow answers again")
        self._away = False
        return True

    def _deliver(self) -> None:
        """Sends what waits, in order; what was sent no longer waits, also where a later part fails."""
        from mlflow.exceptions import MlflowException

        if self._highest is None:
            self._attach()
            self._highest = highest_steps(self._client, self.run_id)
        while self._waiting:
            ready = _run_of_metrics(self._waiting)
            try:
                if ready:
                    self._send_metrics(self._waiting[:ready], self._highest)
                else:
                    self._send(*self._waiting[0], self._highest)
            except MlflowException as error:
                if error.error_code not in REFUSALS:
                    raise
                self._warn(f"MLflow refused a record: {first_line(error)}")
            del self._waiting[: max(1, ready)]

    def _send_metrics(self, entries: Sequence[tuple[int, say.Event]], highest: dict[str, int]) -> None:
        from mlflow.entities import Metric

        fresh: list[Metric] = []
        for ms, event in entries:
            for key, value in records.metrics(event).items():
                if event.images > highest.get(key, -1):
                    fresh.append(Metric(key, value, ms, event.images))
                    highest[key] = event.images
        for start in range(0, len(fresh), BATCH):
            self._client.log_batch(self.run_id, metrics=fresh[start : start + BATCH])

    def _send(self, ms: int, event: say.Event, highest: dict[str, int]) -> None:
        key = records.picture_key(event)
        if key is not None and event.images > highest.get(key, -1):
            pixels = records.picture(event)
            self._client.log_image(self.run_id, pixels, key=key, step=event.images, timestamp=ms, synchronous=True)
            self._client.log_image(self.run_id, pixels, artifact_file=f"latest/{key}.png")
            highest[key] = event.images
        for tag, value in records.tags(event).items():
            self._client.set_tag(self.run_id, tag, value[:5000])


def _entry(line: str) -> tuple[int, say.Event] | None:
    """(milliseconds, event) of a line of the spool; None for one that was cut off."""
    try:
        values = json.loads(line)
        return values["ms"], say.decode(values["line"])
    except (ValueError, KeyError, TypeError):
        return None


def _run_of_metrics(entries: Sequence[tuple[int, say.Event]]) -> int:
    """How many of the first entries are metrics only: they go in one request."""
    count = 0
    for _, event in entries[:100]:
        if not records.metrics(event):
            break
        count += 1
    return count


def highest_steps(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """The highest step that the server has of each key, pictures included."""
    latest = client.get_run(run_id).data.to_proto().metrics  # pyright: ignore[reportAttributeAccessIssue]
    highest = {metric.key: metric.step for metric in latest}
    for file in client.list_artifacts(run_id, "images"):
        parts = file.path.rpartition("/")[2].replace("+", "%").split("%")  # KEY%step%1024%timestamp%...%compressed.webp
        if len(parts) > 2 and parts[1] == "step" and parts[-1].startswith("compressed"):  # written last
            highest[parts[0]] = max(highest.get(parts[0], -1), int(parts[2]))
    return highest
