"""One holder at a time: the second is refused by name, the dead is followed, a sleeper that wakes up writes nothing."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline import storage
from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.storage import lease
from pipeline.storage.lease import Held, Lost, hold
from pipeline.training import checkpoint
from pipeline.training.retention import Keep
from pipeline.training.saver import Saver
from tests.data.folders import write_images

HOLDER = """
import sys, time
from pipeline.storage import lease
lease.BEAT_S, lease.LEASE_S = 0.05, float(sys.argv[2])
with lease.hold(sys.argv[1], "the first job") as held:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            held.claim.check()
            print("may write", flush=True)
        except lease.Lost as error:
            print("lost:", error, flush=True)
"""


class Holder:
    """A process that holds a place and says, when asked, whether it may still write there."""

    def __init__(self, url: str, lease_s: float) -> None:
        command = [sys.executable, "-c", HOLDER, url, str(lease_s)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.line() == "held"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def asked(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return self.line()


@pytest.fixture
def holder() -> Iterator[Callable[[str, float], Holder]]:
    made: list[Holder] = []

    def make(url: str, lease_s: float = 60.0) -> Holder:
        made.append(Holder(url, lease_s))
        return made[-1]

    yield make
    for each in made:
        with suppress(OSError):
            each.process.kill()
        each.process.communicate()


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"{request.getfixturevalue('s3_bucket')}/run"


def as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process sees the other one's number as that of another machine."""
    monkeypatch.setattr(lease, "_machine", lambda: "another machine")


def test_the_second_is_refused_by_name_and_the_killed_is_followed_at_once(
    place: str, holder: Callable[..., Holder]
) -> None:
    first = holder(place)
    began = time.monotonic()
    with (
        pytest.raises(Held, match=rf"in use by another job: the first job, process {first.process.pid} on "),
        hold(place, "x"),
    ):
        pass
    first.process.kill()
    first.process.wait()
    assert first.process.returncode == -signal.SIGKILL
    with hold(place, "the second") as held:
        assert held.claim.number == 2
        held.claim.check()
    assert time.monotonic() - began < 10
    with hold(place, "the third") as held:
        assert held.claim.number == 3


def test_one_that_stands_still_is_followed_and_writes_nothing_when_it_wakes(
    place: str, holder: Callable[..., Holder]
) -> None:
    first = holder(place)
    assert first.asked() == "may write"
    first.process.send_signal(signal.SIGSTOP)
    while psutil.Process(first.process.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "LEASE_S", 1.0)
        time.sleep(2.1)  # a store's clock counts whole seconds
        with hold(place, "the second") as held:
            first.process.send_signal(signal.SIGCONT)
            assert first.asked().startswith(f"lost: {place} was taken over by another job (the second, process ")
            held.claim.check()
    first.process.kill()
    first.process.wait()


