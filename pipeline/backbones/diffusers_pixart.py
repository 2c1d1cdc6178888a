"""Our PixArt from and to the layout of diffusers' `PixArtTransformer2DModel`."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from pipeline.backbones.diffusers_layout import Diffusers, Weights, checked, refused, settled, square, taken
from pipeline.backbones.pixart import PixArtConfig
from pipeline.backbones.table import Architecture

DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
    "attention_type": "default",
}
# options of before this class existed, kept in published folders; none changes what is computed
OLD = {"double_self_attention", "num_vector_embeds", "only_cross_attention", "use_linear_projection"}
FIXED: dict[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "attention_type": "default",
}
NAMES = {
    "patches": "pos_embed.proj",
    "map1": "adaln_single.emb.timestep_embedder.linear_1",
    "map2": "adaln_single.emb.timestep_embedder.linear_2",
    "modulation": "adaln_single.linear",
    "text1": "caption_projection.linear_1",
    "text2": "caption_projection.linear_2",
    "linear_out": "proj_out",
}
MICRO_NAMES = {
    "size1": "adaln_single.emb.resolution_embedder.linear_1",
    "size2": "adaln_single.emb.resolution_embedder.linear_2",
    "ratio1": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ratio2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
}
BLOCK_NAMES = {
    "proj": "attn1.to_out.0",
    "cross.q": "attn2.to_q",
    "cross.proj": "attn2.to_out.0",
    "mlp1": "ff.net.0.proj",
    "mlp2": "ff.net.2",
}
FUSED_NAMES = {"qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "cross.kv": ("attn2.to_k", "attn2.to_v")}
MICRO_SIZE = 128  # where use_additional_conditions is silent, diffusers takes it from this sample_size


def _names(config: PixArtConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our tensor, theirs that it is made of, one after the other)."""
    modules = NAMES | (MICRO_NAMES if config.micro_conditions else {})
    named: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in modules.items()}
    for i in range(config.layers):
        named |= {f"blocks.{i}.{ours}": (f"transformer_blocks.{i}.{theirs}",) for ours, theirs in BLOCK_NAMES.items()}
        for ours, parts in FUSED_NAMES.items():
            named[f"blocks.{i}.{ours}"] = tuple(f"transformer_blocks.{i}.{part}" for part in parts)
        yield f"blocks.{i}.table", (f"transformer_blocks.{i}.scale_shift_table",)
    yield "table_out", ("scale_shift_table",)
    for ours, parts in named.items():
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", tuple(f"{part}.{kind}" for part in parts)


def pixart_from_diffusers(config: Mapping[str, Any], weights: Weights) -> tuple[Architecture, Weights]:
    given = settled({key: value for key, value in config.items() if key not in OLD}, DEFAULTS, FIXED)
    width, size = given["num_attention_heads"] * given["attention_head_dim"], given["sample_size"]
    if not given["caption_channels"] or given["cross_attention_dim"] != width:
        raise refused(
            f"caption_channels is {given['caption_channels']} and cross_attention_dim {given['cross_attention_dim']}; "
            f"captions projected to the network's {width} features are needed"
        )
    micro = given["use_additional_conditions"]
    ours_config = PixArtConfig(
        width=width,
        layers=given["num_layers"],
        heads=given["num_attention_heads"],
        patch=given["patch_size"],
        text_width=given["caption_channels"],
        position_scale=given["interpolation_scale"] or max(size // 64, 1),
        micro_conditions=size == MICRO_SIZE if micro is None else micro,
        norm_eps=given["norm_eps"],
    )
    out_channels = given["in_channels"] if given["out_channels"] is None else given["out_channels"]
    architecture = Architecture(ours_config, given["in_channels"], size, 0, out_channels)
    theirs = dict(weights)
    theirs.pop("pos_embed.pos_embed", None)  # computed
    ours = {name: torch.cat([taken(theirs, part) for part in parts]) for name, parts in _names(ours_config)}
    if theirs:
        raise refused(f"{len(theirs)} unknown tensors, such as {', '.join(sorted(theirs)[:3])}")
    return architecture, checked(architecture, ours)


def pixart_to_diffusers(architecture: Architecture, weights: Weights) -> Diffusers:
    config = cast(PixArtConfig, architecture.config)
    tokens = square(architecture) // config.patch
    needed = {
        "mlp_ratio": 4,
        "kv_compress": 1,
        "embedding_denominator": "half",
        "level_scale": 1.0,
        "position_base": config.position_base if config.position_base == tokens else 0,
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise refused(
                f"{name} is {getattr(config, name)!r}; diffusers' PixArtTransformer2DModel has only {value!r}"
            )
    if architecture.classes or not config.text_width:
        raise refused("diffusers' PixArtTransformer2DModel is told words, and no classes")
    theirs: Weights = {}
    for name, parts in _names(config):
        for part, value in zip(parts, weights[name].chunk(len(parts)), strict=True):
            theirs[part] = value.clone()
    their_config = {
        "_class_name": "PixArtTransformer2DModel",
        **DEFAULTS,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": architecture.channels,
        "out_channels": architecture.out_channels,
        "num_layers": config.layers,
        "cross_attention_dim": config.width,
        "sample_size": square(architecture),
        "patch_size": config.patch,
        "norm_eps": config.norm_eps,
        "interpolation_scale": config.position_scale,
        "use_additional_conditions": config.micro_conditions,
        "caption_channels": config.text_width,
    }
    return Diffusers(their_config, theirs)
