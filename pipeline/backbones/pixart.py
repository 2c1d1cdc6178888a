"""PixArt-alpha and -sigma, Chen et al. 2023, 2024 (2310.00426, 2403.04692): a transformer that attends to words.

DiT's blocks with one modulation for all of them (adaLN-single: each adds a learned table) and cross-attention between
attention and perceptron, without norm or gate. With classes and without text it is the class-conditional network that
the published training starts from.
"""

from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.dit import LEVEL_WIDTH
from pipeline.backbones.layers import EmbeddingDenominator, label_embedding, refuse_augmentation, sinusoidal_embedding
from pipeline.backbones.options import at_least, positive, settle
from pipeline.backbones.words import CrossAttention, Prompt, Words, check_text, in_heads, prompt_of
from pipeline.diffusion.conditioning import Conditioning
from pipeline.size import Size, sides

OUT_NORM_EPS = 1e-6
MICRO_CONDITIONS = 3  # height and width of the image in pixels, and their ratio


@dataclass(frozen=True)
class PixArtConfig:
    """Every choice but image shape and number of classes. The defaults are PixArt-sigma's XL/2 at 512 pixels."""

    width: Annotated[int, "features of a token"] = 1152
    layers: Annotated[int, "transformer blocks"] = 28
    heads: Annotated[int, "attention heads"] = 16
    patch: Annotated[int, "pixels a side of a token's patch"] = 2
    mlp_ratio: Annotated[int, "hidden features of a block's perceptron, in widths"] = 4
    text_width: Annotated[int, "features of a text's token; 0: no text"] = 4096
    position_base: Annotated[
        int, "tokens a side at which positions count 0, 1, 2, ...; 0: as many as the image has"
    ] = 0
    position_scale: Annotated[float, "positions are divided by this (0.5, 1, 2, 4 at 256, 512, 1024, 2048 px)"] = 1.0
    micro_conditions: Annotated[bool, "is told height, width and their ratio"] = False
    kv_compress: Annotated[int, "tokens a side that share a key and value in the last layers; 1: none"] = 1
    kv_compress_from: Annotated[int, "first layer with kv_compress"] = 14
    norm_eps: Annotated[float, "added to the variance in the blocks' layer norms"] = 1e-6
    embedding_denominator: Annotated[EmbeddingDenominator, "spacing of the log frequencies"] = "half"
    level_scale: Annotated[float, "the noise level is multiplied by this before it is embedded"] = 1.0

    def __post_init__(self) -> None:
        settle(self)
        at_least(self, 1, "layers", "heads", "patch", "mlp_ratio", "kv_compress")
        at_least(self, 0, "text_width", "position_base", "kv_compress_from")
        positive(self, "norm_eps", "level_scale", "position_scale")
        if self.width < 4 or self.width % 4 or self.width % self.heads:
            raise ValueError(f"width is {self.width}; a multiple of 4 and of heads = {self.heads} is needed")
        if self.micro_conditions and self.width % MICRO_CONDITIONS:
            raise ValueError(f"width is {self.width}; micro_conditions need a multiple of {MICRO_CONDITIONS}")


def positions_of(width: int, rows: int, columns: int, base: tuple[float, float], scale: float) -> Tensor:
    """(rows columns, width) float32: sines and cosines of the column, then of the row.

    Coordinates are i base / rows / scale: with base the tokens a side of an earlier training, the same picture at more
    tokens lies at the same places.
    """
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def of(count: int, base: float) -> Tensor:
        place = torch.arange(count, dtype=torch.float64) * (base / count / scale)
        angle = place[:, None] * frequency[None, :]
        return torch.cat((angle.sin(), angle.cos()), dim=1)

    column = of(columns, base[1])[None, :, :].expand(rows, -1, -1)
    row = of(rows, base[0])[:, None, :].expand(-1, columns, -1)
    return torch.cat((column, row), dim=2).flatten(0, 1).float()


