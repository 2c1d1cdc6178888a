"""Networks that are told words: diffusers' outputs both ways, published counts, prompts kept, refusals by name."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from pipeline.backbones import Architecture
from pipeline.backbones.interchange import from_diffusers, to_diffusers
from pipeline.backbones.mmdit import MMDiTConfig
from pipeline.backbones.pixart import PixArt, PixArtConfig
from pipeline.backbones.published import STABLE_DIFFUSION_1, STABLE_DIFFUSION_2, STABLE_DIFFUSION_XL
from pipeline.backbones.unet import UNetConfig
from pipeline.backbones.words import Words
from pipeline.diffusion.conditioning import Conditioning


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 / max(1, parameter[0].numel()) ** 0.5)
    return model.eval()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def meta(architecture: Architecture) -> nn.Module:
    with torch.device("meta"):
        return architecture.build()


LEVEL = torch.tensor([0.0, 250.0, 999.0])


def texts(width: int, pooled: int = 0, sizes: int = 0, length: int = 8) -> Words:
    """Three of them, of 8, 3 and 1 tokens."""
    torch.manual_seed(2)
    mask = torch.arange(length)[None] < torch.tensor([8, 3, 1])[:, None]
    described = torch.tensor([[512.0, 768.0, 0.66, 1.0, 2.0, 300.0]]).expand(3, -1)[:, :sizes]
    return Words(
        torch.randn(3, length, width), mask, torch.randn(3, pooled) if pooled else None, described if sizes else None
    )


# --- PixArt -----------------------------------------------------------------------------------------------------------

PIXART: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "cross_attention_dim": 48,
    "num_layers": 3,
    "sample_size": 16,
    "caption_channels": 20,
}
PIXARTS = {
    "sigma": {"interpolation_scale": 0.5},
    "interpolated, one variance": {"interpolation_scale": 2, "out_channels": 4, "patch_size": 4, "norm_eps": 1e-5},
    "micro-conditions": {"use_additional_conditions": True},
    "silent on conditions": {"sample_size": 128, "patch_size": 8, "num_layers": 1},
}


@torch.no_grad()
def assert_same_pixart(theirs: Any, architecture: Architecture, weights: dict[str, Tensor], size: int) -> None:
    ours = architecture.build().eval()
    ours.load_state_dict(weights)
    config = architecture.config
    assert isinstance(config, PixArtConfig)
    words = texts(config.text_width, sizes=3 if config.micro_conditions else 0)
    told = {"resolution": None, "aspect_ratio": None}
    if words.sizes is not None:
        told = {"resolution": words.sizes[:, :2], "aspect_ratio": words.sizes[:, 2:]}
    assert words.mask is not None
    torch.manual_seed(3)
    for height, width in ((size, size), (size, size // 2)):
        z = torch.randn(3, architecture.channels, height, width)
        expected = theirs(
            z, words.states, timestep=LEVEL, encoder_attention_mask=words.mask.long(), added_cond_kwargs=told
        ).sample
        assert difference(ours(z, LEVEL, Conditioning(), words), expected) < 1e-5


@pytest.mark.parametrize("name", PIXARTS)
def test_pixart_gives_diffusers_outputs_both_ways(name: str) -> None:
    theirs = randomised(PixArtTransformer2DModel(**(PIXART | PIXARTS[name])))
    config = dict(theirs.config) | {"_class_name": "PixArtTransformer2DModel"}
    architecture, weights = from_diffusers(config, theirs.state_dict())
    assert_same_pixart(theirs, architecture, weights, theirs.config.sample_size)
    exported = to_diffusers(architecture, weights)
    again: Any = PixArtTransformer2DModel.from_config(exported.config)
    again.eval().load_state_dict(exported.weights)
    assert again.config.num_layers == theirs.config.num_layers
    assert exported.weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(exported.weights[key], value) for key, value in theirs.state_dict().items())
    assert_same_pixart(again, architecture, weights, theirs.config.sample_size)


@pytest.mark.parametrize(
    ("size", "scale", "micro", "count"),
    [(64, 1.0, False, 610_856_096), (32, 0.5, False, 610_856_096), (128, 2.0, True, 611_349_152)],
    ids=["sigma-512, alpha-512", "256", "alpha-1024"],
)
def test_parameters_of_pixart(size: int, scale: float, micro: bool, count: int) -> None:
    config = PixArtConfig(position_scale=scale, micro_conditions=micro)
    assert parameters(meta(Architecture(config, channels=4, size=size, classes=0, out_channels=8))) == count


SMALL = PixArtConfig(width=48, layers=2, heads=3, text_width=20)


@torch.no_grad()
def test_a_prompt_kept_gives_the_same_bits() -> None:
    network = randomised(Architecture(SMALL, 4, 8, 0, 4).build())
    words, z = texts(20), torch.randn(3, 4, 8, 8)
    assert torch.equal(
        network(z, LEVEL, Conditioning(), network.prompt(words)), network(z, LEVEL, Conditioning(), words)
    )


@torch.no_grad()
def test_masked_tokens_are_not_heard_and_words_are() -> None:
    network = randomised(Architecture(SMALL, 4, 8, 0, 4).build())
    words, z = texts(20), torch.randn(3, 4, 8, 8)
    assert words.mask is not None
    other = words._replace(states=torch.where(words.mask[..., None], words.states, torch.full((), 9.0)))
    first = network(z, LEVEL, Conditioning(), words)
    assert torch.equal(network(z, LEVEL, Conditioning(), other), first)
    assert difference(network(z, LEVEL, Conditioning(), words._replace(states=words.states.flip(0))), first) > 1e-3
    assert difference(network(z, LEVEL, Conditioning()), first) > 1e-3


@torch.no_grad()
def test_a_fresh_network_does_not_yet_hear_its_words_and_stages_lead_on() -> None:
    """The cross-attention ends in zeros: the class-conditional stage's network with text added computes the same."""
    torch.manual_seed(4)
    first = randomised(Architecture(dataclasses.replace(SMALL, text_width=0), 4, 8, 5, 4).build())
    second = Architecture(SMALL, 4, 8, 5, 4).build().eval()
    found = second.load_state_dict(first.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("cross" in name or "text" in name for name in found.missing_keys)
    z, labels = torch.randn(3, 4, 8, 8), Conditioning(torch.tensor([0, 4, -1]))
    assert torch.equal(second(z, LEVEL, labels, texts(20)), first(z, LEVEL, labels))


@torch.no_grad()
def test_positions_keep_their_place_at_more_tokens() -> None:
    """Trained at 8 tokens a side and asked at 16: every second token lies where one lay before."""
    small = Architecture(dataclasses.replace(SMALL, position_base=8), 4, 16, 0, 4).build()
    large = Architecture(dataclasses.replace(SMALL, position_base=8), 4, 32, 0, 4).build()
    assert isinstance(small, PixArt)
    assert isinstance(large, PixArt)
    before = small.positions_at(16, 16).view(8, 8, -1)
    after = large.positions_at(32, 32).view(16, 16, -1)
    torch.testing.assert_close(after[::2, ::2], before)


@torch.no_grad()
def test_compressed_keys_start_as_the_mean_of_their_tokens() -> None:
    config = dataclasses.replace(SMALL, kv_compress=2, kv_compress_from=1)
    network = Architecture(config, 4, 8, 0, 4).build().eval()
    assert isinstance(network, PixArt)
    compress: Any = network.blocks[1]
    assert network.blocks[0].compress is None  # pyright: ignore[reportAttributeAccessIssue]
    tokens = torch.randn(2, 16, 48)
    mean = tokens.view(2, 2, 2, 2, 2, 48).mean((2, 4)).flatten(1, 2)
    expected = torch.nn.functional.layer_norm(mean, (48,))
    torch.testing.assert_close(compress.compress(tokens, (4, 4)), expected)
    network(torch.randn(3, 4, 8, 8), LEVEL, Conditioning(), texts(20))
    with pytest.raises(ValueError, match="kv_compress"):
        to_diffusers(Architecture(config, 4, 8, 0, 4), network.state_dict())


def test_pixart_refuses_by_name() -> None:
    network = Architecture(SMALL, 4, 8, 0, 4).build()
    z = torch.zeros(3, 4, 8, 8)
    for words, named in (
        (texts(21), "20"),
        (texts(20, pooled=5), "pooled"),
        (texts(20, sizes=3), "sizes"),
        (texts(20)._replace(mask=torch.ones(3, 7, dtype=torch.bool)), "mask"),
    ):
        with pytest.raises(ValueError, match=named):
            network(z, LEVEL, Conditioning(), words)
    silent = Architecture(dataclasses.replace(SMALL, text_width=0), 4, 8, 0, 4)
    with pytest.raises(ValueError, match="without text"):
        silent.build()(z, LEVEL, Conditioning(), texts(20))
    with pytest.raises(ValueError, match="words"):
        to_diffusers(silent, silent.build().state_dict())
    with pytest.raises(ValueError, match="9x8"):
        network(torch.zeros(3, 4, 9, 8), LEVEL, Conditioning())
    theirs = PixArtTransformer2DModel(**PIXART)
    config = dict(theirs.config) | {"_class_name": "PixArtTransformer2DModel"}
    for option, value in (
        ("caption_channels", None),
        ("norm_type", "ada_norm"),
        ("attention_type", "gated"),
        ("new", 1),
    ):
        with pytest.raises(ValueError, match=option):
            from_diffusers(config | {option: value}, theirs.state_dict())
    with pytest.raises(ValueError, match=r"attn2\.to_k"):
        from_diffusers(config, {k: v for k, v in theirs.state_dict().items() if "attn2.to_k" not in k})


# --- U-Net ------------------------------------------------------------------------------------------------------------

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(*kinds: str) -> dict[str, Any]:
    down, up = [kind.format("Down") for kind in kinds], [kind.format("Up") for kind in reversed(kinds)]
    return {"down_block_types": down, "up_block_types": up}


UNETS: dict[str, dict[str, Any]] = {
    "stable diffusion 1": blocks(CROSS, CROSS, PLAIN) | {"attention_head_dim": 4},
    "stable diffusion 2": blocks(CROSS, CROSS, PLAIN)
    | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "layers_per_block": 1},
    "sdxl": blocks(PLAIN, CROSS, CROSS)
    | {
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 10,
    },
}
UNET = {"block_out_channels": (32, 64, 64), "norm_num_groups": 8, "cross_attention_dim": 20, "sample_size": 16}


