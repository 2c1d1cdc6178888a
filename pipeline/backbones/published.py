"""The published U-Nets, as configurations: what to pass to `build` for each, and the parameters it then has."""

import math
from dataclasses import dataclass

from pipeline.backbones.unet import UNetConfig


@dataclass(frozen=True)
class Published:
    """Arguments of `build` and the resulting number of parameters."""

    config: UNetConfig
    channels: int
    size: int
    classes: int
    out_channels: int
    parameters: int


DDPM_CIFAR10 = UNetConfig()  # the defaults are Ho et al. 2020

IDDPM_CIFAR10 = UNetConfig(
    blocks=3,
    attention_at=(16, 8),
    heads=4,
    dropout=0.3,
    modulation="scale_shift",
    down_padding=1,
    norm_eps=1e-5,
    embedding_order="cos_sin",
    embedding_denominator="half",
    init="torch",
)

DDPMPP_CIFAR10 = UNetConfig(  # EDM's "DDPM++" (its VP architecture)
    multipliers=(2, 2, 2),
    blocks=4,
    decoder_attention="last",
    dropout=0.13,
    resample="block",
    resample_projection=True,
    skip_scale=math.sqrt(0.5),
    label_at="input",
    augmentation_labels=9,
    last_gain=1e-5,
    attention_gain=math.sqrt(0.2),
)

ADM_IMAGENET64 = UNetConfig(
    base_width=192,
    multipliers=(1, 2, 3, 4),
    blocks=3,
    attention_at=(32, 16, 8),
    heads=None,
    head_width=64,
    modulation="scale_shift",
    resample="block",
    norm_eps=1e-5,
    embedding_order="cos_sin",
    embedding_denominator="half",
    init="torch",
)

PUBLISHED: dict[str, Published] = {
    "ddpm_cifar10": Published(DDPM_CIFAR10, 3, 32, 0, 3, 35_746_307),
    "iddpm_cifar10": Published(IDDPM_CIFAR10, 3, 32, 0, 6, 0),
    "ddpmpp_cifar10": Published(DDPMPP_CIFAR10, 3, 32, 0, 3, 0),
    "adm_imagenet64": Published(ADM_IMAGENET64, 3, 64, 1000, 3, 0),
}
