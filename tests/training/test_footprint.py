"""A model too large for the machine is refused before anything is allocated, by a count that real passes confirm."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import assembly
from pipeline.conditioner import numbered
from pipeline.diffusion.conditioning import Conditioning
from pipeline.model import ModelConfig, network_of
from pipeline.training import footprint as footprints
from pipeline.training.footprint import Footprint, check_room, footprint, free_memory
from pipeline.training.prepare import laid_out
from tests.cluster.test_train import run_config

NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"name": "unet", "base_width": 16, "multipliers": [1, 2], "blocks": 1, "attention_at": [8]},
    "dit": {"name": "dit", "width": 64, "layers": 3, "heads": 4},
    "vdm": {"name": "vdm", "width": 16, "layers": 2},
}
IMAGES = 8


def model(name: str) -> ModelConfig:
    return ModelConfig(size=16, channels=3, classes=3, network=NETWORKS[name])


def really_kept(config: ModelConfig) -> int:
    """Bytes that a real forward pass on a CPU keeps, weights aside."""
    network = laid_out(network_of(config).train(), torch.device("cpu"))
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(torch.randn(IMAGES, 3, 16, 16), torch.rand(IMAGES), Conditioning(torch.zeros(IMAGES).long()))
        assert out.requires_grad
    return sum(count for place, count in kept.items() if place not in weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_trace_counts_what_a_real_pass_keeps(name: str) -> None:
    config = model(name)
    found = footprint(lambda: network_of(config), config.image_shape, numbered("labels", config.classes), IMAGES, False)
    assert found.saved == pytest.approx(really_kept(config), rel=0.1)
    parameters = list(network_of(config).parameters())
    assert found.parameters == sum(p.numel() for p in parameters)
    assert found.state == 5 * 4 * found.parameters
    less = footprint(lambda: network_of(config), config.image_shape, numbered("labels", config.classes), IMAGES, True)
    assert less.saved < 0.7 * found.saved, "checkpointed activations are fewer"
    twice = footprint(
        lambda: network_of(config), config.image_shape, numbered("labels", config.classes), 2 * IMAGES, False
    )
    assert twice.saved == pytest.approx(2 * found.saved, rel=0.01)


def test_a_model_too_large_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """555 million weights and a batch of 4,096: 269 GB of activations. Nothing of it is allocated."""
    config = run_config(tmp_path)
    large = replace(config.model, size=16, channels=3, network={"name": "unet", "base_width": 512})
    stream = replace(config.stream, batch_size=4096, logical_shards=1)
    run = replace(config, model=large, stream=stream)
    found = assembly.needs(run)
    assert found.state > 10 * 2**30
    before = resident()
    with pytest.raises(
        ValueError, match=r"out of memory before it starts: this run needs at least \d+\.\d GiB"
    ) as told:
        assembly.has_room(run, 1)
    assert "training.checkpoint_activations" in str(told.value)
    assert resident() - before < 100 * 2**20
    assembly.has_room(config, 1)
    gpu = replace(run, cluster=replace(run.cluster, gpus_per_worker=1.0))
    assembly.has_room(gpu, 1)


def resident() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


def test_the_containers_limit_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert free_memory(tmp_path, meminfo) == 8000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path, meminfo) == 8000 * 1024
    (tmp_path / "memory.max").write_text("4000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 500000\n")
    assert free_memory(tmp_path, meminfo) == 1_500_000
    old = tmp_path / "old"
    (old / "memory").mkdir(parents=True)
    (old / "memory" / "memory.limit_in_bytes").write_text("2000000\n")
    (old / "memory" / "memory.usage_in_bytes").write_text("1500000\n")
    (old / "memory" / "memory.stat").write_text("total_inactive_file 100000\n")
    assert free_memory(old, meminfo) == 600_000
    assert free_memory() or not Path("/proc").exists()


def test_what_is_certainly_needed() -> None:
    found = Footprint(1, state=5 * 2**30, held=4 * 2**30, saved=2 * 2**30)
    check_room(found, 2, 8, False, 18 * 2**30)
    with pytest.raises(ValueError, match=r"needs at least 18\.0 GiB, this machine has 17\.0 GiB .* each of 2 workers"):
        check_room(found, 2, 8, False, 17 * 2**30)
    check_room(found, 2, 8, True, 16 * 2**30)
    check_room(found, 9, 8, False, None)
    assert footprints.STATE_COPIES == 5