@torch.no_grad()
def assert_same_unet(theirs: Any, architecture: Architecture, weights: dict[str, Tensor]) -> None:
    ours = architecture.build().eval()
    ours.load_state_dict(weights)
    config = architecture.config
    assert isinstance(config, UNetConfig)
    words = texts(20, config.pooled_width, config.size_conditions)
    told = {"text_embeds": words.pooled, "time_ids": words.sizes} if config.pooled_width else None
    torch.manual_seed(3)
    z = torch.randn(3, 4, 16, 16)
    for mask in (None, words.mask):
        seen = None if mask is None else mask.long()
        expected = theirs(z, LEVEL, words.states, encoder_attention_mask=seen, added_cond_kwargs=told).sample
        assert difference(ours(z, LEVEL, Conditioning(), words._replace(mask=mask)), expected) < 1e-5


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_with_text_gives_diffusers_outputs_both_ways(name: str) -> None:
    theirs = randomised(UNet2DConditionModel(**(UNET | UNETS[name])))
    config = dict(theirs.config) | {"_class_name": "UNet2DConditionModel"}
    architecture, weights = from_diffusers(config, theirs.state_dict())
    assert_same_unet(theirs, architecture, weights)
    exported = to_diffusers(architecture, weights)
    again: Any = UNet2DConditionModel.from_config(exported.config)
    assert exported.weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(exported.weights[key], value) for key, value in theirs.state_dict().items())
    again.eval().load_state_dict(exported.weights)
    assert_same_unet(again, architecture, weights)
    assert from_diffusers(exported.config, exported.weights)[0] == architecture


