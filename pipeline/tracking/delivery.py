"""From a training's events to its MLflow run: a spool that takes them at once, and threads that carry them over.

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


Entry = tuple[int, say.Event]  # milliseconds since 1970, and what was told then


class _Courier:
    """One kind of delivery, in a thread of its own: what holds it up holds up no other.

    take: fetches what is new into the couriers' `waiting`. deliver: sends what waits, in order, and removes it; it is
    told whether this is the first time, or the first after a failure. blame: whether a failure is this kind's own.
    """

    def __init__(
        self,
        name: str,
        keeps: str,
        take: Callable[[], None],
        deliver: Callable[["_Courier"], None],
        blame: Callable[[], bool],
        warn: Callable[[str], None],
    ) -> None:
        self.name, self.waiting, self.fresh, self.deadline = name, list[Entry](), True, 0.0
        self.closed = threading.Event()
        self._keeps, self._take, self._deliver, self._blame, self._warn = keeps, take, deliver, blame, warn
        self._told = False
        self.thread = threading.Thread(target=self._run, name=f"tracking {keeps}", daemon=True)

    def tried(self, call: Callable[[], object]) -> bool:
        """Whether the call went through; what fails is told of once, and asked for again."""
        try:
            call()
        except Exception as error:  # stores raise what their libraries raise, and a dead thread would deliver nothing
            self.fresh = True
            if not self._told and self._blame():
                self._told = True
                meanwhile = f"the training goes on and {self._keeps} are kept"
                self._warn(f"{self.name} does not answer ({first_line(error)}); {meanwhile}")
            return False
        if self._told:
            self._warn(f"{self.name} answers again")
        self._told = False
        return True

    def _run(self) -> None:
        pause = RETRY_S[0]
        while True:
            closing = self.closed.wait(FLUSH_S)
            self._take()
            if self.tried(lambda: self._deliver(self)):
                pause = RETRY_S[0]
                if closing:
                    return
            else:
                if closing and time.monotonic() + pause > self.deadline:
                    return
                time.sleep(pause) if closing else self.closed.wait(pause)
                pause = min(2 * pause, RETRY_S[1])


class TrackedRun:
    """Takes events (`handle`) and brings them to MLflow in threads of its own, metrics and tags in one, pictures and
    files in the other; `close` when the training ended.

    attach, attach_files: called before the first delivery of their kind and again after every failure; what they raise
    is a failure too.
    """

    def __init__(
        self,
        client: "MlflowClient",
        run_id: str,
        spool: Spool,
        attach: Callable[[], None],
        attach_files: Callable[[], None],
        warn: Callable[[str], None],
    ) -> None:
        self.run_id = run_id
        self._client, self._spool, self._warn = client, spool, warn
        self._attach, self._attach_files = attach, attach_files
        self._highest: dict[str, int] = {}
        self._pictures: dict[str, int] = {}
        self._full = False
        self._taking = threading.Lock()
        self._records = _Courier("MLflow", "metrics", self._take, self._bring_records, lambda: True, warn)
        store = "MLflow's artifact store"
        self._files = _Courier(store, "pictures", self._take, self._bring_files, self._server_answers, warn)
        for courier in (self._records, self._files):
            courier.thread.start()

    def handle(self, event: say.Event) -> None:
        """Never waits and never fails, neither for the server's sake nor for that of a full disk."""
        try:
            self._spool.append(json.dumps({"ms": int(time.time() * 1000), "line": say.encode(event)}))
        except OSError as error:
            if not self._full:
                self._warn(f"{self._spool.path}: {error}; the training goes on, what it tells meanwhile is lost")
            self._full = True

    def backlog(self) -> int:
        """Records that wait for the server; those of the last moments before it was found away not among them."""
        return len(self._records.waiting) + len(self._files.waiting)

    def close(self, status: str = "FINISHED") -> bool:
        """Brings the rest, ends the MLflow run as FINISHED, FAILED or KILLED; whether the server has everything.

        Where the server is away, it gives up after CLOSE_S; the spool stays, and the next start brings it.
        """
        couriers = (self._records, self._files)
        for courier in couriers:
            courier.deadline = time.monotonic() + CLOSE_S
            courier.closed.set()
        for courier in couriers:
            courier.thread.join()
        away = [courier.name for courier in couriers if courier.waiting or courier.fresh]
        if self._records.name not in away:
            ended = self._records.tried(lambda: self._client.set_terminated(self.run_id, status))
            away += [] if ended else [self._records.name]
        if away:
            self._warn(f"{away[0]} does not answer; what it has not got is kept in {self._spool.path}")
        self._spool.close(not away)
        return not away

    def _take(self) -> None:
        """Hands what is new in the spool to those who bring it."""
        with self._taking:
            for line in self._spool.take():
                entry = _entry(line)
                if entry is None:
                    continue
                self._records.waiting.append(entry)
                if records.picture_key(entry[1]) is not None:
                    self._files.waiting.append(entry)
            if not self._records.waiting and not self._files.waiting:
                self._spool.delivered()

    def _server_answers(self) -> bool:
        """Whether the database does, where the artifacts do not."""
        try:
            self._client.get_run(self.run_id)
        except Exception:  # then the records' courier has the same to say
            return False
        return True

    def _bring_records(self, courier: _Courier) -> None:
        """Metrics and tags; what was sent no longer waits, also where a later part fails."""
        if courier.fresh:
            self._attach()
            self._highest = highest_metrics(self._client, self.run_id)
            courier.fresh = False
        while courier.waiting:
            ready = _run_of_metrics(courier.waiting)
            entries = courier.waiting[: max(1, ready)]
            self._unless_refused(self._send_metrics if ready else self._send_tags, entries)
            del courier.waiting[: len(entries)]

    def _bring_files(self, courier: _Courier) -> None:
        """The run file and pictures."""
        if courier.fresh:
            self._attach_files()
            self._pictures = highest_pictures(self._client, self.run_id)
            courier.fresh = False
        while courier.waiting:
            self._unless_refused(self._send_pictures, courier.waiting[:1])
            del courier.waiting[0]

    def _unless_refused(self, send: Callable[[Sequence[Entry]], None], entries: Sequence[Entry]) -> None:
        """A record that the server will never take is told of and left out."""
        from mlflow.exceptions import MlflowException

        try:
            send(entries)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            self._warn(f"MLflow refused a record: {first_line(error)}")

    def _send_metrics(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        fresh: list[Metric] = []
        for ms, event in entries:
            for key, value in records.metrics(event).items():
                if event.images > self._highest.get(key, -1):
                    fresh.append(Metric(key, value, ms, event.images))
                    self._highest[key] = event.images
        for start in range(0, len(fresh), BATCH):
            self._client.log_batch(self.run_id, metrics=fresh[start : start + BATCH])

    def _send_tags(self, entries: Sequence[Entry]) -> None:
        for _, event in entries:
            for tag, value in records.tags(event).items():
                self._client.set_tag(self.run_id, tag, value[:5000])

    def _send_pictures(self, entries: Sequence[Entry]) -> None:
        for ms, event in entries:
            key = records.picture_key(event)
            if key is None or event.images <= self._pictures.get(key, -1):
                continue
            pixels = records.picture(event)
            self._client.log_image(self.run_id, pixels, key=key, step=event.images, timestamp=ms, synchronous=True)
            self._client.log_image(self.run_id, pixels, artifact_file=f"latest/{key}.png")
            self._pictures[key] = event.images


def _entry(line: str) -> Entry | None:
    """(milliseconds, event) of a line of the spool; None for one that was cut off."""
    try:
        values = json.loads(line)
        return values["ms"], say.decode(values["line"])
    except (ValueError, KeyError, TypeError):
        return None


def _run_of_metrics(entries: Sequence[Entry]) -> int:
    """How many of the first entries are metrics only: they go in one request."""
    count = 0
    for _, event in entries[:100]:
        if not records.metrics(event):
            break
        count += 1
    return count


def highest_metrics(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """The highest step that the server has of each metric."""
    latest = client.get_run(run_id).data.to_proto().metrics  # pyright: ignore[reportAttributeAccessIssue]
    return {metric.key: metric.step for metric in latest}


def highest_pictures(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """The highest step that the artifact store has of each kind of pictures."""
    highest: dict[str, int] = {}
    for file in client.list_artifacts(run_id, "images"):
        parts = file.path.rpartition("/")[2].replace("+", "%").split("%")  # KEY%step%1024%timestamp%...%compressed.webp
        if len(parts) > 2 and parts[1] == "step" and parts[-1].startswith("compressed"):  # written last
            highest[parts[0]] = max(highest.get(parts[0], -1), int(parts[2]))
    return highest
