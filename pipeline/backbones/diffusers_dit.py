"""Our DiT from and to the layout of diffusers' `DiTTransformer2DModel`."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from pipeline.backbones.diffusers_layout import Diffusers, Weights, checked, refused, settled, square, taken
from pipeline.backbones.dit import DiTConfig
from pipeline.backbones.table import Architecture

DIT_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
DIT_FIXED: dict[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
DIT_NAMES = {"patches": "pos_embed.proj", "modulation_out": "proj_out_1", "linear_out": "proj_out_2"}
DIT_BLOCK_NAMES = {"modulation": "norm1.linear", "proj": "attn1.to_out.0", "mlp1": "ff.net.0.proj", "mlp2": "ff.net.2"}
# diffusers keeps a copy of these in every block
DIT_EMBEDDER_NAMES = {
    "map1": "timestep_embedder.linear_1",
    "map2": "timestep_embedder.linear_2",
    "labels": "class_embedder.embedding_table",
}


def dit_names(layers: int) -> Iterator[tuple[str, str]]:
    """(our module, theirs) but for the embedders and the fused query, key and value."""
    yield from DIT_NAMES.items()
    for i in range(layers):
        for ours, theirs in DIT_BLOCK_NAMES.items():
            yield f"blocks.{i}.{ours}", f"transformer_blocks.{i}.{theirs}"


def dit_from_diffusers(config: Mapping[str, Any], weights: Weights) -> tuple[Architecture, Weights]:
    given = settled(config, DIT_DEFAULTS, DIT_FIXED)
    ours_config = DiTConfig(
        width=given["num_attention_heads"] * given["attention_head_dim"],
        layers=given["num_layers"],
        heads=given["num_attention_heads"],
        patch=given["patch_size"],
        mlp_norm_eps=given["norm_eps"],
        embedding_denominator="half_minus_1",
    )
    out_channels = given["in_channels"] if given["out_channels"] is None else given["out_channels"]
    architecture = Architecture(
        ours_config, given["in_channels"], given["sample_size"], given["num_embeds_ada_norm"], out_channels
    )
    ours, theirs = Weights(), dict(weights)
    for our_module, their_module in dit_names(ours_config.layers):
        for part in ("weight", "bias"):
            ours[f"{our_module}.{part}"] = taken(theirs, f"{their_module}.{part}")
    for i in range(ours_config.layers):
        for part in ("weight", "bias"):
            qkv = [taken(theirs, f"transformer_blocks.{i}.attn1.{name}.{part}") for name in ("to_q", "to_k", "to_v")]
            ours[f"blocks.{i}.qkv.{part}"] = torch.cat(qkv)
        embedder: Weights = {}
        for our_module, their_module in DIT_EMBEDDER_NAMES.items():
            for part in ("weight",) if our_module == "labels" else ("weight", "bias"):
                embedder[f"{our_module}.{part}"] = taken(
                    theirs, f"transformer_blocks.{i}.norm1.emb.{their_module}.{part}"
                )
        if i > 0 and any(not torch.equal(ours[name], value) for name, value in embedder.items()):
            raise refused(f"transformer_blocks.{i} embeds level and label otherwise than transformer_blocks.0")
        ours |= embedder
    if theirs:
        raise refused(f"{len(theirs)} unknown tensors, such as {', '.join(sorted(theirs)[:3])}")
    # Their last row stands for "no label"; ours adds nothing there: move it into the bias that every row passes.
    table, null = ours["labels.weight"][:-1], ours["labels.weight"][-1]
    ours["labels.weight"], ours["map2.bias"] = table - null, ours["map2.bias"] + null
    return architecture, checked(architecture, ours)


def dit_to_diffusers(architecture: Architecture, weights: Weights) -> Diffusers:
    config = cast(DiTConfig, architecture.config)
    needed = {"mlp_ratio": 4, "norm_eps": 1e-6, "embedding_denominator": "half_minus_1", "level_scale": 1.0}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise refused(f"{name} is {getattr(config, name)!r}; diffusers' DiTTransformer2DModel has only {value!r}")
    if not architecture.classes:
        raise refused("classes is 0; diffusers' DiTTransformer2DModel always takes a label")
    theirs: Weights = {}
    for our_module, their_module in dit_names(config.layers):
        for part in ("weight", "bias"):
            theirs[f"{their_module}.{part}"] = weights[f"{our_module}.{part}"]
    embedder = {
        f"{their_module}.{part}": weights[f"{our_module}.{part}"]
        for our_module, their_module in DIT_EMBEDDER_NAMES.items()
        for part in (("weight",) if our_module == "labels" else ("weight", "bias"))
    }
    labels = f"{DIT_EMBEDDER_NAMES['labels']}.weight"
    embedder[labels] = torch.cat((embedder[labels], torch.zeros_like(embedder[labels][:1])))
    for i in range(config.layers):
        for part in ("weight", "bias"):
            for name, each in zip(("to_q", "to_k", "to_v"), weights[f"blocks.{i}.qkv.{part}"].chunk(3), strict=True):
                theirs[f"transformer_blocks.{i}.attn1.{name}.{part}"] = each.clone()
        theirs |= {f"transformer_blocks.{i}.norm1.emb.{name}": value.clone() for name, value in embedder.items()}
    their_config = {
        "_class_name": "DiTTransformer2DModel",
        **DIT_DEFAULTS,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": architecture.channels,
        "out_channels": architecture.out_channels,
        "num_layers": config.layers,
        "sample_size": square(architecture),
        "patch_size": config.patch,
        "num_embeds_ada_norm": architecture.classes,
        "norm_eps": config.mlp_norm_eps,
    }
    return Diffusers(their_config, theirs)
