"""One U-Net that is DDPM's, IDDPM's, DDPM++ (as in EDM) or ADM's by configuration.

DDPM: Ho et al. 2020 (2006.11239). IDDPM: Nichol & Dhariwal 2021 (2102.09672). ADM: Dhariwal & Nichol 2021 (2105.05233).
DDPM++: Song et al. 2021 (2011.13456), as configured by EDM, Karras et al. 2022 (2206.00364). `published.py` has their
values. The differences that change results without changing a shape (norm epsilon, order and spacing of the sinusoids,
skip scaling, padding of the strided convolution) are fields.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.layers import (
    Attention,
    EmbeddingDenominator,
    EmbeddingOrder,
    fast_layout,
    group_norm,
    kept_scale,
    label_embedding,
    norm_silu,
    normalised,
    paired,
    silu_dropout,
    sinusoidal_embedding,
)
from pipeline.backbones.options import at_least, positive, probability, settle
from pipeline.backbones.unet_text import TextTransformer, check_text_options
from pipeline.backbones.vdm import check_exponents, fourier_features
from pipeline.backbones.words import CrossAttention, Prompt, Words, check_text, prompt_of
from pipeline.diffusion.conditioning import Conditioning
from pipeline.size import Size, shown, sides

Resize = Literal["none", "down", "up"]
TRANSFORMER_NORM_EPS = 1e-6  # of the group norm before a transformer, whatever the others have


@dataclass(frozen=True)
class UNetConfig:
    """Every choice of the U-Net but the image shape and the number of classes. The defaults are DDPM's for CIFAR-10."""

    base_width: Annotated[int, "channels at full resolution; widths are multiples of it"] = 128
    multipliers: Annotated[tuple[int, ...], "width of each resolution in base widths, finest first"] = (1, 2, 2, 2)
    blocks: Annotated[int, "residual blocks a resolution going down (one more going up)"] = 2
    attention_at: Annotated[tuple[int, ...], "pixels (shorter side) with self-attention; the middle always has it"] = (
        16,
    )
    decoder_attention: Annotated[Literal["every", "last"], "going up: after every block or the last"] = "every"
    heads: Annotated[int | None, "attention heads; null: use head_width"] = 1
    head_width: Annotated[int | None, "channels a head; null: use heads"] = None
    dropout: Annotated[float, "probability of dropping an activation inside a residual block, 0 to below 1"] = 0.1
    modulation: Annotated[Literal["shift", "scale_shift"], "noise level: added, or scaling the norm too"] = "shift"
    resample: Annotated[Literal["conv", "block"], "resize by one convolution or in a residual block"] = "conv"
    resample_projection: Annotated[bool, "resample=block: a 1x1 convolution on the block's skip path"] = False
    down_padding: Annotated[int, "resample=conv, going down: 1 pads both sides, 0 the far side only (DDPM)"] = 0
    skip_scale: Annotated[float, "factor on each residual sum (1, or sqrt(1/2) in DDPM++)"] = 1.0
    norm_groups: Annotated[int, "groups of a GroupNorm at most"] = 32
    norm_group_width: Annotated[int, "channels of a group at least"] = 4
    norm_eps: Annotated[float, "added to the variance in a GroupNorm (1e-6: DDPM, DDPM++; 1e-5: IDDPM, ADM)"] = 1e-6
    embedding: Annotated[Literal["sinusoidal", "fourier"], "of the noise level: fixed or random"] = "sinusoidal"
    embedding_order: Annotated[EmbeddingOrder, "which half comes first"] = "sin_cos"
    embedding_denominator: Annotated[EmbeddingDenominator, "sinusoidal: spacing of log frequencies"] = "half_minus_1"
    level_scale: Annotated[float, "the noise level is multiplied by this before it is embedded"] = 1.0
    fourier_scale: Annotated[float, "fourier: standard deviation of the frequencies"] = 16.0
    fourier_exponents: Annotated[
        tuple[int, ...], "k of input features sin and cos(2^k 2 pi z), as in VDM; 7: a period a grey level"
    ] = ()
    label_at: Annotated[Literal["input", "output"], "of the noise embedding's two layers: labels join here"] = "output"
    augmentation_labels: Annotated[int, "numbers that describe the augmentation of an image (EDM: 9); 0: none"] = 0
    text_width: Annotated[int, "features of a text's token, attended to wherever there is attention; 0: no text"] = 0
    text_depth: Annotated[tuple[int, ...], "transformer blocks of an attention, by resolution, or one for all"] = (1,)
    pooled_width: Annotated[int, "features of one vector a text, joining the noise embedding (SDXL: 1280)"] = 0
    size_conditions: Annotated[int, "numbers that describe the image's size and crop (SDXL: 6)"] = 0
    size_features: Annotated[int, "sinusoids of each of size_conditions"] = 256
    text_projection: Annotated[Literal["linear", "conv"], "how diffusers keeps a transformer's ends"] = "linear"
    init: Annotated[Literal["xavier", "torch"], "weights: Xavier uniform, zero biases; or torch's default"] = "xavier"
    last_gain: Annotated[float, "factor on the initial last layer of each block (0, or 1e-5 in DDPM++)"] = 0.0
    attention_gain: Annotated[float, "init=xavier: factor on the initial query, key and value weights"] = 1.0

    def __post_init__(self) -> None:
        settle(self)
        if self.base_width < 4 or self.base_width % 2:
            raise ValueError(f"base_width is {self.base_width}; an even number of at least 4 is needed")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"multipliers is {self.multipliers}; one whole number of at least 1 a resolution is needed"
            )
        if (self.heads is None) == (self.head_width is None):
            raise ValueError(f"heads is {self.heads} and head_width is {self.head_width}; give exactly one of them")
        if self.down_padding not in (0, 1):
            raise ValueError(f"down_padding is {self.down_padding}; choose 0 or 1")
        at_least(self, 1, "blocks", "heads", "head_width", "norm_groups", "norm_group_width")
        at_least(self, 0, "augmentation_labels", "last_gain", "attention_gain")
        positive(self, "skip_scale", "norm_eps", "level_scale", "fourier_scale")
        probability(self, "dropout")
        check_exponents(self.fourier_exponents)
        check_text_options(self)

    @property
    def embedding_width(self) -> int:
        """Width of the vector that modulates every block."""
        return 4 * self.base_width

    def heads_of(self, width: int) -> int:
        """Heads of an attention layer of `width` channels. Raises ValueError where they do not divide it."""
        heads = self.heads or width // cast(int, self.head_width)
        if heads < 1 or width % heads or (self.head_width and width % self.head_width):
            named = f"heads = {self.heads}" if self.heads else f"head_width = {self.head_width}"
            raise ValueError(f"{named} does not divide the {width} channels of an attention layer")
        return heads

    def norm(self, width: int) -> nn.GroupNorm:
        """The GroupNorm of a layer of `width` channels. Raises ValueError where the groups do not divide it."""
        return group_norm(width, self.norm_groups, self.norm_group_width, self.norm_eps)

    def depth(self, level: int) -> int:
        """Transformer blocks of an attention at a resolution, counted from the finest."""
        return self.text_depth[level if len(self.text_depth) > 1 else 0]

    def attention(self, width: int, level: int) -> nn.Module:
        """What an attention layer is: over the pixels, or with text a transformer over pixels and words."""
        if not self.text_width:
            return Attention(self.norm(width), self.heads_of(width), self.skip_scale)
        norm = group_norm(width, self.norm_groups, self.norm_group_width, TRANSFORMER_NORM_EPS)
        return TextTransformer(norm, self.heads_of(width), self.depth(level), self.text_width)


