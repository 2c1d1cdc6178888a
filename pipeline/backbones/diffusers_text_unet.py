"""Our U-Net with text from and to the layout of diffusers' `UNet2DConditionModel`."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from pipeline.backbones.diffusers_layout import Diffusers, Weights, checked, refused, settled, skeleton, square, taken
from pipeline.backbones.diffusers_unet import unet_names
from pipeline.backbones.table import Architecture
from pipeline.backbones.unet import UNetConfig
from pipeline.choose import choose

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": None,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}
# what is read; of everything else only diffusers' default is understood
READ = {
    *("sample_size", "in_channels", "out_channels", "flip_sin_to_cos", "freq_shift", "down_block_types"),
    *("up_block_types", "block_out_channels", "layers_per_block", "downsample_padding", "dropout", "norm_num_groups"),
    *("norm_eps", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "use_linear_projection"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    *("upcast_attention", "addition_embed_type_num_heads"),  # of precision; of another addition_embed_type
}
FIXED = {name: value for name, value in DEFAULTS.items() if name not in READ}
SIZES = 6  # of SDXL: original height and width, crop top and left, target height and width
BLOCK_PARTS = {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "norm3": ("norm3",),
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "proj": ("attn1.to_out.0",),
    "cross.q": ("attn2.to_q",),
    "cross.kv": ("attn2.to_k", "attn2.to_v"),
    "cross.proj": ("attn2.to_out.0",),
    "mlp1": ("ff.net.0.proj",),
    "mlp2": ("ff.net.2",),
}


def _names(config: UNetConfig, own: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our tensor, theirs that it is made of, one after the other) of those in `own`."""
    modules: dict[str, tuple[str, ...]] = {
        "pooled1": ("add_embedding.linear_1",),
        "pooled2": ("add_embedding.linear_2",),
    }
    for ours, theirs, attention in unet_names(config):
        if attention:
            place = ours.removesuffix(".qkv")
            modules |= {f"{place}.{part}": (f"{theirs}.{part}",) for part in ("norm", "proj_in", "proj_out")}
            for i in range(max(config.text_depth)):
                for our_part, parts in BLOCK_PARTS.items():
                    block = f"{theirs}.transformer_blocks.{i}"
                    modules[f"{place}.blocks.{i}.{our_part}"] = tuple(f"{block}.{part}" for part in parts)
        elif ".attention." not in ours:
            modules[ours] = (theirs,)
    for ours, parts in modules.items():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in own:
                yield f"{ours}.{kind}", tuple(f"{part}.{kind}" for part in parts)


def text_unet_from_diffusers(config: Mapping[str, Any], weights: Weights) -> tuple[Architecture, Weights]:
    architecture = _architecture(settled(config, DEFAULTS, FIXED))
    expected = {name: value.shape for name, value in skeleton(architecture).state_dict().items()}
    theirs, ours = dict(weights), Weights()
    for name, parts in _names(cast(UNetConfig, architecture.config), set(expected)):
        value = torch.cat([taken(theirs, part) for part in parts])
        end = name.endswith(("proj_in.weight", "proj_out.weight"))
        ours[name] = value.flatten(1) if end else value  # some keep them as 1x1 convolutions
    if theirs:
        raise refused(f"{len(theirs)} unknown tensors, such as {', '.join(sorted(theirs)[:3])}")
    return architecture, checked(architecture, ours)


