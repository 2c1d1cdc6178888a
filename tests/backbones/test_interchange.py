"""Interchange with diffusers: the same outputs for the same weights, and refusals by name."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from pipeline.backbones import Architecture, DiTConfig, UNetConfig, VDMConfig
from pipeline.backbones.interchange import from_diffusers, to_diffusers
from pipeline.backbones.published import DDPM_CIFAR10
from pipeline.diffusion.conditioning import NO_LABEL, Conditioning

UNETS: dict[str, dict[str, Any]] = {
    "ddpm": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "norm_num_groups": 8,
    },
    "defaults": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "iddpm": {
        "block_out_channels": (32, 64),
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "out_channels": 6,
        "layers_per_block": 3,
        "attention_head_dim": 16,
        "num_class_embeds": 5,
    },
    "adm": {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "attention_head_dim": 32,
        "num_class_embeds": 3,
    },
}


def randomised(model: Any) -> Any:
    """Fresh weights everywhere, for those that start at 0 would hide a mistake."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 / max(1, parameter[0].numel()) ** 0.5)
    return model.eval()


def difference(a: Tensor, b: Tensor) -> float:
    """Largest deviation in units of the outputs' size."""
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def unet_difference(theirs: nn.Module, ours: nn.Module, classes: int, channels: int = 3, size: int = 16) -> float:
    torch.manual_seed(1)
    z, level = torch.randn(3, channels, size, size), torch.tensor([0.0, 17.0, 999.0])
    label = torch.tensor([0, 1, classes - 1]) if classes else None
    return difference(ours(z, level, Conditioning(label)), theirs(z, level, class_labels=label).sample)


@pytest.mark.parametrize("name", UNETS)
def test_unet_from_diffusers_gives_the_same_outputs(name: str) -> None:
    theirs = randomised(UNet2DModel(sample_size=16, **UNETS[name]))
    architecture, weights = from_diffusers(dict(theirs.config) | {"_class_name": "UNet2DModel"}, theirs.state_dict())
    ours = architecture.build().eval()
    ours.load_state_dict(weights)
    assert unet_difference(theirs, ours, architecture.classes) < 1e-5
    again = to_diffusers(architecture, ours.state_dict())
    assert again.weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again.weights[key], value) for key, value in theirs.state_dict().items())


OUR_UNETS = {
    "small ddpm": (
        dataclasses.replace(DDPM_CIFAR10, base_width=32, multipliers=(1, 2), attention_at=(8,), norm_groups=8),
        0,
    ),
    "symmetric padding, cos first": (
        UNetConfig(
            base_width=32,
            multipliers=(1, 3),
            attention_at=(16, 8),
            down_padding=1,
            embedding_order="cos_sin",
            norm_groups=8,
            blocks=1,
        ),
        4,
    ),
    "resized in blocks": (
        UNetConfig(
            base_width=64,
            multipliers=(1, 2),
            attention_at=(8,),
            resample="block",
            modulation="scale_shift",
            heads=None,
            head_width=32,
            norm_groups=16,
        ),
        4,
    ),
}


@pytest.mark.parametrize("name", OUR_UNETS)
def test_unet_to_diffusers_gives_the_same_outputs(name: str) -> None:
    config, classes = OUR_UNETS[name]
    architecture = Architecture(config, channels=3, size=16, classes=classes, out_channels=3)
    ours = randomised(architecture.build())
    exported = to_diffusers(architecture, ours.state_dict())
    theirs: Any = UNet2DModel.from_config(exported.config)
    theirs.eval().load_state_dict(exported.weights)
    assert unet_difference(theirs, ours, classes) < 1e-5
    back, weights = from_diffusers(exported.config, exported.weights)
    assert back.build().load_state_dict(weights)
    assert all(torch.equal(weights[key], value) for key, value in ours.state_dict().items())


def test_names_of_attention_before_2023_are_understood() -> None:
    theirs = randomised(UNet2DModel(sample_size=16, **UNETS["ddpm"]))
    old = {
        key.replace(".to_q.", ".query.")
        .replace(".to_k.", ".key.")
        .replace(".to_v.", ".value.")
        .replace(".to_out.0.", ".proj_attn."): value
        for key, value in theirs.state_dict().items()
    }
    assert old.keys() != theirs.state_dict().keys()
    config = dict(theirs.config) | {"_class_name": "UNet2DModel"}
    new, renamed = from_diffusers(config, theirs.state_dict())[1], from_diffusers(config, old)[1]
    assert new.keys() == renamed.keys()
    assert all(torch.equal(new[key], renamed[key]) for key in new)


DIT: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 7,
    "out_channels": 8,
}


