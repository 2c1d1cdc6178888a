"""Our U-Net from and to the layout of diffusers' `UNet2DModel`."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.backbones.diffusers_layout import Diffusers, Weights, checked, refused, settled, skeleton, square, taken
from pipeline.backbones.table import Architecture
from pipeline.backbones.unet import UNetConfig
from pipeline.choose import choose

UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}
# block type going down -> (going up, has attention, how it resizes: None: as downsample_type says)
BLOCK_TYPES: dict[str, tuple[str, bool, str | None]] = {
    "DownBlock2D": ("UpBlock2D", False, "conv"),
    "ResnetDownsampleBlock2D": ("ResnetUpsampleBlock2D", False, "resnet"),
    "AttnDownBlock2D": ("AttnUpBlock2D", True, None),
}


def unet_names(config: UNetConfig) -> Iterator[tuple[str, str, bool]]:
    """(our module, theirs, whether it holds an attention's fused weights), without a name for what a network lacks."""
    for ours, theirs in (
        ("map1", "time_embedding.linear_1"),
        ("map2", "time_embedding.linear_2"),
        ("conv_in", "conv_in"),
    ):
        yield ours, theirs, False
    yield from (
        ("labels", "class_embedding", False),
        ("norm_out", "conv_norm_out", False),
        ("conv_out", "conv_out", False),
    )
    yield from _block_names("middle.0", "mid_block", 0)
    yield from _block_names("middle.1", "mid_block", 1)
    levels, at = len(config.multipliers), 0
    for i in range(levels):
        if i > 0:
            yield from _resizer_names(config, f"encoder.{at}", f"down_blocks.{i - 1}.downsamplers.0")
            at += 1
        for j in range(config.blocks):
            yield from _block_names(f"encoder.{at}", f"down_blocks.{i}", j)
            at += 1
    at = 0
    for i in range(levels):
        if i > 0:
            yield from _resizer_names(config, f"decoder.{at}", f"up_blocks.{i - 1}.upsamplers.0")
            at += 1
        for j in range(config.blocks + 1):
            yield from _block_names(f"decoder.{at}", f"up_blocks.{i}", j)
            at += 1


RESNET_NAMES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "modulation": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}


def _block_names(ours: str, theirs: str, index: int) -> Iterator[tuple[str, str, bool]]:
    for our_part, their_part in RESNET_NAMES.items():
        yield f"{ours}.{our_part}", f"{theirs}.resnets.{index}.{their_part}", False
    yield f"{ours}.attention.norm", f"{theirs}.attentions.{index}.group_norm", False
    yield f"{ours}.attention.proj", f"{theirs}.attentions.{index}.to_out.0", False
    yield f"{ours}.attention.qkv", f"{theirs}.attentions.{index}", True


def _resizer_names(config: UNetConfig, ours: str, theirs: str) -> Iterator[tuple[str, str, bool]]:
    if config.resample == "conv":
        yield f"{ours}.conv", f"{theirs}.conv", False
        return
    for our_part, their_part in RESNET_NAMES.items():
        yield f"{ours}.{our_part}", f"{theirs}.{their_part}", False


def unet_from_diffusers(config: Mapping[str, Any], weights: Weights) -> tuple[Architecture, Weights]:
    architecture = unet_architecture(settled(config, UNET_DEFAULTS, UNET_FIXED))
    ours: Weights = {}
    theirs = {renamed(name): value for name, value in weights.items()}
    unet = cast(UNetConfig, architecture.config)
    for our_module, their_module, attention in unet_names(unet):
        for part in ("weight", "bias"):
            if attention and f"{their_module}.to_q.{part}" in theirs:
                q, k, v = (taken(theirs, f"{their_module}.{name}.{part}") for name in ("to_q", "to_k", "to_v"))
                value = fused(q, k, v, unet.heads_of(len(q)))
                ours[f"{our_module}.{part}"] = value if part == "bias" else value[:, :, None, None]
            elif not attention and f"{their_module}.{part}" in theirs:
                value = theirs.pop(f"{their_module}.{part}")
                convolution = our_module.endswith("attention.proj") and part == "weight"
                ours[f"{our_module}.{part}"] = value[:, :, None, None] if convolution else value
    if theirs:
        raise refused(f"{len(theirs)} unknown tensors, such as {', '.join(sorted(theirs)[:3])}")
    return architecture, checked(architecture, ours)