def resized(x: Tensor, resample: Resize) -> Tensor:
    """Mean of 2x2 pixels, or each pixel repeated 2x2."""
    if resample == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if resample == "up" else x


class Block(nn.Module):
    """norm, silu, [resize,] conv, noise level, norm, silu, dropout, conv, plus the input; then attention if asked."""

    def __init__(
        self, config: UNetConfig, c_in: int, c_out: int, attention: bool, resample: Resize = "none", level: int = 0
    ) -> None:
        super().__init__()
        self.resample: Resize = resample
        self.skip_scale, self.dropout = config.skip_scale, config.dropout
        self.scaled = config.modulation == "scale_shift"
        self.norm1 = config.norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(config.embedding_width, (2 if self.scaled else 1) * c_out)
        self.norm2 = config.norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        projected = c_in != c_out or (resample != "none" and config.resample_projection)
        self.skip = nn.Conv2d(c_in, c_out, 1) if projected else None
        self.attention = config.attention(c_out, level) if attention else None

    def forward(self, x: Tensor, emb: Tensor, prompt: Prompt | None = None) -> Tensor:
        h = self.conv1(resized(norm_silu(x, self.norm1), self.resample))
        modulation = self.modulation(emb)[:, :, None, None]
        if self.scaled:
            scale, shift = modulation.chunk(2, dim=1)
            h = torch.addcmul(shift, normalised(h, self.norm2), 1 + scale)
        else:
            h = normalised(h.add_(modulation), self.norm2)
        h = silu_dropout(h, self.dropout, self.training)
        h = F.conv2d(h, kept_scale(self.conv2.weight, self.dropout, self.training), self.conv2.bias, padding=1)
        h = h.add_(self.skipped(x))  # no backward needs a convolution's output: summing in place is safe
        h = h if self.skip_scale == 1 else h.mul_(self.skip_scale)
        if isinstance(self.attention, TextTransformer):
            return self.attention(h, prompt)
        return h if self.attention is None else self.attention(h)

    def skipped(self, x: Tensor) -> Tensor:
        # A 1x1 convolution commutes with both kinds of resizing: it runs on the smaller side.
        if self.skip is None:
            return resized(x, self.resample)
        return resized(self.skip(x), "up") if self.resample == "up" else self.skip(resized(x, self.resample))


