"""Networks by name."""

from dataclasses import dataclass

from torch import nn

from pipeline.backbones.dit import DiT, DiTConfig
from pipeline.backbones.mlp import MLP, MLPConfig
from pipeline.backbones.mmdit import MMDiT, MMDiTConfig
from pipeline.backbones.pixart import PixArt, PixArtConfig
from pipeline.backbones.unet import UNet, UNetConfig
from pipeline.backbones.vdm import VDM, VDMConfig
from pipeline.size import Size, settled

BackboneConfig = UNetConfig | VDMConfig | DiTConfig | MLPConfig | PixArtConfig | MMDiTConfig


def build(config: BackboneConfig, channels: int, size: Size, classes: int, out_channels: int) -> nn.Module:
    """The network of a configuration, initialised as its paper has it (torch's global random stream).

    Args:
        config: one of the classes in `BACKBONES`.
        channels: of z.
        size: of z, pixels: of a side, or (height, width).
        classes: number of class labels; 0: unconditional.
        out_channels: of the output F: `channels`, or twice as many for a learned variance.

    Raises:
        ValueError: what the configuration cannot do at this size.
    """
    least = {"channels": (channels, 1), "classes": (classes, 0), "out_channels": (out_channels, 1)}
    for name, (value, smallest) in least.items():
        if type(value) is not int or value < smallest:
            raise ValueError(f"{name} is {value!r}; a whole number of at least {smallest} is needed")
    return NETWORKS[type(config)](config, channels, settled(size), classes, out_channels)


@dataclass(frozen=True)
class Architecture:
    """Everything `build` needs."""

    config: BackboneConfig
    channels: int
    size: Size
    classes: int
    out_channels: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", settled(self.size))

    def build(self) -> nn.Module:
        return build(self.config, self.channels, self.size, self.classes, self.out_channels)


BACKBONES: dict[str, type[BackboneConfig]] = {"unet": UNetConfig, "vdm": VDMConfig, "dit": DiTConfig, "mlp": MLPConfig}

NETWORKS: dict[type[BackboneConfig], type[nn.Module]] = {
    UNetConfig: UNet,
    VDMConfig: VDM,
    DiTConfig: DiT,
    MLPConfig: MLP,
    PixArtConfig: PixArt,
    MMDiTConfig: MMDiT,
}
