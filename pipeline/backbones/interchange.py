"""Our U-Net and DiT from and to the layouts of diffusers' models: names move, arithmetic stays.

A model is here a configuration (`config.json`) and named tensors, as read from and written to a diffusers folder.
What the other side cannot express is refused by name. Nothing here imports diffusers.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pipeline.backbones.diffusers_dit import dit_from_diffusers, dit_to_diffusers
from pipeline.backbones.diffusers_layout import Diffusers, Weights, checked
from pipeline.backbones.diffusers_mmdit import mmdit_from_diffusers, mmdit_to_diffusers
from pipeline.backbones.diffusers_pixart import pixart_from_diffusers, pixart_to_diffusers
from pipeline.backbones.diffusers_text_unet import text_unet_from_diffusers, text_unet_to_diffusers
from pipeline.backbones.diffusers_unet import unet_from_diffusers, unet_to_diffusers
from pipeline.backbones.table import Architecture
from pipeline.backbones.unet import UNetConfig
from pipeline.choose import choose

__all__ = ["Diffusers", "Weights", "from_diffusers", "to_diffusers"]


def from_diffusers(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[Architecture, Weights]:
    """Our architecture and state dict of a diffusers model.

    Raises:
        ValueError: a class, an option or a tensor that our networks do not have, or one that is missing.
    """
    read = choose(READERS, str(config.get("_class_name")), "diffusers model class")
    return read(config, dict(weights))


def to_diffusers(architecture: Architecture, weights: Mapping[str, Tensor]) -> Diffusers:
    """The diffusers model of our architecture and state dict.

    Raises:
        ValueError: an option that diffusers does not have, or tensors that are not this architecture's.
    """
    checked(architecture, weights)
    name = type(architecture.config).__name__.removesuffix("Config")
    return choose(WRITERS, name, "network that diffusers knows")(architecture, dict(weights))


def unet_either_to_diffusers(architecture: Architecture, weights: Weights) -> Diffusers:
    text = isinstance(architecture.config, UNetConfig) and architecture.config.text_width
    return text_unet_to_diffusers(architecture, weights) if text else unet_to_diffusers(architecture, weights)


READERS: dict[str, Callable[[Mapping[str, Any], Weights], tuple[Architecture, Weights]]] = {
    "UNet2DModel": unet_from_diffusers,
    "DiTTransformer2DModel": dit_from_diffusers,
    "UNet2DConditionModel": text_unet_from_diffusers,
    "PixArtTransformer2DModel": pixart_from_diffusers,
    "SD3Transformer2DModel": mmdit_from_diffusers,
}
WRITERS: dict[str, Callable[[Architecture, Weights], Diffusers]] = {
    "UNet": unet_either_to_diffusers,
    "DiT": dit_to_diffusers,
    "PixArt": pixart_to_diffusers,
    "MMDiT": mmdit_to_diffusers,
}
