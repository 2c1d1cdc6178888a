"""Pieces of sampling and scoring as Ray tasks: the same answers as in one process, on as many cores as the cluster has.

The model travels through the object store once a node, as its configuration and safetensors bytes: no task needs the
registry or the store that it came from. A piece is a pure function of the model and its own seeds, so a task that is
lost with its node is simply done again.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray
import safetensors.torch
import torch

from pipeline.cluster.session import result
from pipeline.evaluation.work import Result, Work, Worker
from pipeline.model import Model, build, config_from

TASKS_A_CPU = 2  # under way: one runs, one waits

Packed = tuple[str, bytes, bytes]  # digest, configuration as JSON, weights as safetensors


def ray_worker(model: Model, cpus: float = 1.0, gpus: float = 0.0) -> Worker:
    """Does work by tasks that ask for `cpus` and `gpus` each. Ray must be initialised."""
    packed = ray.put(_pack(model))
    task = ray.remote(_run).options(num_cpus=cpus, num_gpus=gpus, max_retries=3, name="evaluate")
    most = max(2, int(TASKS_A_CPU * ray.cluster_resources().get("CPU", 1) / max(cpus, 0.01)))

    def run(work: Sequence[Work]) -> Iterator[tuple[int, Result]]:
        left = iter(enumerate(work))
        under_way: dict[Any, int] = {}
        try:
            while True:
                for place, piece in left:
                    under_way[task.remote(packed, piece, gpus > 0)] = place
                    if len(under_way) >= most:
                        break
                if not under_way:
                    return
                ready, _ = ray.wait(list(under_way), num_returns=1)
                yield under_way.pop(ready[0]), result(ready[0])
        finally:
            for reference in under_way:
                ray.cancel(reference)

    return run


def _pack(model: Model) -> Packed:
    config = json.dumps(asdict(model.config), sort_keys=True).encode()
    state = {name: value.detach().cpu().contiguous() for name, value in model.denoiser.state_dict().items()}
    weights = safetensors.torch.save(state)
    return hashlib.sha256(config + weights).hexdigest(), config, weights


def _run(packed: Packed, piece: Work, gpu: bool) -> Result:
    return piece.run(_model(_Once(packed), "cuda" if gpu else "cpu"))


class _Once:
    """A packed model, told apart by its digest."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    def __hash__(self) -> int:
        return hash(self.packed[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once) and self.packed[0] == other.packed[0]


@functools.lru_cache(maxsize=2)
def _model(once: _Once, device: str) -> Model:
    """Built once a process, not once a piece."""
    digest, config, weights = once.packed
    built = config_from(json.loads(config))
    with torch.random.fork_rng(devices=[]):
        denoiser = build(built)
    denoiser.load_state_dict(safetensors.torch.load(weights))
    return Model(built, denoiser.to(device), digest=digest)
