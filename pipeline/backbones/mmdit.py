"""The multimodal diffusion transformer of Stable Diffusion 3, Esser et al. 2024 (2403.03206).

Two streams of tokens, of the image and of the words, each with its own weights, meet in one attention. With `qk_norm`
and `dual_attention` it is Stable Diffusion 3.5's.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.dit import LEVEL_WIDTH
from pipeline.backbones.layers import label_embedding, refuse_augmentation, sinusoidal_embedding
from pipeline.backbones.options import at_least, positive, settle
from pipeline.backbones.pixart import positions_of
from pipeline.backbones.words import Words, check_text, in_heads
from pipeline.diffusion.conditioning import Conditioning

NORM_EPS = 1e-6
MLP_RATIO = 4


@dataclass(frozen=True)
class MMDiTConfig:
    """Every choice but image shape and number of classes. The defaults are Stable Diffusion 3 medium's."""

    width: Annotated[int, "features of a token"] = 1536
    layers: Annotated[int, "transformer blocks"] = 24
    heads: Annotated[int, "attention heads"] = 24
    patch: Annotated[int, "pixels a side of a token's patch"] = 2
    text_width: Annotated[int, "features of a text's token"] = 4096
    pooled_width: Annotated[int, "features of one vector a text"] = 2048
    max_side: Annotated[int, "tokens a side of the table of positions, of which an image takes the middle"] = 192
    qk_norm: Annotated[Literal["none", "rms"], "norm of queries and keys"] = "none"
    dual_attention: Annotated[tuple[int, ...], "layers in which the image also attends to itself alone"] = ()
    level_scale: Annotated[float, "the noise level is multiplied by this before it is embedded"] = 1.0

    def __post_init__(self) -> None:
        settle(self)
        at_least(self, 1, "layers", "heads", "patch", "text_width", "pooled_width", "max_side")
        positive(self, "level_scale")
        if self.width < 4 or self.width % 4 or self.width % self.heads:
            raise ValueError(f"width is {self.width}; a multiple of 4 and of heads = {self.heads} is needed")
        if any(not 0 <= layer < self.layers for layer in self.dual_attention):
            raise ValueError(f"dual_attention is {self.dual_attention}; layers 0..{self.layers - 1} are needed")


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class Projections(nn.Module):
    """Queries, keys and values of a stream's tokens, and its way out of the attention; `out` False: none."""

    def __init__(self, config: MMDiTConfig, out: bool = True) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.qkv = nn.Linear(width, 3 * width)  # features ([q, k, v], head, width of a head)
        self.proj = nn.Linear(width, width) if out else None
        norms = [nn.RMSNorm(width // self.heads, eps=NORM_EPS) for _ in range(2)] if config.qk_norm == "rms" else []
        self.norms = nn.ModuleList(norms)  # of queries, of keys

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (n, heads, length, width of a head)."""
        q, k, v = (in_heads(each, self.heads) for each in self.qkv(x).chunk(3, dim=2))
        return (self.norms[0](q), self.norms[1](k), v) if self.norms else (q, k, v)


class Stream(nn.Module):
    """One of the two: before and after the attention. last: the words' in the last block, of which nothing is asked."""

    def __init__(self, config: MMDiTConfig, last: bool = False, dual: bool = False) -> None:
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, (2 if last else 9 if dual else 6) * width)
        self.attention = Projections(config, out=not last)
        self.alone = Projections(config) if dual else None
        self.mlp1 = None if last else nn.Linear(width, MLP_RATIO * width)
        self.mlp2 = None if last else nn.Linear(MLP_RATIO * width, width)

    def modulations(self, emb: Tensor) -> tuple[Tensor, ...]:
        """(n, 1, width) each: shift, scale, then of all but the last gate, shift, scale, gate; three more of dual."""
        return self.modulation(emb)[:, None].chunk(self.modulation.out_features // self.modulation.in_features, dim=2)

    def opened(self, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention(normed(x) * (1 + parts[1]) + parts[0])

    def closed(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        if self.attention.proj is None or self.mlp1 is None or self.mlp2 is None:
            return x
        _, _, gate1, shift, scale, gate2, *own = parts
        y = x + gate1 * self.attention.proj(attended)
        if self.alone is not None and self.alone.proj is not None:
            q, k, v = self.alone(normed(x) * (1 + own[1]) + own[0])
            y = y + own[2] * self.alone.proj(joined(F.scaled_dot_product_attention(q, k, v)))
        h = self.mlp1(normed(y) * (1 + scale) + shift)
        return y + gate2 * self.mlp2(F.gelu(h, approximate="tanh"))


def joined(heads: Tensor) -> Tensor:
    """(n, heads, l, width) -> (n, l, heads width)."""
    return heads.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """One attention over image and words together."""

    def __init__(self, config: MMDiTConfig, layer: int) -> None:
        super().__init__()
        self.image = Stream(config, dual=layer in config.dual_attention)
        self.text = Stream(config, last=layer == config.layers - 1)

    def forward(self, x: Tensor, text: Tensor, emb: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        image_parts, text_parts = self.image.modulations(emb), self.text.modulations(emb)
        image_qkv, text_qkv = self.image.opened(x, image_parts), self.text.opened(text, text_parts)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image_qkv, text_qkv, strict=True))
        out = joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        length = x.shape[1]
        x = self.image.closed(x, out[:, :length], image_parts)
        return x, self.text.closed(text, out[:, length:], text_parts)


class MMDiT(nn.Module):
    """F = network(z, level, conditioning, words).

    Args:
        config: the architecture.
        channels: of z.
        size: of z, pixels a side that it is trained at; other sizes are taken as well.
        classes: number of class labels, told beside the words; 0: none.
        out_channels: of F.

    Raises:
        ValueError: the patch does not divide the size, or the table of positions is too small for it.
    """

    def __init__(self, config: MMDiTConfig, channels: int, size: int, classes: int, out_channels: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch
        self.config, self.out_channels = config, out_channels
        self.grid(size, size)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.map1, self.map2 = nn.Linear(LEVEL_WIDTH, width), nn.Linear(width, width)
        self.pooled1, self.pooled2 = nn.Linear(config.pooled_width, width), nn.Linear(width, width)
        self.labels = nn.Embedding(classes, width) if classes else None
        self.text = nn.Linear(config.text_width, width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.linear_out = nn.Linear(width, patch * patch * out_channels)
        base = float(size // patch)
        # the table spans as much as an image of `size`; it is stored, for published ones are read, not computed
        self.register_buffer("positions", positions_of(width, config.max_side, config.max_side, (base, base), 1.0))
        initialise(self)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (rows, columns) of an image. Raises ValueError where they do not divide or are too many."""
        patch, most = self.config.patch, self.config.max_side
        if min(height, width) < patch or height % patch or width % patch:
            raise ValueError(f"image size {height}x{width} does not divide into patches of {patch}: change patch")
        if max(height, width) // patch > most:
            raise ValueError(f"image size {height}x{width} has more than max_side = {most} patches of {patch} a side")
        return height // patch, width // patch

    def positions_at(self, rows: int, columns: int) -> Tensor:
        """(rows columns, width): the middle of the table."""
        side = self.config.max_side
        top, left = (side - rows) // 2, (side - columns) // 2
        table = cast(Tensor, self.positions).view(side, side, -1)
        return table[top : top + rows, left : left + columns].flatten(0, 1)

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning, words: Words | None = None) -> Tensor:
        """z (n, channels, h, w), level (n,) float32, -> F (n, out_channels, h, w).

        Raises:
            ValueError: no words (its null is an encoded empty text), of other widths, labels without classes.
        """
        refuse_augmentation(conditioning)
        if words is None:
            raise ValueError("this network needs words: for no prompt give it the encoded empty text")
        check_text(words, self.config.text_width, self.config.pooled_width, 0)
        patch, (rows, columns) = self.config.patch, self.grid(*z.shape[2:])
        emb = self.embed(level, conditioning, cast(Tensor, words.pooled))
        x = self.patches(z).flatten(2).transpose(1, 2) + self.positions_at(rows, columns)
        text = self.text(words.states.to(self.text.weight.dtype))
        mask = None
        if words.mask is not None:
            seen = torch.ones(len(z), x.shape[1], dtype=torch.bool, device=z.device)
            mask = torch.cat((seen, words.mask), dim=1)[:, None, None, :]
        for block in self.blocks:
            x, text = block(x, text, emb, mask)
        shift, scale = self.modulation_out(emb)[:, None].chunk(2, dim=2)
        x = self.linear_out(normed(x) * (1 + scale) + shift)
        x = x.view(len(z), rows, columns, patch, patch, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(z), self.out_channels, *z.shape[2:])

    def embed(self, level: Tensor, conditioning: Conditioning, pooled: Tensor) -> Tensor:
        """(n, width) of level, label and a text's one vector, after its last silu."""
        emb = sinusoidal_embedding(self.config.level_scale * level, LEVEL_WIDTH, "cos_sin", "half")
        emb = self.map2(F.silu(self.map1(emb.to(self.map1.weight.dtype))))
        emb = emb + self.pooled2(F.silu(self.pooled1(pooled.to(emb.dtype))))
        label = label_embedding(self.labels, conditioning)
        return F.silu(emb if label is None else emb + label)


def initialise(net: MMDiT) -> None:
    """Xavier uniform, zero biases; N(0, 0.02) for embeddings; zero for every modulation and for the output."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(net.patches.weight.view(len(net.patches.weight), -1))
    nn.init.zeros_(cast(Tensor, net.patches.bias))
    for module in (net.map1, net.map2, net.pooled1, net.pooled2, net.labels):
        if module is not None:
            nn.init.normal_(module.weight, std=0.02)
    closing = [net.modulation_out, net.linear_out]
    for module in [*closing, *(m.modulation for m in net.modules() if isinstance(m, Stream))]:
        nn.init.zeros_(module.weight)
