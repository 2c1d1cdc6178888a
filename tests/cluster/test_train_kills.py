"""Killed or stopped anywhere, a training ends with the same weights, bit for bit."""

import random
import statistics
from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.making.shards import ShardConfig, shard_in_process
from tests.cluster import killed_training as killed
from tests.data.folders import write_images

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # Ray's own use of Ray Data

SEED = 20261123
# workers -> harms of each run; in all 20 of one worker, 5 of all, 5 of the driver, 5 stopped; 13 with 3 workers
PLAN: dict[int, list[list[str]]] = {
    2: [
        ["worker", "stop", "worker", "all", "worker"],
        ["driver", "worker", "worker", "stop", "worker"],
        ["worker", "all", "worker", "driver", "worker", "worker"],
        ["stop", "worker", "driver", "worker", "all", "worker"],
    ],
    3: [
        ["worker", "stop", "worker", "all"],
        ["driver", "worker", "worker", "worker"],
        ["worker", "all", "stop", "driver", "worker"],
    ],
}


def test_the_plan_is_what_is_promised() -> None:
    kinds = Counter(kind for runs in PLAN.values() for harms in runs for kind in harms)
    assert kinds == {"worker": 20, "all": 5, "driver": 5, "stop": 5}
    assert sum(map(len, PLAN[3])) >= 10


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("ray_cluster")
def test_35_of_35_harms_change_no_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also: kill to next finished step against the restart of a training function that does nothing."""
    write_images(tmp_path / "images", 100, 8, 1)
    data = shard_in_process(ShardConfig(str(tmp_path / "images"), str(tmp_path / "set"), image_size=8, channels=1))
    dice = random.Random(SEED)
    equal, times, bare = 0, {kind: list[float]() for kind in killed.KINDS}, list[float]()
    for workers, runs in PLAN.items():
        alone = killed.run_config(tmp_path / f"alone-{workers}", data.url, workers)
        assert killed.run(alone, tmp_path / f"alone-{workers}", [], dice).started_from == [0]
        reference = killed.digests(alone)
        assert len(reference) == killed.STEPS // killed.SAVE_EVERY
        for index, kinds in enumerate(runs):
            name = f"harmed-{workers}-{index}"
            config = killed.run_config(tmp_path / name, data.url, workers)
            steps = sorted(dice.sample(range(8, killed.STEPS - 15), len(kinds)))
            course = killed.run(config, tmp_path / name, list(zip(steps, kinds, strict=True)), dice)
            assert [harm.kind for harm in course.harms] == kinds
            assert len(course.started_from) == 1 + len(kinds)
            assert len(course.hung) == kinds.count("stop")
            found = killed.digests(config)
            assert found == reference
            equal += len(kinds)
            for harm in course.harms:
                times[harm.kind].append(harm.next_step_s)
            bare += killed.empty_restarts(config, tmp_path / f"empty-{workers}-{index}", dice)
            with capsys.disabled():
                print(f"\n{name}: seed {SEED}, at steps {steps}, {course.harms}; {equal} of 35 equal", flush=True)
    assert equal == 35
    p95 = {kind: statistics.quantiles(values, n=20)[-1] for kind, values in times.items()}
    with capsys.disabled():
        print(f"\nto the next finished step, s: {times}\nof an empty function, s: {bare}\np95 {p95}")
    allowed = statistics.quantiles(bare, n=20)[-1] + 10
    assert p95["worker"] <= allowed
    assert p95["all"] <= allowed
    assert p95["stop"] <= 3 * allowed
