"""The convolutional autoencoder of latent diffusion, Rombach et al. 2022 (2112.10752), with a Gaussian posterior.

By configuration it is diffusers' `AutoencoderKL`: Stable Diffusion's and SDXL's (f8, 4 channels), SD3's and FLUX's (f8,
16 channels, no quant convolutions). Its normalisation is part of it: everything outside sees latents of about the size
that the prior was made for, never the raw ones.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.layers import Attention, fast_layout, group_norm, norm_silu
from pipeline.backbones.options import at_least, positive, settle

NORM_EPS = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # of raw latents, as the published ones are clamped

PixelLikelihood = Literal["none", "gaussian", "logistic"]


class Posterior(NamedTuple):
    """q(z | x) = N(mean, exp(log_variance)), each (n, latent channels, h, w), of normalised latents."""

    mean: Tensor
    log_variance: Tensor

    def draw(self, eps: Tensor) -> Tensor:
        """mean + standard deviation x eps, eps ~ N(0, I)."""
        return self.mean + torch.exp(self.log_variance / 2) * eps


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Every choice of the autoencoder but the colour channels. The defaults are Stable Diffusion 1.x's."""

    widths: Annotated[tuple[int, ...], "channels of each resolution, finest first"] = (128, 256, 512, 512)
    blocks: Annotated[int, "residual blocks a resolution in the encoder (one more in the decoder)"] = 2
    latent_channels: Annotated[int, "channels of z"] = 4
    norm_groups: Annotated[int, "groups of a GroupNorm at most"] = 32
    norm_group_width: Annotated[int, "channels of a group at least"] = 1
    middle_attention: Annotated[bool, "self-attention at the coarsest resolution"] = True
    quant_conv: Annotated[bool, "a 1x1 convolution after the encoder"] = True
    post_quant_conv: Annotated[bool, "a 1x1 convolution before the decoder"] = True
    scale: Annotated[float, "latents are multiplied by this, after shift or latents_mean"] = 0.18215
    shift: Annotated[float, "is taken off the latents first"] = 0.0
    latents_mean: Annotated[tuple[float, ...], "is taken off, one a channel; empty: shift is"] = ()
    latents_std: Annotated[tuple[float, ...], "latents are divided by this, one a channel; empty: not"] = ()
    likelihood: Annotated[PixelLikelihood, "of an 8-bit pixel given z: its family, or none was fitted"] = "none"
    likelihood_scale: Annotated[
        Literal["channel", "pixel"], "the likelihood's scale: one a colour channel, or given by the decoder"
    ] = "channel"

    def __post_init__(self) -> None:
        settle(self)
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths is {self.widths}; one whole number of at least 1 a resolution is needed")
        at_least(self, 1, "blocks", "latent_channels", "norm_groups", "norm_group_width")
        positive(self, "scale")
        if bool(self.latents_mean) != bool(self.latents_std):
            raise ValueError("latents_mean and latents_std: give both, one number a channel, or neither")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers; {self.latent_channels} are needed")
        if any(not std > 0 for std in self.latents_std):
            raise ValueError(f"latents_std is {self.latents_std}; numbers above 0 are needed")
        if self.latents_mean and self.shift:
            raise ValueError(f"shift is {self.shift} and latents_mean is given: only one of them can be taken off")
        if self.likelihood == "none" and self.likelihood_scale != "channel":
            raise ValueError("likelihood_scale is pixel and likelihood is none; choose gaussian or logistic")

    @property
    def factor(self) -> int:
        """Pixels a side of the image for one of the latent."""
        return 2 ** (len(self.widths) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of z. Raises ValueError for an image that does not divide."""
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            raise ValueError(
                f"an image of {height}x{width} pixels does not divide by this codec's {self.factor}: change the size"
            )
        return self.latent_channels, height // self.factor, width // self.factor

    def affine(self) -> tuple[Tensor, Tensor]:
        """(offset, gain), float64 (latent channels, 1, 1): z = (raw - offset) gain."""
        offset = torch.tensor(self.latents_mean or (self.shift,) * self.latent_channels, dtype=torch.float64)
        std = torch.tensor(self.latents_std or (1.0,) * self.latent_channels, dtype=torch.float64)
        return offset[:, None, None], (self.scale / std)[:, None, None]

    def norm(self, width: int) -> nn.GroupNorm:
        return group_norm(width, self.norm_groups, self.norm_group_width, NORM_EPS)


STABLE_DIFFUSION = AutoencoderKLConfig()
SDXL = AutoencoderKLConfig(scale=0.13025)
SD3 = AutoencoderKLConfig(latent_channels=16, quant_conv=False, post_quant_conv=False, scale=1.5305, shift=0.0609)
TINY = AutoencoderKLConfig(
    widths=(32, 48, 64), blocks=1, norm_groups=8, middle_attention=False, scale=1.0, likelihood="logistic"
)


class Block(nn.Module):
    """norm, silu, conv, norm, silu, conv, plus the input."""

    def __init__(self, config: AutoencoderKLConfig, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = config.norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = config.norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(norm_silu(self.conv1(norm_silu(x, self.norm1)), self.norm2))
        return h + (x if self.skip is None else self.skip(x))


class Downsample(nn.Module):
    """Strided 3x3 convolution, padded on the far side only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each pixel repeated 2x2, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle_of(config: AutoencoderKLConfig) -> nn.Sequential:
    width = config.widths[-1]
    attention = [Attention(config.norm(width), heads=1)] if config.middle_attention else []
    return nn.Sequential(Block(config, width, width), *attention, Block(config, width, width))


class Encoder(nn.Module):
    """(n, channels, H, W) -> (n, 2 latent channels, h, w)."""

    def __init__(self, config: AutoencoderKLConfig, channels: int) -> None:
        super().__init__()
        width, stages = config.widths[0], list[nn.Module]()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        for i, wanted in enumerate(config.widths):
            if i > 0:
                stages.append(Downsample(width))
            for _ in range(config.blocks):
                stages.append(Block(config, width, wanted))
                width = wanted
        self.stages, self.middle = nn.Sequential(*stages), middle_of(config)
        self.norm_out = config.norm(width)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(norm_silu(self.middle(self.stages(fast_layout(self.conv_in(x)))), self.norm_out))


class Decoder(nn.Module):
    """(n, latent channels, h, w) -> (n, out channels, H, W)."""

    def __init__(self, config: AutoencoderKLConfig, out_channels: int) -> None:
        super().__init__()
        width, stages = config.widths[-1], list[nn.Module]()
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = middle_of(config)
        for i, wanted in enumerate(reversed(config.widths)):
            if i > 0:
                stages.append(Upsample(width))
            for _ in range(config.blocks + 1):
                stages.append(Block(config, width, wanted))
                width = wanted
        self.stages = nn.Sequential(*stages)
        self.norm_out = config.norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(norm_silu(self.stages(self.middle(fast_layout(self.conv_in(z)))), self.norm_out))


class AutoencoderKL(nn.Module):
    """Pixels to a posterior over normalised latents, and back.

    Args:
        config: the architecture and its normalisation.
        channels: colour channels of the image.

    Raises:
        ValueError: groups that do not divide the widths.
    """

    def __init__(self, config: AutoencoderKLConfig, channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        by_pixel = config.likelihood != "none" and config.likelihood_scale == "pixel"
        self.encoder = Encoder(config, channels)
        self.decoder = Decoder(config, 2 * channels if by_pixel else channels)
        c = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config.post_quant_conv else None
        learned = config.likelihood != "none" and not by_pixel
        # starts at a tenth of the pixels' range of 2
        self.log_scale = nn.Parameter(torch.full((channels, 1, 1), math.log(0.2))) if learned else None
        offset, gain = config.affine()
        self.register_buffer("offset", offset.float(), persistent=False)
        self.register_buffer("gain", gain.float(), persistent=False)
        self.register_buffer("log_gain", gain.log().float(), persistent=False)

    def encode(self, x: Tensor) -> Posterior:
        """x (n, channels, H, W) in [-1, 1] -> q(z | x), normalised.

        Raises:
            ValueError: a size that does not divide by `config.factor`, or other channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"pixels of shape {tuple(x.shape)} were given to a codec of {self.channels} channels")
        self.config.latent_shape(x.shape[2], x.shape[3])
        moments = self.encoder(x)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, log_variance = moments.contiguous().chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE) + 2 * cast(Tensor, self.log_gain)
        return Posterior((mean - cast(Tensor, self.offset)) * cast(Tensor, self.gain), log_variance)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised z (n, latent channels, h, w) -> pixels (n, channels, H, W), about [-1, 1], not clipped.

        Raises:
            ValueError: other channels than the latent's.
        """
        return self._decoded(z)[:, : self.channels].contiguous()

    def reconstruction(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log scale) of the pixel likelihood p(x | z), each (n, channels, H, W).

        The scale is the standard deviation of a Gaussian, or the s of a logistic, in units of pixels in [-1, 1].

        Raises:
            ValueError: this codec has no pixel likelihood: only its mean means something.
        """
        if self.config.likelihood == "none":
            raise ValueError(
                "this codec has no likelihood of pixels (likelihood: none): fit a scale on training images first"
            )
        out = self._decoded(z)
        if self.log_scale is not None:
            return out, self.log_scale.expand_as(out)
        mean, log_scale = out.chunk(2, dim=1)
        return mean, log_scale

    def _decoded(self, z: Tensor) -> Tensor:
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents of shape {tuple(z.shape)} were given to a codec of {self.config.latent_channels} channels"
            )
        raw = z / cast(Tensor, self.gain) + cast(Tensor, self.offset)
        return self.decoder(raw if self.post_quant_conv is None else self.post_quant_conv(raw))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Posterior, Tensor]:
        """The posterior, and what the decoder makes of a draw from it by eps (n, latent channels, h, w)."""
        posterior = self.encode(x)
        return posterior, self.decode(posterior.draw(eps))
