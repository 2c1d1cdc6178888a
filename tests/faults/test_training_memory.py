"""Too little memory, made real: the address space of one process is limited, and every rank says what fits."""

import json
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.conditioner import numbered
from pipeline.data.reading.stream import Batch
from pipeline.diffusion.conditioning import Conditioning
from pipeline.training import start
from pipeline.training.loop import RunError, train
from pipeline.training.step import Place
from tests.training.runs import SHARDS, SIZE, in_group, task

IMAGES = 16_384  # a logical shard; 4 MiB
COPIES = 64  # of it are kept for the backward pass: 256 MiB
ROOM = 160 << 20


class Large:
    """The same large batch for ever."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return Batch(0, 0, torch.zeros(IMAGES, 1, SIZE, SIZE, dtype=torch.uint8), None, torch.arange(IMAGES))

    def close(self) -> None:
        pass


class Wasteful(nn.Module):
    """A network of little work that keeps much."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(COPIES))

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        for weight in self.weights:
            z = torch.tanh(z) * weight
        return z


def limited(place: Place, tell: Callable[[str], Any], store: str) -> None:
    """A training whose last rank has room for ROOM bytes when it looks whether a shard fits."""
    looked = start.check_memory

    def check(*given: Any) -> None:
        if place.rank == place.world - 1:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
        try:
            looked(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    start.check_memory = check
    made = task(store, place)
    made.denoiser.network = Wasteful()
    made = replace(
        made, open_batches=lambda step: Large(), batch_size=IMAGES * SHARDS, conditioner=numbered("labels", 0)
    )
    try:
        list(train(made))
    except RunError as error:
        tell(json.dumps(str(error)))


@pytest.mark.slow
def test_the_largest_shard_that_fits_is_named(tmp_path: Path) -> None:
    one, two = (json.loads(out) for out in in_group(str(tmp_path / "a"), 2, limited, str(tmp_path / "store")))
    print(two)
    assert one == two
    says = r"logical shard of (\d+) images does not fit in this cpu's memory, (\d+) do: set (\S+) to (\d+)"
    found = re.search(says, two)
    assert found is not None
    assert int(found[1]) == IMAGES
    assert IMAGES // 8 < int(found[2]) < IMAGES
    assert found[3] == "stream.logical_shards"
    assert IMAGES * SHARDS / int(found[4]) <= int(found[2])