class Compress(nn.Module):
    """Tokens of an image -> one for each `ratio` x `ratio` of them: a depthwise strided convolution, a layer norm."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, ratio, stride=ratio, groups=width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.norm(self.conv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2))


class Block(nn.Module):
    """Attention, words, perceptron; the first and last normed, modulated and gated by the level."""

    def __init__(self, config: PixArtConfig, compress: bool) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads, self.eps = config.heads, config.norm_eps
        self.table = nn.Parameter(torch.empty(6, width))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)  # features ([q, k, v], head, width)
        self.compress = Compress(width, config.kv_compress) if compress else None
        self.cross = CrossAttention(width, width, config.heads, bias=True) if config.text_width else None
        self.mlp1, self.mlp2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, modulation: Tensor, grid: tuple[int, int], prompt: Prompt | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table[None] + modulation).chunk(6, dim=1)
        x = x + gate1 * self.attention(self.normed(x) * (1 + scale1) + shift1, grid)
        if self.cross is not None and prompt is not None:
            x = x + self.cross(x, prompt)
        h = self.mlp1(self.normed(x) * (1 + scale2) + shift2)
        return x + gate2 * self.mlp2(F.gelu(h, approximate="tanh"))

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def attention(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        if self.compress is not None:
            k, v = self.compress(k, grid), self.compress(v, grid)
        q, k, v = (in_heads(each, self.heads) for each in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PixArt(nn.Module):
    """F = network(z, level, conditioning, words).

    Args:
        config: the architecture.
        channels: of z.
        size: of z, pixels a side or (height, width) that it is trained at; others are taken as well.
        classes: number of class labels; 0: none.
        out_channels: of F (2 * channels for a learned variance).

    Raises:
        ValueError: the patch does not divide the size, or kv_compress not the tokens a side.
    """

    def __init__(self, config: PixArtConfig, channels: int, size: Size, classes: int, out_channels: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch
        self.config, self.out_channels, self.size = config, out_channels, sides(size)
        self.grid(*self.size)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.map1, self.map2 = nn.Linear(LEVEL_WIDTH, width), nn.Linear(width, width)
        self.labels = nn.Embedding(classes, width) if classes else None
        small = width // MICRO_CONDITIONS
        self.size1, self.size2, self.ratio1, self.ratio2 = (
            (
                nn.Linear(LEVEL_WIDTH, small),
                nn.Linear(small, small),
                nn.Linear(LEVEL_WIDTH, small),
                nn.Linear(small, small),
            )
            if config.micro_conditions
            else (None,) * 4
        )
        self.modulation = nn.Linear(width, 6 * width)
        self.text1, self.text2 = (
            (nn.Linear(config.text_width, width), nn.Linear(width, width)) if config.text_width else (None, None)
        )
        compressed = [config.kv_compress > 1 and i >= config.kv_compress_from for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, compress) for compress in compressed)
        self.table_out = nn.Parameter(torch.empty(2, width))
        self.linear_out = nn.Linear(width, patch * patch * out_channels)
        self.register_buffer("positions", self.positions_at(*self.size), persistent=False)
        for place, layer in enumerate(self.cross_attentions()):
            layer.place = place
        initialise(self)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (rows, columns) of an image. Raises ValueError where they do not divide."""
        patch, ratio = self.config.patch, self.config.kv_compress
        if min(height, width) < patch * ratio or height % (patch * ratio) or width % (patch * ratio):
            raise ValueError(
                f"image size {height}x{width} does not divide into patches of {patch}, {ratio} a side sharing a key"
            )
        return height // patch, width // patch

    def positions_at(self, height: int, width: int) -> Tensor:
        rows, columns = self.grid(height, width)
        own, base = self.grid(*self.size), self.config.position_base
        bases = (float(base or own[0]), float(base or own[1]))
        return positions_of(self.config.width, rows, columns, bases, self.config.position_scale)

    def prompt(self, words: Words) -> Prompt:
        """Keys and values of all layers: give it in place of the words for as many calls as there are with them.

        Raises:
            ValueError: texts of another width, or a network without text.
        """
        if self.text1 is None or self.text2 is None:
            raise ValueError("words were given to a network without text: build it with text_width")
        check_text(words, self.config.text_width, 0, MICRO_CONDITIONS if self.config.micro_conditions else 0)
        states = self.text2(F.gelu(self.text1(words.states.to(self.text1.weight.dtype)), approximate="tanh"))
        return prompt_of(self.cross_attentions(), states, words)

    def cross_attentions(self) -> list[CrossAttention]:
        """In the order of their keys and values in a `Prompt`."""
        return [module for module in self.modules() if isinstance(module, CrossAttention)]

    def forward(
        self, z: Tensor, level: Tensor, conditioning: Conditioning, words: Words | Prompt | None = None
    ) -> Tensor:
        """z (n, channels, h, w), level (n,) float32, -> F (n, out_channels, h, w). No words: none are attended to.

        Raises:
            ValueError: labels for a network without classes, words for one without text, augmentation.
        """
        refuse_augmentation(conditioning)
        height, width = z.shape[2:]
        grid, patch = self.grid(height, width), self.config.patch
        prompt = self.prompt(words) if isinstance(words, Words) else words
        emb = self.embed(level, conditioning, None if prompt is None else prompt.sizes)
        modulation = self.modulation(F.silu(emb)).unflatten(1, (6, -1))
        own = (height, width) == self.size
        positions = cast(Tensor, self.positions) if own else self.positions_at(height, width).to(z)
        x = self.patches(z).flatten(2).transpose(1, 2) + positions
        for block in self.blocks:
            x = block(x, modulation, grid, prompt)
        shift, scale = (self.table_out[None] + emb[:, None]).chunk(2, dim=1)
        x = F.layer_norm(x, x.shape[-1:], eps=OUT_NORM_EPS) * (1 + scale) + shift
        x = self.linear_out(x).view(len(z), *grid, patch, patch, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(z), self.out_channels, height, width)

    def embed(self, level: Tensor, conditioning: Conditioning, sizes: Tensor | None) -> Tensor:
        """(n, width) of level, label and micro-conditions; no sizes say nothing."""
        config = self.config
        emb = sinusoidal_embedding(config.level_scale * level, LEVEL_WIDTH, "cos_sin", config.embedding_denominator)
        emb = self.map2(F.silu(self.map1(emb.to(self.map1.weight.dtype))))
        label = label_embedding(self.labels, conditioning)
        emb = emb if label is None else emb + label
        if sizes is None or self.size1 is None or self.size2 is None or self.ratio1 is None or self.ratio2 is None:
            return emb
        waves = sinusoidal_embedding(sizes.flatten(), LEVEL_WIDTH, "cos_sin", "half").to(emb.dtype)
        waves = waves.view(len(sizes), MICRO_CONDITIONS, -1)
        size = self.size2(F.silu(self.size1(waves[:, :2]))).flatten(1)
        ratio = self.ratio2(F.silu(self.ratio1(waves[:, 2])))
        return emb + torch.cat((size, ratio), dim=1)


def initialise(net: PixArt) -> None:
    """Xavier uniform, zero biases; N(0, 0.02) for embeddings and modulation; zero for what words and output end in."""
    width = net.config.width
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Compress):  # the mean of the tokens
            nn.init.constant_(module.conv.weight, 1 / module.conv.weight[0].numel())
            nn.init.zeros_(cast(Tensor, module.conv.bias))
        elif isinstance(module, Block):
            nn.init.normal_(module.table, std=width**-0.5)
    nn.init.normal_(net.table_out, std=width**-0.5)
    nn.init.xavier_uniform_(net.patches.weight.view(len(net.patches.weight), -1))
    nn.init.zeros_(cast(Tensor, net.patches.bias))
    small = (net.map1, net.map2, net.modulation, net.labels, net.text1, net.text2)
    small += (net.size1, net.size2, net.ratio1, net.ratio2)
    for module in small:
        if module is not None:
            nn.init.normal_(module.weight, std=0.02)
    closing = [net.linear_out, *(m.proj for m in net.modules() if isinstance(m, CrossAttention))]
    for module in closing:
        nn.init.zeros_(module.weight)