def renamed(name: str) -> str:
    """Today's name of a tensor: models of before 2023 name their attention layers otherwise."""
    if ".attentions." in name:
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            name = name.replace(f".{old}.", f".{new}.")
    return name


def unet_architecture(theirs: Mapping[str, Any]) -> Architecture:
    """Our architecture of a complete `UNet2DModel` configuration. Raises ValueError for what it cannot express."""
    size, widths = theirs["sample_size"], tuple(theirs["block_out_channels"])
    if not isinstance(size, int):
        raise refused(f"sample_size is {size!r}; one whole number is needed")
    if not widths or any(type(width) is not int or width < 1 or width % widths[0] for width in widths):
        raise refused(f"block_out_channels is {widths}; whole multiples of the first are needed")
    if theirs["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise refused(f"time_embedding_dim is {theirs['time_embedding_dim']}; {4 * widths[0]} is needed")
    if theirs["freq_shift"] not in (0, 1):
        raise refused(f"freq_shift is {theirs['freq_shift']}; 0 or 1 is needed")
    scale_shift = choose(
        {"default": False, "scale_shift": True}, theirs["resnet_time_scale_shift"], "resnet_time_scale_shift"
    )
    groups = theirs["norm_num_groups"]
    if theirs["attn_norm_num_groups"] not in ((groups,) if scale_shift else (None, groups)):
        raise refused(f"attn_norm_num_groups is {theirs['attn_norm_num_groups']}; {groups} is needed")
    attention_at, resample = _levels(theirs, size)
    head_width = theirs["attention_head_dim"]
    config = UNetConfig(
        base_width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=theirs["layers_per_block"],
        attention_at=attention_at,
        heads=1 if head_width is None else None,
        head_width=head_width,
        dropout=theirs["dropout"],
        modulation="scale_shift" if scale_shift else "shift",
        resample="block" if resample == "resnet" else "conv",
        down_padding=theirs["downsample_padding"],
        norm_groups=groups,
        norm_group_width=1,
        norm_eps=theirs["norm_eps"],
        embedding_order="cos_sin" if theirs["flip_sin_to_cos"] else "sin_cos",
        embedding_denominator="half_minus_1" if theirs["freq_shift"] else "half",
    )
    return Architecture(config, theirs["in_channels"], size, theirs["num_class_embeds"] or 0, theirs["out_channels"])


def _levels(theirs: Mapping[str, Any], size: int) -> tuple[tuple[int, ...], str]:
    """Resolutions with attention, and "conv" or "resnet": how the network resizes."""
    down, up = list(theirs["down_block_types"]), list(theirs["up_block_types"])
    if len(down) != len(theirs["block_out_channels"]) or len(up) != len(down):
        raise refused("down_block_types, up_block_types and block_out_channels differ in length")
    attention_at, resizes = list[int](), set[str]()
    for i, kind in enumerate(down):
        mirror, attention, resize = choose(BLOCK_TYPES, kind, "diffusers block type")
        last = i == len(down) - 1  # does not resize, so that all types without attention are alike
        if up[-1 - i] != mirror and not (last and not attention and up[0] in ("UpBlock2D", "ResnetUpsampleBlock2D")):
            raise refused(f"up_block_types has {up[-1 - i]} where down_block_types has {kind}; {mirror} is needed")
        if attention:
            attention_at.append(size >> i)
        if not last:
            resizes |= {resize} if resize else {theirs["downsample_type"], theirs["upsample_type"]}
    if len(resizes) > 1:
        raise refused(f"levels resize in different ways: {', '.join(sorted(resizes))}")
    return tuple(attention_at), choose({"conv": "conv", "resnet": "resnet"}, (*resizes, "conv")[0], "downsample_type")


def unet_to_diffusers(architecture: Architecture, weights: Weights) -> Diffusers:
    config = cast(UNetConfig, architecture.config)
    theirs: Weights = {}
    for our_module, their_module, attention in unet_names(config):
        for part in ("weight", "bias"):
            value = weights.get(f"{our_module}.{part}")
            if value is None:
                continue
            if attention:
                for name, each in zip(
                    ("to_q", "to_k", "to_v"), split(value, config.heads_of(len(value) // 3)), strict=True
                ):
                    theirs[f"{their_module}.{name}.{part}"] = each
            else:
                theirs[f"{their_module}.{part}"] = (
                    value.flatten(1) if their_module.endswith("to_out.0") and part == "weight" else value
                )
    return Diffusers(unet_config_to_diffusers(architecture), theirs)


def unet_config_to_diffusers(architecture: Architecture) -> dict[str, Any]:
    """A `UNet2DModel` configuration. Raises ValueError for what it cannot express, by name."""
    config = cast(UNetConfig, architecture.config)
    needed = {
        "decoder_attention": "every",
        "embedding": "sinusoidal",
        "skip_scale": 1.0,
        "level_scale": 1.0,
        "label_at": "output",
        "resample_projection": False,
        "augmentation_labels": 0,
        "fourier_exponents": (),
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise refused(f"{name} is {getattr(config, name)!r}; diffusers' UNet2DModel has only {value!r}")
    widths = [config.base_width * m for m in config.multipliers]
    groups = {m.num_groups for m in skeleton(architecture).modules() if isinstance(m, nn.GroupNorm)}
    if len(groups) > 1:
        raise refused(
            f"norms have {sorted(groups)} groups; UNet2DModel has one number: set norm_groups to {min(groups)}"
        )
    attention = [square(architecture) >> i in config.attention_at for i in range(len(widths))]
    head_widths = {width // config.heads_of(width) for width, has in zip(widths, attention, strict=True) if has}
    head_widths.add(widths[-1] // config.heads_of(widths[-1]))
    if config.heads != 1 and len(head_widths) > 1:
        raise refused(
            f"heads = {config.heads} makes heads of {sorted(head_widths)} channels; UNet2DModel has one number"
        )
    plain = "DownBlock2D" if config.resample == "conv" else "ResnetDownsampleBlock2D"
    down = ["AttnDownBlock2D" if has else plain for has in attention]
    resize = "conv" if config.resample == "conv" else "resnet"
    return {
        "_class_name": "UNet2DModel",
        **UNET_DEFAULTS,
        "sample_size": square(architecture),
        "in_channels": architecture.channels,
        "out_channels": architecture.out_channels,
        "freq_shift": 1 if config.embedding_denominator == "half_minus_1" else 0,
        "flip_sin_to_cos": config.embedding_order == "cos_sin",
        "down_block_types": down,
        "up_block_types": [BLOCK_TYPES[kind][0] for kind in reversed(down)],
        "block_out_channels": widths,
        "layers_per_block": config.blocks,
        "downsample_padding": config.down_padding,
        "downsample_type": resize,
        "upsample_type": resize,
        "dropout": config.dropout,
        "attention_head_dim": None if config.heads == 1 else head_widths.pop(),
        "norm_num_groups": min(groups),
        "attn_norm_num_groups": min(groups),
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.modulation == "scale_shift" else "default",
        "num_class_embeds": architecture.classes or None,
    }


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (head, [q, k, v], width) of our 1x1 convolution or its bias -> three of rows (head, width)."""
    q, k, v = (
        qkv.flatten(1).unflatten(0, (heads, 3, -1)).unbind(1) if qkv.dim() > 1 else qkv.view(heads, 3, -1).unbind(1)
    )
    return tuple(each.flatten(0, 1).contiguous() for each in (q, k, v))  # pyright: ignore[reportReturnType]


def fused(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The inverse of `split`, without the two trailing dimensions of a convolution."""
    return torch.stack([each.unflatten(0, (heads, -1)) for each in (q, k, v)], dim=1).flatten(0, 2)
