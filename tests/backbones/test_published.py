"""Published networks: number of parameters, by configuration alone."""

import pytest
import torch
from torch import nn

from pipeline.backbones import Architecture, UNetConfig, build
from pipeline.backbones.dit import SIZES, DiTName, dit
from pipeline.backbones.published import PUBLISHED


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def meta(architecture: Architecture) -> nn.Module:
    with torch.device("meta"):
        return architecture.build()


# As printed by the papers and counted in their code.
COUNTS = {
    "ddpm_cifar10": 35_746_307,
    "iddpm_cifar10": 52.5e6,
    "ddpmpp_cifar10": 55.7e6,
    "adm_imagenet64": 295.9e6,
    "vdm_cifar10": 30.6e6,
    "vdm_imagenet32": 122e6,
    "vdm_cifar10_augmented": 139e6,
    "dit_xl_2": 675e6,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_match_the_publication_to_its_digits(name: str) -> None:
    published, counted = COUNTS[name], parameters(meta(PUBLISHED[name]))
    digits = {35_746_307: 0, 52.5e6: -5, 55.7e6: -5, 295.9e6: -5, 30.6e6: -5, 122e6: -6, 139e6: -6, 675e6: -6}[
        published
    ]
    assert round(counted, digits) == published, counted


@pytest.mark.parametrize(("name", "published"), [("S", 33e6), ("B", 130e6), ("L", 458e6), ("XL", 675e6)])
def test_dit_sizes(name: DiTName, published: float) -> None:
    assert name in SIZES
    counted = parameters(meta(Architecture(dit(name), channels=4, size=32, classes=1000, out_channels=8)))
    assert counted == pytest.approx(published, rel=0.005)


def test_dit_xl_differs_from_the_published_count_by_what_it_does_not_learn() -> None:
    """DiT counts its fixed position table and a row for "no class"."""
    counted = parameters(meta(PUBLISHED["dit_xl_2"]))
    assert counted + 16 * 16 * 1152 + 1152 == 675_129_632


def test_a_small_network_for_8x8_digits() -> None:
    config = UNetConfig(base_width=32, multipliers=(1, 2), blocks=1, attention_at=())
    network = build(config, channels=1, size=8, classes=10, out_channels=1)
    assert parameters(network) < 1_000_000
