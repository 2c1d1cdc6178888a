"""Reader tasks that misbehave; apart from the tests, so that a worker loads little to run them."""

import os
import signal
import time
from pathlib import Path

from pipeline.data.reading import blocks
from pipeline.data.reading.blocks import Block, BlockRequest


def slow(request: BlockRequest) -> Block:
    Path(request.sets[0].root, f"started-{request.first_step}-{request.logical_shard}-{os.getpid()}").touch()
    for _ in range(600):
        time.sleep(0.1)
    return blocks.read_block(request)


def deadly_once(request: BlockRequest) -> Block:
    """Kills its own process the first time it runs."""
    try:
        Path(request.sets[0].root, "died").touch(exist_ok=False)
    except FileExistsError:
        return blocks.read_block(request)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")
