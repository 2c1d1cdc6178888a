"""The training stream read by Ray tasks: the consumer submits its own tasks and owns their blocks, so nothing
outlives it and nothing spills.

A task is `blocks.read_block`, a pure function of its request: a block lost with its node is made again. At most
read_ahead_bytes lie in the object store a worker; a block is dropped when its last batch is handed out.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.cluster.monitoring import feed_metrics
from pipeline.cluster.session import result
from pipeline.data.reading.blocks import Block, BlockRequest, read_block
from pipeline.data.reading.stream import Stream, StreamConfig
from pipeline.data.sets.manifest import Manifest

CLOSE_TIMEOUT_S = 5.0  # a cancelled task in a blocking read ends by itself, and nobody owns its block


def reader_cpus(config: StreamConfig) -> float:
    """CPUs that one worker's reader tasks ask for at a time, beside the worker itself; what a preflight must find
    free.
    """
    return config.readers * config.reader_cpus


def ray_stream(config: StreamConfig, manifest: Manifest, logical_shards: Sequence[int], start_step: int = 0) -> Stream:
    """The stream of `stream.thread_stream`, batch for batch, read by Ray tasks. Ray must be initialised."""
    return Stream(config, manifest, logical_shards, start_step, RayReaders(config))


def _read_block(request: BlockRequest) -> Block:
    started = time.monotonic()
    block = read_block(request)
    feed_metrics().read(block, time.monotonic() - started)
    return block


class RayReaders:
    """Readers as Ray tasks outside of any placement group, `readers` of them asking for CPUs at a time."""

    def __init__(self, config: StreamConfig) -> None:
        self.task = ray.remote(_read_block).options(
            num_cpus=config.reader_cpus,
            max_retries=3,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # pyright: ignore[reportArgumentType]
            name="read_block",
        )

    def submit(self, request: BlockRequest) -> Any:
        return self.task.remote(request)

    def result(self, handle: Any) -> Block:
        return result(handle)

    def close(self, handles: Sequence[Any]) -> None:
        """Cancel, and again what goes on regardless: a task that is just starting may swallow the interrupt."""
        left = list(handles)
        end = time.monotonic() + CLOSE_TIMEOUT_S
        while left and time.monotonic() < end:
            for handle in left:
                ray.cancel(handle)
            _, left = ray.wait(left, num_returns=len(left), timeout=1.0, fetch_local=False)
