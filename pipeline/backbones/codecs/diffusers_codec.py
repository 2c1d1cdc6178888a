"""Our autoencoder from and to the layout of diffusers' `AutoencoderKL`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from pipeline.backbones.diffusers_layout import Diffusers, Weights, fitting, refused, settled
from pipeline.backbones.diffusers_unet import fused, renamed, split

DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
FIXED: dict[str, Any] = {"act_fn": "silu"}
BLOCK_PARTS = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "conv_shortcut"}


@dataclass(frozen=True)
class Codec:
    """Everything an autoencoder is built from. size: pixels a side that it was trained at, told and not enforced."""

    config: AutoencoderKLConfig
    channels: int
    size: int

    def build(self) -> AutoencoderKL:
        return AutoencoderKL(self.config, self.channels)


def _names(config: AutoencoderKLConfig) -> Iterator[tuple[str, str, bool]]:
    """(our module, theirs, whether it holds an attention's fused weights), some for what a codec may lack."""
    yield from ((name, name, False) for name in ("quant_conv", "post_quant_conv"))
    for side, stages, resizer, blocks in (
        ("encoder", "down_blocks", "downsamplers", config.blocks),
        ("decoder", "up_blocks", "upsamplers", config.blocks + 1),
    ):
        for ours, theirs in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield f"{side}.{ours}", f"{side}.{theirs}", False
        yield from _block(f"{side}.middle.0", f"{side}.mid_block.resnets.0")
        yield from _block(f"{side}.middle.{1 + config.middle_attention}", f"{side}.mid_block.resnets.1")
        if config.middle_attention:
            attention = f"{side}.mid_block.attentions.0"
            yield f"{side}.middle.1.norm", f"{attention}.group_norm", False
            yield f"{side}.middle.1.proj", f"{attention}.to_out.0", False
            yield f"{side}.middle.1.qkv", attention, True
        at = 0
        for i in range(len(config.widths)):
            if i > 0:
                yield f"{side}.stages.{at}.conv", f"{side}.{stages}.{i - 1}.{resizer}.0.conv", False
                at += 1
            for j in range(blocks):
                yield from _block(f"{side}.stages.{at}", f"{side}.{stages}.{i}.resnets.{j}")
                at += 1


def _block(ours: str, theirs: str) -> Iterator[tuple[str, str, bool]]:
    return ((f"{ours}.{our_part}", f"{theirs}.{their_part}", False) for our_part, their_part in BLOCK_PARTS.items())


def codec_from_diffusers(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[Codec, Weights]:
    """Our codec and its state dict. Raises ValueError for what it cannot express, by name."""
    if config.get("_class_name") != "AutoencoderKL":
        raise refused(f"codec class {config.get('_class_name')}; only AutoencoderKL is read")
    codec = _codec(settled(config, DEFAULTS, FIXED))
    ours: Weights = {}
    theirs = {renamed(name): value for name, value in weights.items()}
    for our_module, their_module, attention in _names(codec.config):
        for part in ("weight", "bias"):
            if attention:
                if f"{their_module}.to_q.{part}" in theirs:
                    q, k, v = (theirs.pop(f"{their_module}.{name}.{part}") for name in ("to_q", "to_k", "to_v"))
                    value = fused(q, k, v, heads=1)
                    ours[f"{our_module}.{part}"] = value if part == "bias" else value.flatten(1)[:, :, None, None]
            elif f"{their_module}.{part}" in theirs:
                value = theirs.pop(f"{their_module}.{part}")
                projection = our_module.endswith("middle.1.proj") and part == "weight"
                ours[f"{our_module}.{part}"] = value.flatten(1)[:, :, None, None] if projection else value
    if theirs:
        raise refused(f"{len(theirs)} unknown tensors, such as {', '.join(sorted(theirs)[:3])}")
    return codec, fitting(_skeleton(codec), ours)


def codec_to_diffusers(codec: Codec, weights: Mapping[str, Tensor]) -> Diffusers:
    """The `AutoencoderKL` of our codec. Raises ValueError for what it cannot express, by name."""
    fitting(_skeleton(codec), weights)
    if codec.config.likelihood != "none":
        raise refused(f"likelihood is {codec.config.likelihood}; diffusers' AutoencoderKL has none")
    groups = {m.num_groups for m in _skeleton(codec).modules() if isinstance(m, torch.nn.GroupNorm)}
    if len(groups) > 1:
        raise refused(f"norms have {sorted(groups)} groups; set norm_group_width to 1 and norm_groups to one of them")
    theirs: Weights = {}
    for our_module, their_module, attention in _names(codec.config):
        for part in ("weight", "bias"):
            value = weights.get(f"{our_module}.{part}")
            if value is None:
                continue
            if attention:
                for name, each in zip(("to_q", "to_k", "to_v"), split(value, heads=1), strict=True):
                    theirs[f"{their_module}.{name}.{part}"] = each
            else:
                projection = their_module.endswith("to_out.0") and part == "weight"
                theirs[f"{their_module}.{part}"] = value.flatten(1) if projection else value
    return Diffusers(_config(codec, groups.pop()), theirs)


def _codec(theirs: Mapping[str, Any]) -> Codec:
    widths = tuple(theirs["block_out_channels"])
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if list(theirs[key]) != [kind] * len(widths):
            raise refused(f"{key} is {list(theirs[key])}; {kind} {len(widths)} times is needed")
    if theirs["out_channels"] != theirs["in_channels"]:
        raise refused(f"out_channels is {theirs['out_channels']}; in_channels, {theirs['in_channels']}, is needed")
    size = theirs["sample_size"]
    if not isinstance(size, int):
        raise refused(f"sample_size is {size!r}; one whole number is needed")
    config = AutoencoderKLConfig(
        widths=widths,
        blocks=theirs["layers_per_block"],
        latent_channels=theirs["latent_channels"],
        norm_groups=theirs["norm_num_groups"],
        middle_attention=theirs["mid_block_add_attention"],
        quant_conv=theirs["use_quant_conv"],
        post_quant_conv=theirs["use_post_quant_conv"],
        scale=theirs["scaling_factor"],
        shift=theirs["shift_factor"] or 0.0,
        latents_mean=tuple(theirs["latents_mean"] or ()),
        latents_std=tuple(theirs["latents_std"] or ()),
    )
    return Codec(config, theirs["in_channels"], size)


def _config(codec: Codec, groups: int) -> dict[str, Any]:
    config, levels = codec.config, len(codec.config.widths)
    return {
        "_class_name": "AutoencoderKL",
        **DEFAULTS,
        "in_channels": codec.channels,
        "out_channels": codec.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": groups,
        "sample_size": codec.size,
        "scaling_factor": config.scale,
        "shift_factor": config.shift or None,
        "latents_mean": list(config.latents_mean) or None,
        "latents_std": list(config.latents_std) or None,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.post_quant_conv,
        "mid_block_add_attention": config.middle_attention,
    }


def _skeleton(codec: Codec) -> torch.nn.Module:
    with torch.device("meta"):
        return codec.build()
