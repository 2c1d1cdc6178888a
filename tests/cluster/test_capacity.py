"""Workers and readers that a cluster can never hold are refused before they are waited for."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.capacity import bundle, check, share
from tests.cluster.test_train import run_config

NODE = {"CPU": 2.0, "memory": 1e9}


@pytest.mark.parametrize(
    ("cluster", "stream", "nodes", "fits"),
    [
        ({"workers": 2, "cpus_per_worker": 0.5}, {}, [NODE], True),
        ({"workers": 2, "cpus_per_worker": 1.0}, {}, [NODE], False),  # nothing is left for the readers
        ({"workers": 2, "cpus_per_worker": 1.0}, {"reader_cpus": 0.0}, [NODE], True),
        ({"workers": 2, "cpus_per_worker": 1.5}, {}, [NODE, NODE], True),
        ({"workers": 1, "cpus_per_worker": 3.0}, {}, [NODE, NODE], False),  # 4 CPUs, but no node has 3
        ({"workers": 1, "cpus_per_worker": 1.0, "gpus_per_worker": 1}, {}, [NODE], False),
        ({"workers": 1, "cpus_per_worker": 1.0, "gpus_per_worker": 1}, {}, [NODE, {"CPU": 4.0, "GPU": 1.0}], True),
        ({"workers": 1}, {}, [], False),
    ],
)
def test_what_the_nodes_can_hold(
    tmp_path: Path, cluster: dict[str, Any], stream: dict[str, Any], nodes: list[dict[str, float]], fits: bool
) -> None:
    config = run_config(tmp_path, cluster=cluster, stream=stream)
    if fits:
        check(config, nodes)
        return
    with pytest.raises(ValueError, match=r"the cluster cannot hold this run: \d workers? of .* CPU .*its nodes have: "):
        check(config, nodes)


def test_workers_without_work_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cluster\.workers is 3, more than stream\.logical_shards, 2"):
        share(run_config(tmp_path, cluster={"workers": 3}))
    with pytest.raises(ValueError, match=r"cluster\.workers is 3, more than"):
        share(run_config(tmp_path, cluster={"workers": [1, 3]}))


def test_what_an_autoscaler_may_add_counts(tmp_path: Path) -> None:
    config = run_config(tmp_path, cluster={"workers": 2, "cpus_per_worker": 4.0})
    check(config, [NODE], most={"CPU": 16.0})
    with pytest.raises(ValueError, match="its autoscaler may reach 4 CPU, 0 GPU"):
        check(config, [NODE], most={"CPU": 4.0})


def test_elastic_workers_hold_their_readers_and_need_the_fewest(tmp_path: Path) -> None:
    config = run_config(tmp_path, cluster={"workers": [1, 2], "cpus_per_worker": 1.75})
    assert bundle(config) == {"CPU": 2.0}
    check(config, [NODE])
    with pytest.raises(ValueError, match="cannot hold this run: 2 workers"):
        check(run_config(tmp_path, cluster={"workers": [2, 2], "cpus_per_worker": 1.75}), [NODE])
