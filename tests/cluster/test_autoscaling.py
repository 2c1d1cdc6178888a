"""How many replicas, by owed work."""

import math

import pytest

from pipeline.cluster.autoscaling import replicas_for


@pytest.mark.parametrize("owed_s", [0.0, 0.1, 4.9, 5.0, 5.1, 62.0])
@pytest.mark.parametrize("busy", [False, True])
def test_each_replica_owes_at_most_the_target(owed_s: float, busy: bool) -> None:
    replicas = replicas_for(owed_s, 5.0, busy=busy)
    assert replicas >= busy
    assert replicas * 5.0 >= owed_s
    assert replicas == max(math.ceil(owed_s / 5.0), int(busy))
