"""Nodes that come and go under a training: it goes on with those there are, and grows back."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import assembly
from pipeline.config import RunConfig
from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.training import checkpoint
from pipeline.training import events as say
from tests.cluster import killed_training as killed
from tests.cluster.conftest import ENVIRONMENT
from tests.data.folders import write_images

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's own use of Ray Data
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own processes of a node that is killed
]

COMPARED = 20  # steps after each resize


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """A head without CPUs, and three nodes with one each."""
    from ray.cluster_utils import Cluster

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
    nodes = [made.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(3)]
    yield made, nodes
    made.shutdown()


def elastic(output: Path, data: str) -> RunConfig:
    """As many workers as there are nodes, at least two; each node holds one with its readers."""
    config = killed.run_config(output, data, 1)
    how = replace(config.cluster, workers=(2, 3), cpus_per_worker=0.9, resize_s=5.0, hang_floor_s=60.0)
    return replace(config, cluster=how, training=replace(config.training, images=10_000_000))


def test_a_lost_node_and_its_return(
    tmp_path: Path, cluster: tuple[Any, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    head, nodes = cluster
    write_images(tmp_path / "images", 100, 8, 1)
    data = shard_in_process(ShardConfig(str(tmp_path / "images"), str(tmp_path / "set"), image_size=8, channels=1))
    config = elastic(tmp_path / "run", data.url)
    starts, losses = course(config, tmp_path / "run", head, nodes)
    assert [start.world_size for start in starts] == [3, 2, 3]
    worst = 0.0
    for index, start in enumerate(starts):
        alone = _alone(config, start.step, tmp_path / f"alone-{index}")
        for step, loss in alone.items():
            worst = max(worst, abs(losses[index, step] - loss) / loss)
    with capsys.disabled():
        print(f"\nlargest relative difference of {3 * COMPARED} losses to one worker's from there: {worst:.2g}")
    assert worst <= 1e-6


def course(
    config: RunConfig, folder: Path, head: Any, nodes: list[Any]
) -> tuple[list[say.Started], dict[tuple[int, int], float]]:
    """Each start, and (start, step) -> loss. A node is killed, then one is added, then the run is stopped."""
    starts: list[say.Started] = []
    losses: dict[tuple[int, int], float] = {}
    after = [
        lambda driver: head.remove_node(nodes.pop(), allow_graceful=False),
        lambda driver: head.add_node(num_cpus=1, object_store_memory=100 << 20),
        lambda driver: driver.process.send_signal(signal.SIGINT),
    ]
    driver, told = killed.Driver(config, folder, address=head.address), 0
    try:
        while (heard := driver.next()) is not None:
            event = heard[1]
            if isinstance(event, say.Started):
                starts.append(event)
                told = 0
            elif isinstance(event, say.Step):
                losses[len(starts) - 1, event.step] = event.metrics["loss"]
                told += 1
                if told == COMPARED + 10 and len(starts) <= len(after):
                    after[len(starts) - 1](driver)
    finally:
        driver.kill()
    return starts, losses


def _alone(config: RunConfig, step: int, output: Path) -> dict[int, float]:
    """step -> loss of the next steps after a checkpoint, by one worker without Ray."""
    alone = replace(config, output=str(output))
    if step:
        store = assembly.checkpoints(config)
        shutil.copytree(checkpoint.folder(store, step), checkpoint.folder(assembly.checkpoints(alone), step))
    found: dict[int, float] = {}
    for event in assembly.train_here(alone, lambda: len(found) >= COMPARED):
        if isinstance(event, say.Step) and len(found) < COMPARED:
            found[event.step] = event.metrics["loss"]
    return found