def test_one_elsewhere_is_given_time_for_a_sign(
    place: str, holder: Callable[..., Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another machine's process only its signs are known."""
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    first = holder(place)
    as_elsewhere(monkeypatch)
    told: list[str] = []
    with pytest.raises(Held, match="the first job"), hold(place, "x", told.append):
        pass
    assert len(told) <= 1
    monkeypatch.setattr(lease, "LEASE_S", 2.5)
    first.process.kill()
    first.process.wait()
    began = time.monotonic()
    with hold(place, "the second", told.append) as held:
        assert held.claim.number == 2
        assert time.monotonic() - began > 1, "nothing but the time says that it is dead"
    assert "was held by the first job" in told[-1]


def test_of_many_at_once_one_holds(place: str) -> None:
    holding, most, refused = threading.Semaphore(1), [0], [0]
    start = threading.Barrier(8)

    def contend() -> None:
        start.wait()
        try:
            with hold(place, "one of many"):
                assert holding.acquire(blocking=False), "two hold it"
                most[0] += 1
                time.sleep(0.3)
                holding.release()
        except Held:
            refused[0] += 1

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] >= 1
    assert most[0] + refused[0] == 8


def test_a_number_is_made_once(place: str) -> None:
    """The condition itself: eight at once, one wins, and the loser's bytes are nowhere."""
    won: list[int] = []
    claim, start = lease.Claim(place, 7), threading.Barrier(8)

    def make(number: int) -> None:
        start.wait()
        if lease._create(claim, {"token": number}):
            won.append(number)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    standing = lease._read(place, 7)
    assert standing is not None
    assert standing.body["token"] == won[0]


def test_a_copy_is_not_held_by_the_holder_of_the_original(tmp_path: Path) -> None:
    with hold(str(tmp_path / "run"), "the first"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copy2)
        with hold(str(tmp_path / "copy"), "of the copy") as held:
            assert held.claim.number == 2
        with pytest.raises(Held), hold(str(tmp_path / "run"), "x"):
            pass


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_no_checkpoint_is_committed_without_the_lease(place: str, at: int) -> None:
    """At the start, before each file, before the record: what the next holder wrote stands, and nothing else does."""
    store, tensors, asked = storage.join(place, "checkpoints"), {"model": {"w": torch.zeros(3)}}, list[int]()
    with hold(place, "the first") as first:

        def may_write() -> None:
            asked.append(1)
            if len(asked) == at:
                assert lease._create(lease.Claim(place, first.claim.number + 1), {"what": "the second"})
                checkpoint.write(store, checkpoint.State(3, tensors, {"images": 1}))
            first.claim.check()

        with pytest.raises(Lost, match="the second"):
            checkpoint.write(store, checkpoint.State(3, tensors, {"images": 2}), may_write)
        assert checkpoint.read(store, 3).facts["images"] == 1
        asked[:] = [0] * 9
        with pytest.raises(Lost, match="the second"):
            checkpoint.write(store, checkpoint.State(4, tensors, {}), may_write)
        assert checkpoint.committed(store) == [3]


def test_a_record_is_written_where_there_is_none(place: str) -> None:
    """The instant between the last look at the lease and the record: the next holder's record stays."""
    store, asked = storage.join(place, "checkpoints"), list[int]()

    def overtaken() -> None:
        asked.append(1)
        if len(asked) == 3:  # the last
            checkpoint.write(store, checkpoint.State(4, {}, {"images": 1}))

    with pytest.raises(Lost, match="was committed by another job meanwhile"):
        checkpoint.write(store, checkpoint.State(4, {}, {"images": 2}), overtaken)
    assert checkpoint.record(store, 4).images == 1


def test_a_save_that_fails_clears_nothing_of_the_next_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path / "run")
    with hold(place, "the first") as first:

        def fails(url: str, data: bytes) -> bool:
            monkeypatch.undo()
            assert lease._create(lease.Claim(place, first.claim.number + 1), {"what": "the second"})
            checkpoint.write(place, checkpoint.State(4, {}, {"images": 1}))
            raise OSError(5, "the store was away for longer than the lease lasts")

        monkeypatch.setattr(storage, "create_bytes", fails)
        saver = Saver(place, Keep(1), first.claim.check)
        saver.save(checkpoint.State(4, {}, {"images": 2}))
        (outcome,) = saver.outcomes(wait=True)
        saver.close()
    assert not outcome.committed
    assert checkpoint.record(place, 4).images == 1
    assert checkpoint.newest(place)[0] is not None


def test_two_shard_jobs_on_one_set(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 20, 8, 1)
    config: dict[str, Any] = {"image_size": 8, "channels": 1, "samples_per_shard": 10}
    work = ShardConfig(str(tmp_path / "images"), str(tmp_path / "set"), **config)
    with hold(work.url, "a shard job of another terminal"), pytest.raises(Held, match="of another terminal"):
        shard_in_process(work)
    assert shard_in_process(work).shards.num_rows
