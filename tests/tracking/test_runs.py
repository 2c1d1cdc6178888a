"""A training run in MLflow: one run across restarts, every (key, step) once, and an outage costs nothing."""

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import RunConfig, from_plain
from pipeline.data.sets.manifest import Manifest
from pipeline.tracking import delivery, facts, pictures, runs, spool
from pipeline.tracking.client import connect, without_secret
from pipeline.tracking.spool import Spool
from pipeline.training import events as say
from tests.data.folders import small_set
from tests.tracking import database as shared

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of its libraries


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return small_set(tmp_path_factory.mktemp("set"), 40, held_out=0.1)


@pytest.fixture
def database() -> str:
    return shared.database()


@pytest.fixture
def config(tmp_path: Path, database: str) -> RunConfig:
    return from_plain(
        {
            "name": "small",
            "output": str(tmp_path / "run"),
            "shard": {"source": "/secret/place", "url": "x", "image_size": 8},
            "stream": {"url": "s3://bucket/x"},
            "model": {"size": 8, "channels": 1, "classes": 3},
            "tracking": {"uri": database, "experiment": "tests"},
        }
    )


def steps(*images: int) -> list[say.Event]:
    return [say.Step(n // 10, n, {"loss": 1.0 / n, "part/error": 2.0}) for n in images]


def history(run: delivery.TrackedRun, database: str, key: str = "loss") -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in connect(database).get_metric_history(run.run_id, key)]


def test_what_mlflow_holds(config: RunConfig, manifest: Manifest, database: str) -> None:
    run = runs.open_run(config, manifest)
    for event in (
        say.Started(0, 0, 5, 50, 10, 2, 1234, "fp32"),
        *steps(10, 20),
        say.Evaluated(2, 20, {"held_out/bits_per_dim": 3.5}),
        say.Samples(2, 20, torch.randint(256, (5, 1, 8, 8)).byte()),
        say.Curve(2, 20, (-5.0, 0.0, 5.0), (0.1, None), (), (0.3, 0.2)),
        say.System(2, 20, {"system/node/cpu_percent": 12.5}),
        say.Hung(2, 20, "no step", "/x/logs/hung"),
        say.CheckpointSaved(2, 20, "/x/step-000000002", 0.1, 0.2),
        say.Finished(5, 50, "budget", "/x/step-000000005"),
    ):
        run.handle(event)
    assert run.close()
    client = connect(database)
    held = client.get_run(run.run_id)
    assert held.info.status == "FINISHED"
    assert history(run, database) == [(10, 0.1), (20, 0.05)]
    assert history(run, database, "held_out/bits_per_dim") == [(20, 3.5)]
    assert history(run, database, "system/node/cpu_percent") == [(20, 12.5)]
    assert "no step; stacks: /x/logs/hung" in held.data.tags["alarm"]
    assert run.run_id in held.data.tags["mlflow.note.content"]
    latest = [file.path for file in client.list_artifacts(run.run_id, "latest")]
    assert latest == ["latest/loss_against_gamma.png", "latest/samples.png"]
    assert held.data.tags["checkpoint"] == "/x/step-000000002"
    assert held.data.tags["raydiffusion.data"] == manifest.digest
    assert held.data.params["training.images"] == str(config.training.images)
    assert held.data.params["model.size"] == "8"
    assert held.inputs is not None
    assert held.inputs.dataset_inputs[0].dataset.digest == manifest.digest[:36]
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["images", "latest", "run.yaml"]
    pictures = [file.path for file in client.list_artifacts(run.run_id, "images")]
    assert any("samples" in picture and picture.endswith(".png") for picture in pictures)


def test_nothing_private_is_told(config: RunConfig) -> None:
    told = facts.parameters(config)
    assert not any("secret" in value or "bucket" in value or "sqlite" in value for value in told.values())
    assert without_secret("https://me:pw@host:5000/x") == "https://host:5000/x"
    assert without_secret("sqlite:///a.db") == "sqlite:///a.db"


def test_a_restart_goes_on_once(config: RunConfig, manifest: Manifest, database: str) -> None:
    first = runs.open_run(config, manifest)
    for event in [*steps(10, 20, 30), say.Samples(2, 20, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))]:
        first.handle(event)
    assert first.close("KILLED")
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, images=77))
    second = runs.open_run(longer, manifest)
    assert second.run_id == first.run_id
    again = [*steps(20, 30, 40), say.Samples(2, 20, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))]
    for event in again:
        second.handle(event)
    assert second.close()
    assert [step for step, _ in history(second, database)] == [10, 20, 30, 40]
    client = connect(database)
    pngs = [f.path for f in client.list_artifacts(second.run_id, "images") if f.path.endswith(".png")]
    assert len(pngs) == 1
    assert client.get_run(second.run_id).data.tags["changed.training.images"] == "77"