def shared_embedders(model: Any) -> Any:
    """Every block a copy of the first one's embedder, as in all models converted from DiT's own weights."""
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@torch.no_grad()
def test_dit_from_diffusers_gives_the_same_outputs_and_its_null_class_becomes_no_label() -> None:
    theirs = randomised(DiTTransformer2DModel(**DIT))
    theirs = shared_embedders(theirs)
    architecture, weights = from_diffusers(
        dict(theirs.config) | {"_class_name": "DiTTransformer2DModel"}, theirs.state_dict()
    )
    ours = architecture.build().eval()
    ours.load_state_dict(weights)
    z, level = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 250.0, 999.0])
    expected = theirs(z, level, class_labels=torch.tensor([0, 6, 7])).sample
    assert difference(ours(z, level, Conditioning(torch.tensor([0, 6, NO_LABEL]))), expected) < 1e-5
    assert difference(ours(z[2:], level[2:], Conditioning()), expected[2:]) < 1e-5


@torch.no_grad()
def test_dit_to_diffusers_gives_the_same_outputs() -> None:
    config = DiTConfig(width=48, layers=2, heads=3, embedding_denominator="half_minus_1")
    architecture = Architecture(config, channels=4, size=12, classes=5, out_channels=4)
    ours = randomised(architecture.build())
    exported = to_diffusers(architecture, ours.state_dict())
    theirs: Any = DiTTransformer2DModel.from_config(exported.config)
    theirs.eval().load_state_dict(exported.weights)
    z, level = torch.randn(2, 4, 12, 12), torch.tensor([3.0, 700.0])
    expected = ours(z, level, Conditioning(torch.tensor([4, NO_LABEL])))
    assert difference(theirs(z, level, class_labels=torch.tensor([4, 5])).sample, expected) < 1e-5
    back, weights = from_diffusers(exported.config, exported.weights)
    assert back == architecture
    assert all(torch.equal(weights[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("skip_scale", 0.5),
        ("decoder_attention", "last"),
        ("embedding", "fourier"),
        ("level_scale", 1000.0),
        ("label_at", "input"),
        ("augmentation_labels", 9),
        ("fourier_exponents", (6, 7)),
        ("norm_groups", 32),  # fewer groups in narrow layers
    ],
)
def test_what_diffusers_has_not_is_refused_by_name(option: str, value: Any) -> None:
    config = dataclasses.replace(OUR_UNETS["small ddpm"][0], **{option: value})
    architecture = Architecture(config, channels=3, size=16, classes=0, out_channels=3)
    with pytest.raises(ValueError, match=option):
        to_diffusers(architecture, architecture.build().state_dict())


def test_networks_that_diffusers_has_not_are_refused_by_name() -> None:
    architecture = Architecture(VDMConfig(width=16, layers=1), channels=3, size=8, classes=0, out_channels=3)
    with pytest.raises(ValueError, match="VDM"):
        to_diffusers(architecture, architecture.build().state_dict())
    with pytest.raises(ValueError, match="UNet3DConditionModel"):
        from_diffusers({"_class_name": "UNet3DConditionModel"}, {})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("time_embedding_type", "fourier"),
        ("act_fn", "mish"),
        ("add_attention", False),
        ("mid_block_scale_factor", 2.0),
        ("center_input_sample", True),
        ("class_embed_type", "timestep"),
        ("sample_size", (16, 8)),
        ("block_out_channels", (32, 48, 64)),
        ("up_block_types", ("UpBlock2D", "UpBlock2D", "UpBlock2D")),
        ("a_new_option", 1),
        ("block_out_channels", None),
        ("block_out_channels", ("32", "64", "64")),
        ("down_block_types", "DownBlock2D"),
        ("norm_num_groups", None),
        ("in_channels", None),
        ("out_channels", "3"),
    ],
)
def test_what_we_have_not_is_refused_by_name(option: str, value: Any) -> None:
    theirs = UNet2DModel(sample_size=16, **UNETS["ddpm"])
    config = dict(theirs.config) | {"_class_name": "UNet2DModel", option: value}
    with pytest.raises(ValueError, match=option):
        from_diffusers(config, theirs.state_dict())


def test_wrong_tensors_are_refused_by_name() -> None:
    theirs = UNet2DModel(sample_size=16, **UNETS["ddpm"])
    config, weights = dict(theirs.config) | {"_class_name": "UNet2DModel"}, theirs.state_dict()
    with pytest.raises(ValueError, match="conv_in"):
        from_diffusers(config, {key: value for key, value in weights.items() if key != "conv_in.weight"})
    with pytest.raises(ValueError, match="to_k"):
        from_diffusers(config, {key: value for key, value in weights.items() if "to_k" not in key})
    with pytest.raises(ValueError, match="extra"):
        from_diffusers(config, weights | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="conv_in"):
        from_diffusers(config, weights | {"conv_in.bias": torch.zeros(1)})
    dit = DiTTransformer2DModel(**DIT)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1"):  # fresh models embed differently in each block
        from_diffusers(dict(dit.config) | {"_class_name": "DiTTransformer2DModel"}, dit.state_dict())
