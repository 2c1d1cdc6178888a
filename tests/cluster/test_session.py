"""Joining a Ray cluster."""

import time

import pytest
import ray

from pipeline.cluster.session import session
from pipeline.serving.ports import free_port


def test_an_address_where_nothing_listens_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # of another test's cluster
    address, began = f"127.0.0.1:{free_port('127.0.0.1')}", time.monotonic()
    with pytest.raises(ConnectionError, match=f"nothing listens at {address}"), session(address):
        pass
    assert time.monotonic() - began < 5
