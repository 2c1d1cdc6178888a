"""System metrics of a node, under the keys that MLflow's page groups."""

import time

import psutil
import pytest
import torch

from pipeline.tracking.machine import Machine
from pipeline.training import events as say


def test_a_node_is_told_by_its_first_process_alone() -> None:
    machine = Machine("node-1", 0, torch.device("cpu"))
    time.sleep(0.2)
    found = machine.sample()
    assert all(key.startswith("system/node-1/") for key in found)
    assert 0 <= found["system/node-1/cpu_percent"] <= 100
    assert 0 < found["system/node-1/memory_gib"] * 2**30 < psutil.virtual_memory().total
    assert 0 <= found["system/node-1/received_mib_per_s"] < 1e5
    assert Machine("node-1", 1, torch.device("cpu")).sample() == {}


def test_steps_are_followed_by_a_sample_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, step = Machine("node-1", 0, torch.device("cpu")), say.Step(7, 70, {})
    assert machine.after(step) is None
    monkeypatch.setattr("pipeline.tracking.machine.EVERY_S", 0.0)
    assert machine.after(say.Event(7, 70)) is None
    sampled = machine.after(step)
    assert sampled is not None
    assert (sampled.step, sampled.images) == (7, 70)
    assert "system/node-1/memory_gib" in sampled.metrics
