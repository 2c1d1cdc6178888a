"""Our MMDiT from and to the layout of diffusers' `SD3Transformer2DModel`."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.backbones.diffusers_layout import Diffusers, Weights, checked, refused, settled, skeleton, taken
from pipeline.backbones.mmdit import MMDiTConfig
from pipeline.backbones.table import Architecture
from pipeline.choose import choose

DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
NAMES: dict[str, tuple[str, ...]] = {
    "patches": ("pos_embed.proj",),
    "map1": ("time_text_embed.timestep_embedder.linear_1",),
    "map2": ("time_text_embed.timestep_embedder.linear_2",),
    "pooled1": ("time_text_embed.text_embedder.linear_1",),
    "pooled2": ("time_text_embed.text_embedder.linear_2",),
    "text": ("context_embedder",),
    "modulation_out": ("norm_out.linear",),
    "linear_out": ("proj_out",),
}
BLOCK_NAMES: dict[str, tuple[str, ...]] = {
    "image.modulation": ("norm1.linear",),
    "image.attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image.attention.proj": ("attn.to_out.0",),
    "image.attention.norms.0": ("attn.norm_q",),
    "image.attention.norms.1": ("attn.norm_k",),
    "image.alone.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "image.alone.proj": ("attn2.to_out.0",),
    "image.alone.norms.0": ("attn2.norm_q",),
    "image.alone.norms.1": ("attn2.norm_k",),
    "image.mlp1": ("ff.net.0.proj",),
    "image.mlp2": ("ff.net.2",),
    "text.modulation": ("norm1_context.linear",),
    "text.attention.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text.attention.proj": ("attn.to_add_out",),
    "text.attention.norms.0": ("attn.norm_added_q",),
    "text.attention.norms.1": ("attn.norm_added_k",),
    "text.mlp1": ("ff_context.net.0.proj",),
    "text.mlp2": ("ff_context.net.2",),
}


def _names(architecture: Architecture) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our tensor, theirs that it is made of, one after the other)."""
    own = skeleton(architecture).state_dict()
    modules = dict(NAMES)
    for i in range(cast(MMDiTConfig, architecture.config).layers):
        for ours, parts in BLOCK_NAMES.items():
            modules[f"blocks.{i}.{ours}"] = tuple(f"transformer_blocks.{i}.{part}" for part in parts)
    for ours, parts in modules.items():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in own:
                yield f"{ours}.{kind}", tuple(f"{part}.{kind}" for part in parts)


def _turned(name: str, value: Tensor, layers: int) -> Tensor:
    """Where there are two modulations diffusers has scale before shift, and we shift before scale; its own inverse."""
    two = name.startswith(("modulation_out.", f"blocks.{layers - 1}.text.modulation."))
    return torch.cat(value.chunk(2)[::-1]) if two else value


def mmdit_from_diffusers(config: Mapping[str, Any], weights: Weights) -> tuple[Architecture, Weights]:
    given = settled(config, DEFAULTS, {})
    width = given["num_attention_heads"] * given["attention_head_dim"]
    if given["caption_projection_dim"] != width:
        raise refused(f"caption_projection_dim is {given['caption_projection_dim']}; the width, {width}, is needed")
    ours_config = MMDiTConfig(
        width=width,
        layers=given["num_layers"],
        heads=given["num_attention_heads"],
        patch=given["patch_size"],
        text_width=given["joint_attention_dim"],
        pooled_width=given["pooled_projection_dim"],
        max_side=given["pos_embed_max_size"],
        qk_norm=cast(Any, choose({"None": "none", "rms_norm": "rms"}, str(given["qk_norm"]), "qk_norm")),
        dual_attention=tuple(given["dual_attention_layers"]),
    )
    architecture = Architecture(ours_config, given["in_channels"], given["sample_size"], 0, given["out_channels"])
    theirs = dict(weights)
    ours: Weights = {"positions": taken(theirs, "pos_embed.pos_embed").squeeze(0)}
    for name, parts in _names(architecture):
        ours[name] = _turned(name, torch.cat([taken(theirs, part) for part in parts]), ours_config.layers)
    if theirs:
        raise refused(f"{len(theirs)} unknown tensors, such as {', '.join(sorted(theirs)[:3])}")
    return architecture, checked(architecture, ours)


def mmdit_to_diffusers(architecture: Architecture, weights: Weights) -> Diffusers:
    config = cast(MMDiTConfig, architecture.config)
    if config.level_scale != 1:
        raise refused(f"level_scale is {config.level_scale}; diffusers' SD3Transformer2DModel has only 1.0")
    if architecture.classes:
        raise refused(f"classes is {architecture.classes}; diffusers' SD3Transformer2DModel takes none")
    theirs: Weights = {"pos_embed.pos_embed": weights["positions"][None]}
    for name, parts in _names(architecture):
        value = _turned(name, weights[name], config.layers)
        for part, each in zip(parts, value.chunk(len(parts)), strict=True):
            theirs[part] = each.clone()
    their_config = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": architecture.size,
        "patch_size": config.patch,
        "in_channels": architecture.channels,
        "num_layers": config.layers,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.text_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "out_channels": architecture.out_channels,
        "pos_embed_max_size": config.max_side,
        "dual_attention_layers": list(config.dual_attention),
        "qk_norm": "rms_norm" if config.qk_norm == "rms" else None,
    }
    return Diffusers(their_config, theirs)
