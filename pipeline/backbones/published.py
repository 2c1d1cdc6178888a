"""The published networks, as arguments of `build`."""

import math
from dataclasses import replace

from pipeline.backbones.dit import dit
from pipeline.backbones.table import Architecture
from pipeline.backbones.unet import UNetConfig
from pipeline.backbones.vdm import VDMConfig

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

PUBLISHED: dict[str, Architecture] = {
    "ddpm_cifar10": Architecture(DDPM_CIFAR10, channels=3, size=32, classes=0, out_channels=3),
    "iddpm_cifar10": Architecture(IDDPM_CIFAR10, channels=3, size=32, classes=0, out_channels=6),
    "ddpmpp_cifar10": Architecture(DDPMPP_CIFAR10, channels=3, size=32, classes=0, out_channels=3),
    "adm_imagenet64": Architecture(ADM_IMAGENET64, channels=3, size=64, classes=1000, out_channels=3),
    "vdm_cifar10": Architecture(VDMConfig(), channels=3, size=32, classes=0, out_channels=3),
    "vdm_imagenet32": Architecture(VDMConfig(width=256), channels=3, size=32, classes=0, out_channels=3),
    "vdm_cifar10_augmented": Architecture(
        VDMConfig(width=256, attention_everywhere=True), channels=3, size=32, classes=0, out_channels=3
    ),
    "dit_xl_2": Architecture(dit("XL"), channels=4, size=32, classes=1000, out_channels=8),
}

# told words; what Stable Diffusion's folders say, counted on the meta device
STABLE_DIFFUSION_1 = UNetConfig(
    base_width=320,
    multipliers=(1, 2, 4, 4),
    attention_at=(64, 32, 16),
    heads=8,
    dropout=0.0,
    down_padding=1,
    norm_group_width=1,
    norm_eps=1e-5,
    embedding_order="cos_sin",
    embedding_denominator="half",
    text_width=768,
    text_projection="conv",
    init="torch",
)
STABLE_DIFFUSION_2 = replace(STABLE_DIFFUSION_1, heads=None, head_width=64, text_width=1024, text_projection="linear")
STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION_2,
    multipliers=(1, 2, 4),
    attention_at=(64, 32),
    text_width=2048,
    text_depth=(1, 2, 10),
    pooled_width=1280,
    size_conditions=6,
)
