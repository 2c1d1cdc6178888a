"""What a U-Net has where it attends to words: a transformer over its pixels, Rombach et al. 2022 (2112.10752)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.layers import normalised
from pipeline.backbones.options import at_least
from pipeline.backbones.words import CrossAttention, Prompt, in_heads

NORM_EPS = 1e-5


class TextBlock(nn.Module):
    """Self-attention, words, gated perceptron, each on its norm and added."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # features ([q, k, v], head, width of a head)
        self.proj = nn.Linear(width, width)
        self.cross = CrossAttention(width, text_width, heads, bias=False)
        self.mlp1, self.mlp2 = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)  # mlp1: ([values, gates])

    def forward(self, x: Tensor, prompt: Prompt | None) -> Tensor:
        q, k, v = (in_heads(each, self.heads) for each in self.qkv(self.norm1(x)).chunk(3, dim=2))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if prompt is not None:
            x = x + self.cross(self.norm2(x), prompt)
        h, gate = self.mlp1(self.norm3(x)).chunk(2, dim=2)
        return x + self.mlp2(h * F.gelu(gate))


class TextTransformer(nn.Module):
    """x + transformer over the pixels of norm(x) and the words; x (n, c, h, w). Without words they are left out."""

    def __init__(self, norm: nn.GroupNorm, heads: int, depth: int, text_width: int) -> None:
        super().__init__()
        width = norm.num_channels
        self.norm, self.proj_in = norm, nn.Linear(width, width)
        self.blocks = nn.ModuleList(TextBlock(width, heads, text_width) for _ in range(depth))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, prompt: Prompt | None) -> Tensor:
        h = self.proj_in(normalised(x, self.norm).flatten(2).transpose(1, 2))
        for block in self.blocks:
            h = block(h, prompt)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


def check_text_options(config: Any) -> None:
    """Raises ValueError where the options of a U-Net with text do not go together."""
    at_least(config, 0, "text_width", "pooled_width", "size_conditions")
    at_least(config, 2, "size_features")
    depths = config.text_depth
    if len(depths) not in (1, len(config.multipliers)) or min(depths, default=0) < 1:
        raise ValueError(
            f"text_depth is {depths}; whole numbers of at least 1 are needed, one, or one for each of the "
            f"{len(config.multipliers)} resolutions"
        )
    if (config.pooled_width or config.size_conditions) and not config.text_width:
        raise ValueError("pooled_width and size_conditions describe a text's image: they need text_width")
    if config.text_width and config.skip_scale != 1:
        raise ValueError(f"skip_scale is {config.skip_scale}; with text_width only 1 is possible")