def test_another_output_is_another_run(config: RunConfig, manifest: Manifest, tmp_path: Path) -> None:
    one = runs.open_run(config, manifest)
    two = runs.open_run(dataclasses.replace(config, output=str(tmp_path / "other")), manifest)
    assert one.run_id != two.run_id
    assert one.close()
    assert two.close()


def test_an_outage_costs_nothing(
    config: RunConfig, manifest: Manifest, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails in the middle, before and after it wrote; every point arrives once, at no cost."""
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(delivery, "RETRY_S", (0.05, 0.1))
    said: list[str] = []
    run = runs.open_run(config, manifest, said.append)
    real, failures = run._client.log_batch, []

    def failing(*args: object, **kwargs: object) -> None:
        if len(failures) % 2:
            real(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        if len(failures) < 6:
            failures.append(1)
            raise MlflowException("away")
        real(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(run._client, "log_batch", failing)
    slowest = 0.0
    for event in steps(*range(10, 400, 10)):
        start = time.perf_counter()
        run.handle(event)
        slowest = max(slowest, time.perf_counter() - start)
    assert run.close()
    assert len(failures) >= 4  # of both kinds; what was written is not sent again
    assert [step for step, _ in history(run, database)] == list(range(10, 400, 10))
    assert len(said) == 2
    assert "does not answer" in said[0]
    assert slowest < 0.5


def test_what_was_not_delivered_comes_at_the_next_start(
    config: RunConfig, manifest: Manifest, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(delivery, "RETRY_S", (0.05, 0.1))
    monkeypatch.setattr(delivery, "CLOSE_S", 0.5)
    said: list[str] = []
    run = runs.open_run(config, manifest, said.append)

    def away(*_args: object, **_kwargs: object) -> None:
        raise MlflowException("away")

    monkeypatch.setattr(run._client, "log_batch", away)
    for event in steps(10, 20):
        run.handle(event)
    assert not run.close()
    assert "kept in" in said[-1]
    second = runs.open_run(config, manifest)
    assert second.run_id == run.run_id
    second.handle(steps(30)[0])
    assert second.close()
    assert [step for step, _ in history(second, database)] == [10, 20, 30]
    assert not (Path(config.output) / "mlflow.spool").exists()


def test_spool_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    path.write_bytes(b'one\n{"ms": 1, "li')
    spool = Spool(path)
    spool.append("two")
    assert spool.take() == ["one", '{"ms": 1, "li', "two"]
    assert spool.take() == []
    spool.append("three")
    assert spool.take() == ["three"]
    spool.close(delivered=True)
    assert not path.exists()


def test_a_full_disk_loses_metrics_and_nothing_else(
    config: RunConfig, manifest: Manifest, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spool's file may grow no further for a while."""
    import resource

    said: list[str] = []
    run = runs.open_run(config, manifest, said.append)
    run.handle(steps(10)[0])
    deadline = time.monotonic() + 60
    while not history(run, database):  # the database must not meet the limit
        assert time.monotonic() < deadline
        time.sleep(0.1)
    size, limits = run._spool.path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        for event in steps(20, 30):
            run.handle(event)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.handle(steps(40)[0])
    assert run.close()
    assert len(said) == 1
    assert "the training goes on" in said[0]
    assert [step for step, _ in history(run, database)] == [10, 40]


def test_spool_starts_afresh_once_much_was_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MOST_BYTES", 10)
    held = Spool(tmp_path / "spool")
    held.append("a line of some length")
    held.delivered()  # nothing was taken yet
    assert held.take() == ["a line of some length"]
    held.append("late")
    held.delivered()  # something came since
    assert held.take() == ["late"]
    held.delivered()
    assert held.path.stat().st_size == 0
    held.append("next")
    assert held.take() == ["next"]
    held.close(delivered=False)
    again = Spool(held.path)
    assert again.take() == ["next"]
    again.close(delivered=True)


class _Server(ThreadingHTTPServer):
    """Something that answers, and is no MLflow."""


@pytest.fixture
def stranger() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500)
            self.end_headers()

        log_message: Callable[..., None] = lambda *args: None

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_places_that_cannot_be_used_are_one_line(stranger: str, tmp_path: Path) -> None:
    for uri, message in {
        "./mlruns": r"tracking\.uri must be a server .* got './mlruns'",
        "file:///x": r"tracking\.uri must be",
        "http://127.0.0.1:1": r"no MLflow server answers at http://127\.0\.0\.1:1: .*refused",
        stranger: r"no MLflow server answers at .*500",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            connect(uri)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (5, 3), (64, 1)])
