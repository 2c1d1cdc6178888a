"""Joining a Ray cluster."""

import subprocess
import sys
import time

from pipeline.serving.ports import free_port
from tests.end_to_end.small_run import ROOT

JOIN = "import sys; from pipeline.cluster.session import session\nwith session(sys.argv[1]): pass"


def test_an_address_where_nothing_listens_is_said_at_once() -> None:
    address, began = f"127.0.0.1:{free_port('127.0.0.1')}", time.monotonic()
    run = subprocess.run([sys.executable, "-c", JOIN, address], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"ConnectionError: nothing listens at {address}" in run.stderr
    assert time.monotonic() - began < 30  # Ray's own wait is over a minute
