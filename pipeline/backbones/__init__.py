"""Networks (z, noise level, conditioning) -> F."""

from pipeline.backbones.table import BACKBONES, BackboneConfig, build
from pipeline.backbones.unet import UNetConfig

__all__ = ["BACKBONES", "BackboneConfig", "UNetConfig", "build"]