def test_grid_holds_every_image(count: int, channels: int) -> None:
    pixels = torch.randint(256, (count, channels, 8, 8)).byte()
    page = pictures.grid(pixels)
    assert page.dtype == np.uint8
    assert page.shape[2] == channels
    columns = int(np.ceil(np.sqrt(count)))
    scale = page.shape[1] // (9 * columns - 1)
    small = page[::scale, ::scale]
    for index in range(count):
        top, left = (index // columns) * 9, (index % columns) * 9
        cell = small[top : top + 8, left : left + 8].transpose(2, 0, 1)
        assert (cell == pixels[index].numpy()).all()
    assert json.dumps(list(page.shape))


def test_a_failing_artifact_store_holds_up_no_metric(
    config: RunConfig, manifest: Manifest, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files cannot be written: what goes to the database arrives all the same, and the run ends."""
    monkeypatch.setattr(delivery, "RETRY_S", (0.05, 0.1))
    monkeypatch.setattr(delivery, "CLOSE_S", 0.5)
    said: list[str] = []
    run = runs.open_run(config, manifest, said.append)
    place = Path(str(connect(database).get_run(run.run_id).info.artifact_uri).removeprefix("file://"))
    place.parent.mkdir(parents=True, exist_ok=True)
    assert run.close("KILLED")
    shutil.rmtree(place, ignore_errors=True)
    place.write_text("where the run's files should be")
    run = runs.open_run(config, manifest, said.append)
    picture = say.Samples(1, 10, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    for event in [steps(10)[0], picture, *steps(20, 30), say.Finished(3, 30, "budget", "/x")]:
        run.handle(event)
    assert not run.close()
    held = connect(database).get_run(run.run_id)
    assert held.info.status == "FINISHED"
    assert held.data.tags["ended"] == "budget"
    assert [step for step, _ in history(run, database)] == [10, 20, 30]
    assert all("MLflow's artifact store does not answer" in line for line in said), said
    assert len(said) == 2  # once when it is met, once at the end
    place.unlink()
    again = runs.open_run(config, manifest)
    assert again.close()
    assert [step for step, _ in history(again, database)] == [10, 20, 30]
    assert any(file.path.endswith(".png") for file in connect(database).list_artifacts(again.run_id, "images"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run_id": 7}', "\x00\xff"])
def test_a_damaged_mlflow_json_is_named(config: RunConfig, manifest: Manifest, text: str) -> None:
    path = Path(config.output) / runs.STORED
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{path}.*: remove it, and") as caught:
        runs.open_run(config, manifest)
    assert "\n" not in str(caught.value)
