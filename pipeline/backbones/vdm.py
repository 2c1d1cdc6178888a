"""The network of variational diffusion models, Kingma et al. 2021 (2107.00630), appendix B.1: no down-sampling.

A U-Net in its skips only: `layers` residual blocks at full resolution, a middle with attention, `layers + 1` blocks
that take the skips back. It sees Fourier features of z, so that it can tell grey levels apart where there is little
noise, and F = conv_out + z. 30.6 M parameters at width 128 and 32 layers, 122 M at width 256.
"""

import math
from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.layers import (
    Attention,
    fast_layout,
    group_norm,
    kept_scale,
    label_embedding,
    norm_silu,
    normalised,
    refuse_augmentation,
    silu_dropout,
    sinusoidal_embedding,
)
from pipeline.backbones.options import at_least, positive, probability, settle
from pipeline.diffusion.conditioning import Conditioning
from pipeline.size import Size, sides


@dataclass(frozen=True)
class VDMConfig:
    """Every choice of the VDM network but the image shape and the number of classes."""

    width: Annotated[int, "channels of every layer"] = 128
    layers: Annotated[int, "residual blocks on the way in (one more on the way out)"] = 32
    attention_everywhere: Annotated[
        bool, "self-attention after every block (the augmented CIFAR-10 model); else the middle only"
    ] = False
    fourier_exponents: Annotated[
        tuple[int, ...], "k of the input features sin and cos(2^k 2 pi z); 7: a period a grey level"
    ] = (6, 7)
    dropout: Annotated[float, "probability of dropping an activation inside a residual block, 0 to below 1"] = 0.1
    norm_groups: Annotated[int, "groups of a GroupNorm at most"] = 32
    norm_group_width: Annotated[int, "channels of a group at least"] = 4
    norm_eps: Annotated[float, "added to the variance in a GroupNorm"] = 1e-6
    level_scale: Annotated[float, "the noise level (normalised gamma) is multiplied by this before it is embedded"] = (
        1000.0
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.width < 4 or self.width % 2:
            raise ValueError(f"width is {self.width}; an even number of at least 4 is needed")
        at_least(self, 1, "layers", "norm_groups", "norm_group_width")
        positive(self, "norm_eps", "level_scale")
        probability(self, "dropout")
        check_exponents(self.fourier_exponents)

    def norm(self, width: int) -> nn.GroupNorm:
        """The GroupNorm of a layer of `width` channels. Raises ValueError where the groups do not divide it."""
        return group_norm(width, self.norm_groups, self.norm_group_width, self.norm_eps)


def check_exponents(exponents: tuple[int, ...]) -> None:
    """Raises ValueError where the frequencies of `fourier_features` would say nothing about an image."""
    if any(not -8 <= k <= 16 for k in exponents):
        raise ValueError(f"fourier_exponents is {exponents}; whole numbers from -8 to 16 are needed")


def fourier_features(z: Tensor, exponents: tuple[int, ...]) -> Tensor:
    """z (n, c, h, w) and sin, cos(2^k 2 pi z) of each channel, (n, c (1 + 2 len(exponents)), h, w)."""
    if not exponents:
        return z
    angles = [2.0**k * 2 * math.pi * z for k in exponents]
    return torch.cat([z, *(angle.sin() for angle in angles), *(angle.cos() for angle in angles)], dim=1)


class Block(nn.Module):
    """Residual block: norm, silu, conv, noise level added, norm, silu, dropout, conv; then attention if asked for."""

    def __init__(self, config: VDMConfig, c_in: int, attention: bool) -> None:
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.norm1 = config.norm(c_in)
        self.conv1 = nn.Conv2d(c_in, width, 3, padding=1)
        self.modulation = nn.Linear(4 * width, width, bias=False)
        self.norm2 = config.norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(c_in, width, 1) if c_in != width else None
        self.attention = Attention(config.norm(width), heads=1) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(norm_silu(x, self.norm1)).add_(self.modulation(emb)[:, :, None, None])
        h = silu_dropout(normalised(h, self.norm2), self.dropout, self.training)
        h = F.conv2d(h, kept_scale(self.conv2.weight, self.dropout, self.training), self.conv2.bias, padding=1)
        h = h.add_(x if self.skip is None else self.skip(x))
        return h if self.attention is None else self.attention(h)


class VDM(nn.Module):
    """F = network(z, level, conditioning).

    Args:
        config: the architecture.
        channels: of z.
        size: of z, pixels a side or (height, width).
        classes: number of class labels; 0: unconditional.
        out_channels: of F; the first `channels` of them are an offset to z.

    Raises:
        ValueError: widths and groups that do not divide; fewer output than input channels.
    """

    def __init__(self, config: VDMConfig, channels: int, size: Size, classes: int, out_channels: int) -> None:
        super().__init__()
        if min(sides(size)) < 1 or out_channels < channels:
            raise ValueError(
                f"size {size} or out_channels {out_channels} is too small: at least 1 and {channels} are needed"
            )
        width, everywhere = config.width, config.attention_everywhere
        self.config = config
        self.map1, self.map2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        self.labels = nn.Embedding(classes, 4 * width) if classes else None
        self.conv_in = nn.Conv2d(channels * (1 + 2 * len(config.fourier_exponents)), width, 3, padding=1)
        self.encoder = nn.ModuleList(Block(config, width, everywhere) for _ in range(config.layers))
        self.middle = nn.ModuleList([Block(config, width, True), Block(config, width, False)])
        self.decoder = nn.ModuleList(Block(config, 2 * width, everywhere) for _ in range(config.layers + 1))
        self.norm_out = config.norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        initialise(self)

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """z (n, channels, height, width), level (n,) float32: normalised gamma, -> F (n, out_channels, height, width).

        Raises:
            ValueError: labels for a network without classes; augmentation, which it takes none of.
        """
        refuse_augmentation(conditioning)
        emb = sinusoidal_embedding(self.config.level_scale * level, self.config.width, "sin_cos", "half_minus_1")
        emb = F.silu(self.map2(F.silu(self.map1(emb.to(self.map1.weight.dtype)))))
        label = label_embedding(self.labels, conditioning)
        emb = emb if label is None else emb + label
        h = fast_layout(self.conv_in(fourier_features(z, self.config.fourier_exponents)))
        skips = [h]
        for block in self.encoder:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.decoder:
            h = block(torch.cat((h, skips.pop()), dim=1), emb)
        out = self.conv_out(norm_silu(h, self.norm_out)).contiguous()
        extra = out.shape[1] - z.shape[1]
        return out + (F.pad(z, (0, 0, 0, 0, 0, extra)) if extra else z)


def initialise(net: VDM) -> None:
    """LeCun normal weights, zero biases; zero for the last layer of each block, of attention and of the network, and
    for the noise level's entry into a block. Torch's own normal for labels."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            deviation = module.weight[0].numel() ** -0.5 / 0.8796256610342398  # of a unit normal cut at 2 deviations
            nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    last: list[nn.Module] = [net.conv_out]
    for module in net.modules():
        if isinstance(module, Block):
            last += [module.conv2, module.modulation]
        if isinstance(module, Attention):
            last.append(module.proj)
    for module in last:
        nn.init.zeros_(cast(Tensor, module.weight))
