"""System metrics of a node, under the keys that MLflow's page groups."""

import time

import psutil
import torch

from pipeline.tracking.machine import Machine


def test_a_node_is_told_by_its_first_process_alone() -> None:
    machine = Machine("node-1", 0, torch.device("cpu"))
    time.sleep(0.2)
    found = machine.sample()
    assert all(key.startswith("system/node-1/") for key in found)
    assert 0 <= found["system/node-1/cpu_percent"] <= 100
    assert 0 < found["system/node-1/memory_gib"] * 2**30 < psutil.virtual_memory().total
    assert 0 <= found["system/node-1/received_mib_per_s"] < 1e5
    assert not machine.due()
    assert Machine("node-1", 1, torch.device("cpu")).sample() == {}
