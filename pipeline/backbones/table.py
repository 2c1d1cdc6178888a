"""Networks by name."""

from torch import nn

from pipeline.backbones.unet import UNet, UNetConfig

BackboneConfig = UNetConfig

BACKBONES = {"unet": UNetConfig}  # the names of a run file

NETWORKS: dict[type, type[nn.Module]] = {UNetConfig: UNet}


def build(config: BackboneConfig, channels: int, size: int, classes: int, out_channels: int) -> nn.Module:
    """The network of a configuration, initialised as its paper has it (torch's global random stream).

    Args:
        config: one of the classes in `BACKBONES`.
        channels: of z.
        size: of z, pixels a side.
        classes: number of class labels; 0: unconditional.
        out_channels: of the output F: `channels`, or twice as many for a learned variance.

    Raises:
        ValueError: what the configuration cannot do at this size.
    """
    return NETWORKS[type(config)](config, channels, size, classes, out_channels)