class Downsample(nn.Module):
    """Strided 3x3 convolution."""

    def __init__(self, config: UNetConfig, width: int) -> None:
        super().__init__()
        self.padding = config.down_padding
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=config.down_padding)

    def forward(self, x: Tensor, _emb: Tensor, _prompt: Prompt | None = None) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each pixel repeated 2x2, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, _emb: Tensor, _prompt: Prompt | None = None) -> Tensor:
        return self.conv(resized(x, "up"))


class UNet(nn.Module):
    """F = network(z, level, conditioning).

    Args:
        config: the architecture.
        channels: of z.
        size: of z, pixels a side or (height, width); each divisible by 2 ** (resolutions - 1).
        classes: number of class labels; 0: unconditional.
        out_channels: of F (2 * channels for a learned variance).

    Raises:
        ValueError: sizes, widths, groups or heads that do not divide; attention at a resolution that does not occur.
    """

    def __init__(self, config: UNetConfig, channels: int, size: Size, classes: int, out_channels: int) -> None:
        super().__init__()
        resolutions = checked_resolutions(config, size)
        base, width = config.base_width, config.base_width
        self.config = config
        self.map1 = nn.Linear(base, config.embedding_width)
        self.map2 = nn.Linear(config.embedding_width, config.embedding_width)
        if config.embedding == "fourier":
            self.register_buffer("frequencies", torch.randn(base // 2) * config.fourier_scale)
        label_width = base if config.label_at == "input" else config.embedding_width
        self.labels = nn.Embedding(classes, label_width) if classes else None
        self.augmentation = (
            nn.Linear(config.augmentation_labels, base, bias=False) if config.augmentation_labels else None
        )

        described = config.pooled_width + config.size_conditions * config.size_features
        self.pooled1 = nn.Linear(described, config.embedding_width) if described else None
        self.pooled2 = nn.Linear(config.embedding_width, config.embedding_width) if described else None
        self.conv_in = nn.Conv2d(channels * (1 + 2 * len(config.fourier_exponents)), width, 3, padding=1)
        self.encoder, skips = nn.ModuleList(), [width]
        for i, (resolution, multiplier) in enumerate(zip(resolutions, config.multipliers, strict=True)):
            if i > 0:
                block = config.resample == "block"
                self.encoder.append(Block(config, width, width, False, "down") if block else Downsample(config, width))
                skips.append(width)
            for _ in range(config.blocks):
                attention = resolution in config.attention_at
                self.encoder.append(Block(config, width, base * multiplier, attention, level=i))
                width = base * multiplier
                skips.append(width)
        coarsest = len(resolutions) - 1
        self.middle = nn.ModuleList(
            [Block(config, width, width, True, level=coarsest), Block(config, width, width, False)]
        )
        self.decoder, self.takes_skip = nn.ModuleList(), list[bool]()
        for i in reversed(range(len(resolutions))):
            if i < len(resolutions) - 1:
                self.decoder.append(
                    Block(config, width, width, False, "up") if config.resample == "block" else Upsample(width)
                )
                self.takes_skip.append(False)
            for j in range(config.blocks + 1):
                attention = resolutions[i] in config.attention_at and (
                    config.decoder_attention == "every" or j == config.blocks
                )
                self.decoder.append(
                    Block(config, width + skips.pop(), base * config.multipliers[i], attention, level=i)
                )
                self.takes_skip.append(True)
                width = base * config.multipliers[i]
        self.norm_out = config.norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        for place, layer in enumerate(self.cross_attentions()):
            layer.place = place
        initialise(self, config)

    def cross_attentions(self) -> list[CrossAttention]:
        """In the order of their keys and values in a `Prompt`."""
        return [module for module in self.modules() if isinstance(module, CrossAttention)]

    def prompt(self, words: Words) -> Prompt:
        """Keys and values of all layers: give it in place of the words for as many calls as there are with them.

        Raises:
            ValueError: texts of another width, or a network without text.
        """
        config = self.config
        if not config.text_width:
            raise ValueError("words were given to a network without text: build it with text_width")
        check_text(words, config.text_width, config.pooled_width, config.size_conditions)
        return prompt_of(self.cross_attentions(), words.states.to(self.map1.weight.dtype), words)

    def forward(
        self, z: Tensor, level: Tensor, conditioning: Conditioning, words: Words | Prompt | None = None
    ) -> Tensor:
        """z (n, channels, height, width), level (n,) float32, -> F (n, out_channels, height, width).

        Raises:
            ValueError: labels for a network without classes, words for one without text.
        """
        prompt = self.prompt(words) if isinstance(words, Words) else words
        emb = self.embed(level, conditioning, prompt)
        h = fast_layout(self.conv_in(fourier_features(z, self.config.fourier_exponents)))
        skips = [h]
        for stage in self.encoder:
            h = stage(h, emb, prompt)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, emb, prompt)
        for stage, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            h = stage(torch.cat((h, skips.pop()), dim=1) if takes_skip else h, emb, prompt)
        return self.conv_out(norm_silu(h, self.norm_out)).contiguous()

    def embed(self, level: Tensor, conditioning: Conditioning, prompt: Prompt | None = None) -> Tensor:
        """The (n, 4 base) vector that modulates every block, after its last silu."""
        config = self.config
        level = config.level_scale * level
        if config.embedding == "fourier":
            angle = level.float()[:, None] * (2 * math.pi * cast(Tensor, self.frequencies))[None, :]
            emb = paired(angle, config.embedding_order)
        else:
            emb = sinusoidal_embedding(level, config.base_width, config.embedding_order, config.embedding_denominator)
        emb = emb.to(self.map1.weight.dtype)
        label = label_embedding(self.labels, conditioning)
        described = self.described(conditioning, len(level))
        emb = emb if described is None else emb + described
        if label is not None and config.label_at == "input":
            emb = emb + label
        emb = self.map2(F.silu(self.map1(emb)))
        if label is not None and config.label_at == "output":
            emb = emb + label
        told = self.told(prompt)
        return F.silu(emb if told is None else emb + told)

    def told(self, prompt: Prompt | None) -> Tensor | None:
        """What a text's one vector and the image's sizes add to the noise embedding; no words add nothing."""
        if prompt is None or self.pooled1 is None or self.pooled2 is None:
            return None
        config, parts = self.config, [] if prompt.pooled is None else [prompt.pooled]
        if prompt.sizes is not None:
            order, denominator = config.embedding_order, config.embedding_denominator
            waves = sinusoidal_embedding(prompt.sizes.flatten(), config.size_features, order, denominator)
            parts.append(waves.view(len(prompt.sizes), -1))
        joined = torch.cat([part.to(self.pooled1.weight.dtype) for part in parts], dim=1)
        return self.pooled2(F.silu(self.pooled1(joined)))

    def described(self, conditioning: Conditioning, count: int) -> Tensor | None:
        """What the first layer is told of each image's augmentation; None given is zeros: nothing was done to it.

        Raises:
            ValueError: the network takes none, or another number of them.
        """
        given, taken = conditioning.augmentation, self.config.augmentation_labels
        if given is not None and given.shape != (count, taken):
            raise ValueError(
                f"augmentation of shape {tuple(given.shape)} was given to {count} rows of a network with "
                f"augmentation_labels {taken}"
            )
        if self.augmentation is None:
            return None
        weight = self.augmentation.weight
        return self.augmentation(weight.new_zeros(count, taken) if given is None else given.to(weight.dtype))


def checked_resolutions(config: UNetConfig, size: Size) -> list[int]:
    """Pixels of the shorter side at each level, full resolution first.

    Raises:
        ValueError: config and size do not fit.
    """
    factor = 2 ** (len(config.multipliers) - 1)
    if any(side < factor or side % factor for side in sides(size)):
        what = size if isinstance(size, int) else f"{shown(size)} (width x height)"
        raise ValueError(
            f"image size {what} cannot be halved {len(config.multipliers) - 1} times: use fewer multipliers"
        )
    resolutions = [min(sides(size)) >> i for i in range(len(config.multipliers))]
    unknown = [r for r in config.attention_at if r not in resolutions]
    if unknown:
        shorter = "" if isinstance(size, int) else ", the shorter one"
        raise ValueError(
            f"attention_at names {unknown}, but this network works at {resolutions} pixels a side{shorter}"
        )
    return resolutions


def initialise(net: UNet, config: UNetConfig) -> None:
    """Xavier uniform (DDPM's variance scaling, fan average) or torch's own; the last layers times `last_gain`."""
    if config.init == "xavier":
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if net.labels is not None:  # as a one-hot vector of length sqrt(classes) through a linear layer
            nn.init.xavier_uniform_(net.labels.weight, gain=math.sqrt(net.labels.num_embeddings))
    last: list[nn.Conv2d | nn.Linear] = [net.conv_out]
    last += [m.conv2 for m in net.modules() if isinstance(m, Block)]
    for module in net.modules():
        if isinstance(module, Attention):
            last.append(module.proj)
            if config.init == "xavier":
                module.qkv.weight.data.mul_(config.attention_gain)
        if isinstance(module, TextTransformer):
            last.append(module.proj_out)
    for module in last:
        module.weight.data.mul_(config.last_gain)
        if module.bias is not None:
            module.bias.data.mul_(config.last_gain)
