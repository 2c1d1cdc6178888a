"""MLflow's SQLite database survives its birth: starts that are killed in the making, and two first starts at once."""

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.tracking.client import connect

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of its libraries

START = (
    "import sys; from pipeline.tracking.client import connect; connect(sys.argv[1]).search_experiments(); print('ok')"
)


def start(uri: str) -> "subprocess.Popen[str]":
    """A first start of another process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", START, uri], text=True, **pipes)  # pyright: ignore[reportCallIssue, reportArgumentType]


def works(uri: str, folder: Path) -> None:
    """A run can be told, and nothing of the making is left."""
    client = connect(uri)
    name = f"works-{time.monotonic_ns()}"
    run = client.create_run(client.create_experiment(name, artifact_location=str(folder / "artifacts")))
    client.log_metric(run.info.run_id, "loss", 1.0, step=3)
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 1.0}
    assert not [path.name for path in folder.iterdir() if "building" in path.name or "making" in path.name]


def in_the_making(process: "subprocess.Popen[str]", folder: Path) -> None:
    """Waits until it has begun."""
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 20_000 for path in folder.glob(f".mlflow.db.building-{process.pid}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_in_the_making_and_two_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.db").touch()  # as somebody leaves it who opened it and wrote nothing
    killed = start(uri)
    in_the_making(killed, tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(tmp_path.glob(".mlflow.db.building-*")), "it was not killed in the making"
    assert (tmp_path / "mlflow.db").stat().st_size == 0
    other = start(uri)
    in_the_making(other, tmp_path)
    works(uri, tmp_path)
    said, complained = other.communicate(timeout=120)
    assert said == "ok\n", complained


def half_made(path: Path) -> None:
    """As a start leaves it that makes it in place and is killed."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        database.commit()


def torn(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + bytes(4000))


def foreign(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)


@pytest.mark.parametrize("spoil", [half_made, torn, foreign])
def test_a_broken_one_is_said_with_what_to_do(
    tmp_path: Path, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mlflow.db"
    spoil(path)
    monkeypatch.setattr("pipeline.tracking.database.OTHERS_S", 0.0)
    with pytest.raises(ValueError, match=rf"MLflow's database {path} is broken .*mv {path} {path}\.broken") as caught:
        connect(f"sqlite:///{path}")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_and_ten_double_starts(tmp_path: Path) -> None:
    """Kills spread over the first 10 seconds of a first start, every other one begun when the making begins (a busy
    machine is not there in 10 seconds); the start after it always works.
    """
    draw, made = random.Random(1), 0
    for number in range(20):
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        killed = start(f"sqlite:///{folder}/mlflow.db")
        if number % 2:
            in_the_making(killed, folder)
            time.sleep(3 * draw.random())
        else:
            time.sleep(10 * (number + draw.random()) / 20)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        made += bool(list(folder.glob(".mlflow.db.building-*")))
        works(f"sqlite:///{folder}/mlflow.db", folder)
    assert made, "no kill fell into the making"
    for number in range(10):
        folder = tmp_path / f"double-{number}"
        both = [start(f"sqlite:///{folder}/mlflow.db") for _ in range(2)]
        assert [process.communicate(timeout=300)[0] for process in both] == ["ok\n", "ok\n"]
        works(f"sqlite:///{folder}/mlflow.db", folder)