@pytest.mark.parametrize(
    ("config", "size", "count"),
    [
        (STABLE_DIFFUSION_1, 64, 859_520_964),
        (STABLE_DIFFUSION_2, 64, 865_910_724),
        (dataclasses.replace(STABLE_DIFFUSION_XL, attention_at=(64, 32)), 128, 2_567_463_684),
    ],
    ids=["1.x", "2.1", "xl"],
)
def test_parameters_of_stable_diffusion(config: UNetConfig, size: int, count: int) -> None:
    assert parameters(meta(Architecture(config, channels=4, size=size, classes=0, out_channels=4))) == count


@torch.no_grad()
def test_a_unet_keeps_a_prompt_and_refuses_what_it_has_no_input_for() -> None:
    config = UNetConfig(base_width=16, multipliers=(1, 2), blocks=1, attention_at=(8,), text_width=20, pooled_width=5)
    network = randomised(Architecture(config, 4, 8, 0, 4).build())
    words, z = texts(20, pooled=5), torch.randn(3, 4, 8, 8)
    first = network(z, LEVEL, Conditioning(), words)
    assert torch.equal(network(z, LEVEL, Conditioning(), network.prompt(words)), first)
    assert difference(network(z, LEVEL, Conditioning(), words._replace(pooled=-words.pooled)), first) > 1e-3  # pyright: ignore
    assert difference(network(z, LEVEL, Conditioning()), first) > 1e-3
    with pytest.raises(ValueError, match="pooled"):
        network(z, LEVEL, Conditioning(), texts(20))
    with pytest.raises(ValueError, match="without text"):
        Architecture(UNetConfig(base_width=16, multipliers=(1,), attention_at=()), 4, 8, 0, 4).build()(
            z, LEVEL, Conditioning(), words
        )
    for wrong, named in (
        ({"text_depth": (1, 2, 3)}, "text_depth"),
        ({"text_width": 0}, "text_width"),
        ({"skip_scale": 0.5}, "skip_scale"),
    ):
        with pytest.raises(ValueError, match=named):
            dataclasses.replace(config, **wrong)
    theirs = UNet2DConditionModel(**(UNET | UNETS["sdxl"]))
    their_config = dict(theirs.config) | {"_class_name": "UNet2DConditionModel"}
    for option, value in (
        ("addition_embed_type", "image"),
        ("only_cross_attention", True),
        ("attention_head_dim", (2, 3, 4)),
        ("cross_attention_dim", (20, 20, 30)),
        ("up_block_types", ("UpBlock2D",) * 3),
        ("num_class_embeds", 4),
    ):
        with pytest.raises(ValueError, match=option):
            from_diffusers(their_config | {option: value}, theirs.state_dict())


