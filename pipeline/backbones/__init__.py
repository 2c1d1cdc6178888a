"""Networks (z, noise level, conditioning) -> F."""

from pipeline.backbones.dit import DiTConfig
from pipeline.backbones.mlp import MLPConfig
from pipeline.backbones.table import BACKBONES, Architecture, BackboneConfig, build
from pipeline.backbones.unet import UNetConfig
from pipeline.backbones.vdm import VDMConfig

__all__ = [
    "BACKBONES",
    "Architecture",
    "BackboneConfig",
    "DiTConfig",
    "MLPConfig",
    "UNetConfig",
    "VDMConfig",
    "build",
]
