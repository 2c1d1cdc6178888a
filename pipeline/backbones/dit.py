"""The diffusion transformer with adaLN-Zero, Peebles & Xie 2023 (2212.09748), on images or latents cut into patches."""

from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.layers import EmbeddingDenominator, label_embedding, refuse_augmentation, sinusoidal_embedding
from pipeline.backbones.options import at_least, positive, settle
from pipeline.diffusion.conditioning import Conditioning
from pipeline.size import Size, shown, sides

LEVEL_WIDTH = 256  # sinusoids of the noise level


@dataclass(frozen=True)
class DiTConfig:
    """Every choice of the transformer but the image shape and the number of classes. The defaults are DiT-S/2."""

    width: Annotated[int, "features of a token"] = 384
    layers: Annotated[int, "transformer blocks"] = 12
    heads: Annotated[int, "attention heads"] = 6
    patch: Annotated[int, "pixels a side of a token's patch"] = 2
    mlp_ratio: Annotated[int, "hidden features of a block's perceptron, in widths"] = 4
    norm_eps: Annotated[float, "added to the variance in the layer norms"] = 1e-6
    mlp_norm_eps: Annotated[float, "the same before a block's perceptron (1e-5 in diffusers' DiT)"] = 1e-6
    embedding_denominator: Annotated[
        EmbeddingDenominator, "spacing of the log frequencies (half_minus_1 in diffusers' DiT)"
    ] = "half"
    level_scale: Annotated[float, "the noise level is multiplied by this before it is embedded"] = 1.0

    def __post_init__(self) -> None:
        settle(self)
        at_least(self, 1, "layers", "heads", "patch", "mlp_ratio")
        positive(self, "norm_eps", "mlp_norm_eps", "level_scale")
        if self.width < 4 or self.width % 4 or self.width % self.heads:
            raise ValueError(f"width is {self.width}; a multiple of 4 and of heads = {self.heads} is needed")


DiTName = Literal["S", "B", "L", "XL"]
SIZES: dict[DiTName, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


def dit(name: DiTName, patch: int = 2) -> DiTConfig:
    """The published DiT-{S, B, L, XL}/{patch}."""
    width, layers, heads = SIZES[name]
    return DiTConfig(width=width, layers=layers, heads=heads, patch=patch)


def position_embedding(width: int, rows: int, columns: int) -> Tensor:
    """(rows * columns, width) float32, row by row: sines and cosines of the column, then of the row."""
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequency[None, :]
    one = torch.cat((angle.sin(), angle.cos()), dim=1)
    column, row = one[None, :columns].expand(rows, columns, -1), one[:rows, None].expand(rows, columns, -1)
    return torch.cat((column, row), dim=2).flatten(0, 1).float()


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of the tokens x (n, l, d), scaled and shifted by (n, d)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and perceptron, each with its norm's shift and scale and its own gate from the noise level."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.norm_eps, self.mlp_norm_eps = config.heads, config.norm_eps, config.mlp_norm_eps
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )  # features of qkv: ([q, k, v], head, width)
        self.mlp1, self.mlp2 = nn.Linear(width, config.mlp_ratio * width), nn.Linear(config.mlp_ratio * width, width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulated(x, shift1, scale1, self.norm_eps))
        h = self.mlp1(modulated(x, shift2, scale2, self.mlp_norm_eps))
        return x + gate2[:, None] * self.mlp2(F.gelu(h, approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width))


class DiT(nn.Module):
    """F = network(z, level, conditioning).

    Args:
        config: the architecture.
        channels: of z.
        size: of z, pixels a side or (height, width); divisible by `config.patch`.
        classes: number of class labels; 0: unconditional.
        out_channels: of F (2 * channels for a learned variance).

    Raises:
        ValueError: the patch does not divide the size.
    """

    def __init__(self, config: DiTConfig, channels: int, size: Size, classes: int, out_channels: int) -> None:
        super().__init__()
        height, across = sides(size)
        if height % config.patch or across % config.patch:
            what = size if isinstance(size, int) else f"{shown(size)} (width x height)"
            raise ValueError(f"image size {what} does not divide into patches of {config.patch}: change patch")
        width, patch = config.width, config.patch
        self.config, self.out_channels, self.grid = config, out_channels, (height // patch, across // patch)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.map1, self.map2 = nn.Linear(LEVEL_WIDTH, width), nn.Linear(width, width)
        self.labels = nn.Embedding(classes, width) if classes else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.linear_out = nn.Linear(width, patch * patch * out_channels)
        self.register_buffer("positions", position_embedding(width, *self.grid), persistent=False)
        initialise(self)

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """z (n, channels, height, width), level (n,) float32, -> F (n, out_channels, height, width).

        Raises:
            ValueError: labels for a network without classes; augmentation, which it takes none of.
        """
        refuse_augmentation(conditioning)
        config = self.config
        emb = sinusoidal_embedding(config.level_scale * level, LEVEL_WIDTH, "cos_sin", config.embedding_denominator)
        emb = self.map2(F.silu(self.map1(emb.to(self.map1.weight.dtype))))
        label = label_embedding(self.labels, conditioning)
        emb = F.silu(emb if label is None else emb + label)
        x = self.patches(z).flatten(2).transpose(1, 2) + cast(Tensor, self.positions)
        for block in self.blocks:
            x = block(x, emb)
        shift, scale = self.modulation_out(emb).chunk(2, dim=1)
        x = self.linear_out(modulated(x, shift, scale, config.norm_eps))
        x = x.view(len(z), *self.grid, config.patch, config.patch, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(z), self.out_channels, *z.shape[2:])


def initialise(net: DiT) -> None:
    """Xavier uniform, zero biases; N(0, 0.02) for the embeddings of level and label; zero for what closes a block."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(net.patches.weight.view(len(net.patches.weight), -1))
    nn.init.zeros_(cast(Tensor, net.patches.bias))
    embeddings: list[nn.Module] = [net.map1, net.map2, *([] if net.labels is None else [net.labels])]
    for module in embeddings:
        nn.init.normal_(cast(Tensor, module.weight), std=0.02)
    closing: list[nn.Linear] = [
        net.modulation_out,
        net.linear_out,
        *(cast(Block, block).modulation for block in net.blocks),
    ]
    for module in closing:
        nn.init.zeros_(module.weight)
