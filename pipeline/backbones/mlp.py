"""A residual perceptron for small vectors shaped as images (n, C, H, W): toy densities, tests against closed forms.

Only smooth operations, so that second derivatives exist (score matching with the trace).
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.layers import label_embedding, refuse_augmentation, sinusoidal_embedding
from pipeline.backbones.options import at_least, positive, settle
from pipeline.diffusion.conditioning import Conditioning
from pipeline.size import Size, sides


@dataclass(frozen=True)
class MLPConfig:
    """Every choice of the perceptron but the vector's shape and the number of classes."""

    width: Annotated[int, "features of a hidden layer"] = 128
    blocks: Annotated[int, "residual blocks of two layers each"] = 3
    level_width: Annotated[int, "features of the noise level's embedding"] = 64
    level_scale: Annotated[float, "the noise level is multiplied by this before it is embedded"] = 1.0
    zero_last: Annotated[bool, "start with the output 0"] = True

    def __post_init__(self) -> None:
        settle(self)
        at_least(self, 1, "width", "blocks")
        if self.level_width < 4 or self.level_width % 2:
            raise ValueError(f"level_width is {self.level_width}; an even number of at least 4 is needed")
        positive(self, "level_scale")


class Block(nn.Module):
    """h + linear(silu(linear(silu(layer_norm(h))) + emb))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + self.linear2(F.silu(self.linear1(F.silu(self.norm(h))) + self.modulation(emb)))


class MLP(nn.Module):
    """F = network(z, level, conditioning) on the flattened z.

    Args:
        config: the architecture.
        channels: of z.
        size: of z, pixels a side or (height, width).
        classes: number of class labels; 0: unconditional.
        out_channels: of F.
    """

    def __init__(self, config: MLPConfig, channels: int, size: Size, classes: int, out_channels: int) -> None:
        super().__init__()
        self.config, self.out_channels = config, out_channels
        self.map1, self.map2 = nn.Linear(config.level_width, config.width), nn.Linear(config.width, config.width)
        self.labels = nn.Embedding(classes, config.width) if classes else None
        pixels = math.prod(sides(size))
        self.first = nn.Linear(channels * pixels, config.width)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.blocks))
        self.last = nn.Linear(config.width, out_channels * pixels)
        if config.zero_last:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """z (n, channels, height, width), level (n,) float32, -> F (n, out_channels, height, width).

        Raises:
            ValueError: labels for a network without classes; augmentation, which it takes none of.
        """
        refuse_augmentation(conditioning)
        level = self.config.level_scale * level
        emb = sinusoidal_embedding(level, self.config.level_width, "sin_cos", "half").to(self.map1.weight.dtype)
        emb = self.map2(F.silu(self.map1(emb)))
        label = label_embedding(self.labels, conditioning)
        emb = F.silu(emb if label is None else emb + label)
        h = self.first(z.flatten(1))
        for block in self.blocks:
            h = block(h, emb)
        return self.last(F.silu(h)).view(len(z), self.out_channels, *z.shape[2:])