# --- MMDiT ------------------------------------------------------------------------------------------------------------

MMDIT: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 12,
}
MMDITS: dict[str, dict[str, Any]] = {
    "stable diffusion 3": {},
    "stable diffusion 3.5": {"qk_norm": "rms_norm"},
    "stable diffusion 3.5 medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}


@torch.no_grad()
def assert_same_mmdit(theirs: Any, architecture: Architecture, weights: dict[str, Tensor]) -> None:
    ours = architecture.build().eval()
    ours.load_state_dict(weights)
    words = texts(20, pooled=10)._replace(mask=None)  # padding is attended to, as it was trained
    torch.manual_seed(3)
    for height, width in ((8, 8), (8, 16), (24, 24)):
        z = torch.randn(3, 4, height, width)
        expected = theirs(z, words.states, pooled_projections=words.pooled, timestep=LEVEL).sample
        assert difference(ours(z, LEVEL, Conditioning(), words), expected) < 1e-5


@pytest.mark.parametrize("name", MMDITS)
def test_mmdit_gives_diffusers_outputs_both_ways(name: str) -> None:
    theirs = randomised(SD3Transformer2DModel(**(MMDIT | MMDITS[name])))
    config = dict(theirs.config) | {"_class_name": "SD3Transformer2DModel"}
    fresh = from_diffusers(config, theirs.state_dict())[0].build()
    torch.testing.assert_close(fresh.positions, theirs.pos_embed.pos_embed[0])  # pyright: ignore
    theirs.pos_embed.pos_embed.add_(0.1)  # a stored table is read, whatever it holds
    architecture, weights = from_diffusers(config, theirs.state_dict())
    assert_same_mmdit(theirs, architecture, weights)
    exported = to_diffusers(architecture, weights)
    assert exported.weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(exported.weights[key], value) for key, value in theirs.state_dict().items())
    again: Any = SD3Transformer2DModel.from_config(exported.config)
    again.eval().load_state_dict(exported.weights)
    assert_same_mmdit(again, architecture, weights)
    assert from_diffusers(exported.config, exported.weights)[0] == architecture


def test_parameters_of_stable_diffusion_3_medium() -> None:
    assert parameters(meta(Architecture(MMDiTConfig(), 16, 128, 0, 16))) == 2_028_328_000


@torch.no_grad()
def test_mmdit_hears_no_masked_token_and_refuses_by_name() -> None:
    config = MMDiTConfig(width=48, layers=2, heads=3, text_width=20, pooled_width=10, max_side=6)
    architecture = Architecture(config, 4, 8, 5, 4)
    network, z = randomised(architecture.build()), torch.randn(3, 4, 8, 8)
    words = texts(20, pooled=10)
    assert words.mask is not None
    other = words._replace(states=torch.where(words.mask[..., None], words.states, torch.full((), 9.0)))
    first = network(z, LEVEL, Conditioning(), words)
    assert torch.equal(network(z, LEVEL, Conditioning(), other), first)
    assert difference(network(z, LEVEL, Conditioning(), words._replace(mask=None)), first) > 1e-3
    assert difference(network(z, LEVEL, Conditioning(torch.tensor([0, 1, 4])), words), first) > 1e-3
    for told, named in ((None, "empty text"), (texts(20), "pooled"), (texts(21, pooled=10), "20")):
        with pytest.raises(ValueError, match=named):
            network(z, LEVEL, Conditioning(), told)
    with pytest.raises(ValueError, match="max_side"):
        network(torch.zeros(3, 4, 14, 8), LEVEL, Conditioning(), words)
    with pytest.raises(ValueError, match="classes"):
        to_diffusers(architecture, network.state_dict())
    with pytest.raises(ValueError, match="dual_attention"):
        dataclasses.replace(config, dual_attention=(2,))
    theirs = SD3Transformer2DModel(**MMDIT)
    their_config = dict(theirs.config) | {"_class_name": "SD3Transformer2DModel"}
    for option, value in (("qk_norm", "layer_norm"), ("caption_projection_dim", 40), ("new", 1)):
        with pytest.raises(ValueError, match=option):
            from_diffusers(their_config | {option: value}, theirs.state_dict())
    lacking = {k: v for k, v in theirs.state_dict().items() if k != "pos_embed.pos_embed"}
    with pytest.raises(ValueError, match=r"pos_embed\.pos_embed"):
        from_diffusers(their_config, lacking)