def _each(value: Any, levels: int, name: str) -> tuple[int, ...]:
    """One whole number a resolution."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels or any(type(each) is not int or each < 1 for each in values):
        raise refused(f"{name} is {value!r}; a whole number, or one for each of the {levels} resolutions, is needed")
    return values


def _architecture(theirs: Mapping[str, Any]) -> Architecture:
    widths, size = tuple(theirs["block_out_channels"]), theirs["sample_size"]
    levels = len(widths)
    if type(size) is not int:
        raise refused(f"sample_size is {size!r}; one whole number is needed")
    if not widths or any(type(width) is not int or width < 1 or width % widths[0] for width in widths):
        raise refused(f"block_out_channels is {widths}; whole multiples of the first are needed")
    if theirs["freq_shift"] not in (0, 1):
        raise refused(f"freq_shift is {theirs['freq_shift']}; 0 or 1 is needed")
    if type(theirs["cross_attention_dim"]) is not int:
        raise refused(f"cross_attention_dim is {theirs['cross_attention_dim']!r}; one whole number is needed")
    blocks = set(_each(theirs["layers_per_block"], levels, "layers_per_block"))
    if len(blocks) > 1:
        raise refused(f"layers_per_block is {theirs['layers_per_block']!r}; the same at every resolution is needed")
    depths = _each(theirs["transformer_layers_per_block"] or 1, levels, "transformer_layers_per_block")
    # what diffusers calls the width of a head is their number
    heads = _each(theirs["attention_head_dim"] or 8, levels, "attention_head_dim")
    head_widths = {width / each for width, each in zip(widths, heads, strict=True)}
    if len(set(heads)) > 1 and (len(head_widths) > 1 or min(head_widths) % 1):
        raise refused(f"attention_head_dim is {heads}; one number of heads, or one width of a head, is needed")
    pooled, sizes, features = _added(theirs)
    config = UNetConfig(
        base_width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=blocks.pop(),
        attention_at=_attention_at(theirs, size),
        heads=heads[0] if len(set(heads)) == 1 else None,
        head_width=None if len(set(heads)) == 1 else int(head_widths.pop()),
        dropout=theirs["dropout"],
        down_padding=theirs["downsample_padding"],
        norm_groups=theirs["norm_num_groups"],
        norm_group_width=1,
        norm_eps=theirs["norm_eps"],
        embedding_order="cos_sin" if theirs["flip_sin_to_cos"] else "sin_cos",
        embedding_denominator="half_minus_1" if theirs["freq_shift"] else "half",
        text_width=theirs["cross_attention_dim"],
        text_depth=depths if len(set(depths)) > 1 else depths[:1],
        pooled_width=pooled,
        size_conditions=sizes,
        size_features=features,
        text_projection="linear" if theirs["use_linear_projection"] else "conv",
        init="torch",
    )
    return Architecture(config, theirs["in_channels"], size, 0, theirs["out_channels"])


def _attention_at(theirs: Mapping[str, Any], size: int) -> tuple[int, ...]:
    kinds = {"CrossAttnDownBlock2D": ("CrossAttnUpBlock2D", True), "DownBlock2D": ("UpBlock2D", False)}
    down, up = list(theirs["down_block_types"]), list(theirs["up_block_types"])
    if len(down) != len(theirs["block_out_channels"]) or len(up) != len(down):
        raise refused("down_block_types, up_block_types and block_out_channels differ in length")
    found = list[int]()
    for i, kind in enumerate(down):
        mirror, attention = choose(kinds, kind, "diffusers block type")
        if up[-1 - i] != mirror:
            raise refused(f"up_block_types has {up[-1 - i]} where down_block_types has {kind}; {mirror} is needed")
        if attention:
            found.append(size >> i)
    return tuple(found)


def _added(theirs: Mapping[str, Any]) -> tuple[int, int, int]:
    """(pooled width, numbers of size, sinusoids of each)."""
    kind, features = theirs["addition_embed_type"], theirs["addition_time_embed_dim"]
    total = theirs["projection_class_embeddings_input_dim"]
    if kind is None:
        return 0, 0, 256
    if kind != "text_time" or type(features) is not int or type(total) is not int or total <= SIZES * features:
        raise refused(
            f"addition_embed_type is {kind!r} with addition_time_embed_dim {features} and "
            f"projection_class_embeddings_input_dim {total}; only text_time with {SIZES} sizes and a text is supported"
        )
    return total - SIZES * features, SIZES, features


def text_unet_to_diffusers(architecture: Architecture, weights: Weights) -> Diffusers:
    config, theirs = cast(UNetConfig, architecture.config), Weights()
    their_config = _config(architecture)
    for name, parts in _names(config, set(weights)):
        value = weights[name]
        if config.text_projection == "conv" and name.endswith(("proj_in.weight", "proj_out.weight")):
            value = value[:, :, None, None]
        for part, each in zip(parts, value.chunk(len(parts)), strict=True):
            theirs[part] = each.clone()
    return Diffusers(their_config, theirs)


def _config(architecture: Architecture) -> dict[str, Any]:
    config = cast(UNetConfig, architecture.config)
    needed = {
        "decoder_attention": "every",
        "modulation": "shift",
        "resample": "conv",
        "embedding": "sinusoidal",
        "level_scale": 1.0,
        "augmentation_labels": 0,
        "fourier_exponents": (),
        "size_conditions": SIZES if config.pooled_width else 0,
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise refused(f"{name} is {getattr(config, name)!r}; diffusers' UNet2DConditionModel has only {value!r}")
    if architecture.classes:
        raise refused(f"classes is {architecture.classes}; a network told words takes none")
    groups = {m.num_groups for m in skeleton(architecture).modules() if isinstance(m, nn.GroupNorm)}
    if len(groups) > 1:
        raise refused(f"norms have {sorted(groups)} groups; one number is needed: set norm_groups to {min(groups)}")
    widths = [config.base_width * m for m in config.multipliers]
    levels = len(widths)
    attention = [square(architecture) >> i in config.attention_at for i in range(levels)]
    added = config.pooled_width + SIZES * config.size_features
    return {
        "_class_name": "UNet2DConditionModel",
        **DEFAULTS,
        "sample_size": square(architecture),
        "in_channels": architecture.channels,
        "out_channels": architecture.out_channels,
        "flip_sin_to_cos": config.embedding_order == "cos_sin",
        "freq_shift": 1 if config.embedding_denominator == "half_minus_1" else 0,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "block_out_channels": widths,
        "layers_per_block": config.blocks,
        "downsample_padding": config.down_padding,
        "dropout": config.dropout,
        "norm_num_groups": groups.pop(),
        "norm_eps": config.norm_eps,
        "cross_attention_dim": config.text_width,
        "transformer_layers_per_block": [config.depth(i) for i in range(levels)],
        "attention_head_dim": config.heads or [width // cast(int, config.head_width) for width in widths],
        "use_linear_projection": config.text_projection == "linear",
        "upcast_attention": False,
        "addition_embed_type": "text_time" if config.pooled_width else None,
        "addition_time_embed_dim": config.size_features if config.pooled_width else None,
        "projection_class_embeddings_input_dim": added if config.pooled_width else None,
    }
