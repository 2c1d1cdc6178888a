"""The autoencoder: diffusers' outputs both ways, its normalisation, published counts, refusals by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as TheirAutoencoderKL
from torch import Tensor, nn

from pipeline.backbones.codecs import AutoencoderKLConfig, Codec, codec_from_diffusers, codec_to_diffusers
from pipeline.backbones.codecs.autoencoder_kl import SD3, SDXL, STABLE_DIFFUSION, TINY
from pipeline.folders import SHARD_BYTES, folder_digest, read_network, write_network

SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "sample_size": 16,
}
THEIRS: dict[str, dict[str, Any]] = {
    "stable diffusion": {},
    "shifted, no quant convolutions": {
        "shift_factor": 0.0609,
        "scaling_factor": 1.5305,
        "latent_channels": 6,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "normalised by channel": {
        "latents_mean": (5.81, 3.25, 0.12, -2.15),
        "latents_std": (4.17, 4.62, 3.71, 3.28),
        "scaling_factor": 0.5,
    },
    "grey, two blocks, no attention": {
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 2,
        "mid_block_add_attention": False,
    },
    "one level": {
        "block_out_channels": (32,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
}


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7 / max(1, parameter[0].numel()) ** 0.5)
    return model.eval()


def difference(a: Tensor, b: Tensor) -> float:
    """Largest deviation in units of the outputs' size."""
    return float((a - b).abs().max() / b.abs().max())


def their_latents(theirs: Any, raw: Tensor) -> Tensor:
    """As diffusers' pipelines normalise what the encoder gives."""
    given = theirs.config
    if given.latents_mean is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (given.latents_mean, given.latents_std))
        return (raw - mean) * given.scaling_factor / std
    return (raw - (given.shift_factor or 0.0)) * given.scaling_factor


def their_raw(theirs: Any, z: Tensor) -> Tensor:
    """As diffusers' pipelines prepare latents for the decoder."""
    given = theirs.config
    if given.latents_mean is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (given.latents_mean, given.latents_std))
        return z * std / given.scaling_factor + mean
    return z / given.scaling_factor + (given.shift_factor or 0.0)


@torch.no_grad()
def assert_same(theirs: Any, codec: Codec, weights: dict[str, Tensor]) -> None:
    ours = codec.build().eval()
    ours.load_state_dict(weights)
    torch.manual_seed(1)
    x = torch.rand(3, codec.channels, 16, 16) * 2 - 1
    expected, posterior = theirs.encode(x).latent_dist, ours.encode(x)
    assert difference(posterior.mean, their_latents(theirs, expected.mean)) < 1e-5
    eps = torch.randn_like(expected.mean)
    drawn = expected.mean + expected.std * eps
    assert difference(posterior.draw(eps), their_latents(theirs, drawn)) < 1e-5
    z = posterior.draw(eps)
    assert difference(ours.decode(z), theirs.decode(their_raw(theirs, z)).sample) < 1e-5


@pytest.mark.parametrize("name", THEIRS)
def test_a_diffusers_folder_encodes_and_decodes_alike_both_ways(name: str, tmp_path: Path) -> None:
    theirs = randomised(TheirAutoencoderKL(**(SMALL | THEIRS[name])))
    theirs.save_pretrained(tmp_path / "vae")
    codec, weights = codec_from_diffusers(*read_network(tmp_path / "vae"))
    assert_same(theirs, codec, weights)
    exported = codec_to_diffusers(codec, weights)
    write_network(tmp_path / "again", exported.config, exported.weights)
    again: Any = TheirAutoencoderKL.from_pretrained(tmp_path / "again")
    assert_same(again.eval(), codec, weights)
    private = ("_", "force_upcast")
    kept = {key: value for key, value in dict(theirs.config).items() if not key.startswith(private)}
    assert json.loads(json.dumps(kept)) == {key: json.loads(json.dumps(again.config[key])) for key in kept}
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_a_codec_made_here_opens_in_diffusers(tmp_path: Path) -> None:
    config = AutoencoderKLConfig(
        widths=(16, 24, 32), blocks=1, norm_groups=8, latents_mean=(1, 2, 3, 4), latents_std=(1, 2, 3, 4)
    )
    codec = Codec(config, channels=3, size=32)
    ours = randomised(codec.build())
    exported = codec_to_diffusers(codec, ours.state_dict())
    write_network(tmp_path, exported.config, exported.weights)
    theirs: Any = TheirAutoencoderKL.from_pretrained(tmp_path)
    assert_same(theirs.eval(), codec, ours.state_dict())
    assert codec_from_diffusers(*read_network(tmp_path))[0] == codec


def test_names_of_attention_before_2023_are_understood() -> None:
    theirs = randomised(TheirAutoencoderKL(**SMALL))
    old = dict(theirs.state_dict())
    for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = {key.replace(f".{new}.", f".{before}."): value for key, value in old.items()}
    assert old.keys() != theirs.state_dict().keys()
    config = dict(theirs.config) | {"_class_name": "AutoencoderKL"}
    _, weights = codec_from_diffusers(config, old)
    assert all(torch.equal(weights[k], v) for k, v in codec_from_diffusers(config, theirs.state_dict())[1].items())


@pytest.mark.parametrize(("config", "count"), [(STABLE_DIFFUSION, 83_653_863), (SDXL, 83_653_863), (SD3, 83_819_683)])
def test_parameters_of_published_codecs(config: AutoencoderKLConfig, count: int) -> None:
    with torch.device("meta"):
        ours = Codec(config, channels=3, size=512).build()
    assert sum(p.numel() for p in ours.parameters()) == count
    if config is STABLE_DIFFUSION:
        assert (
            sum(p.numel() for p in (*ours.encoder.parameters(), *(ours.quant_conv or ours).parameters())) == 34_163_664
        )
        assert sum(p.numel() for p in ours.decoder.parameters()) == 49_490_179
    assert config.latent_shape(512, 256) == (config.latent_channels, 64, 32)


@torch.no_grad()
def test_the_posterior_is_that_of_normalised_latents() -> None:
    """Its standard deviation too: a codec whose normaliser is 10 times the other's has posteriors 10 times as wide."""
    config = dataclasses.replace(TINY, likelihood="none")
    a = randomised(Codec(config, 3, 16).build())
    b = Codec(dataclasses.replace(config, scale=10.0, shift=0.5), 3, 16).build()
    b.load_state_dict(a.state_dict())
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    narrow, wide = a.encode(x), b.encode(x)
    torch.testing.assert_close(wide.mean, (narrow.mean - 0.5) * 10)
    torch.testing.assert_close(wide.log_variance.exp(), narrow.log_variance.exp() * 100)
    torch.testing.assert_close(b.decode(wide.mean), a.decode(narrow.mean), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale_of", ["channel", "pixel"])
def test_a_likelihood_has_a_scale_for_every_pixel(scale_of: Any) -> None:
    codec = Codec(dataclasses.replace(TINY, likelihood_scale=scale_of), channels=3, size=32)
    ours = randomised(codec.build())
    z = torch.randn(2, 4, 8, 8)
    mean, log_scale = ours.reconstruction(z)
    assert mean.shape == log_scale.shape == (2, 3, 32, 32)
    assert torch.equal(ours.decode(z), mean)
    assert (log_scale.std((0, 2, 3)) < 1e-6).all() == (scale_of == "channel")
    with pytest.raises(ValueError, match="likelihood"):
        codec_to_diffusers(codec, ours.state_dict())
    silent = Codec(dataclasses.replace(TINY, likelihood="none"), 3, 32).build()
    with pytest.raises(ValueError, match="fit a scale"):
        silent.reconstruction(z)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("act_fn", "relu"),
        ("down_block_types", ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")),
        ("up_block_types", ("UpDecoderBlock2D",)),
        ("out_channels", 4),
        ("sample_size", (16, 8)),
        ("latents_mean", (0.0, 0.0, 0.0, 0.0)),
        ("scaling_factor", 0.0),
        ("a_new_option", 1),
        ("_class_name", "AutoencoderDC"),
    ],
)
def test_what_we_have_not_is_refused_by_name(option: str, value: Any) -> None:
    theirs = TheirAutoencoderKL(**SMALL)
    config = dict(theirs.config) | {"_class_name": "AutoencoderKL"} | {option: value}
    named = {"_class_name": "AutoencoderDC", "scaling_factor": "scale"}.get(option, option)
    with pytest.raises(ValueError, match=named):
        codec_from_diffusers(config, theirs.state_dict())


def test_wrong_inputs_and_tensors_are_refused_by_name() -> None:
    theirs = TheirAutoencoderKL(**SMALL)
    config, weights = dict(theirs.config) | {"_class_name": "AutoencoderKL"}, theirs.state_dict()
    for wrong, named in (
        ({k: v for k, v in weights.items() if "conv_in" not in k}, "conv_in"),
        (weights | {"extra": torch.zeros(1)}, "extra"),
        ({k: v for k, v in weights.items() if "to_q" not in k}, "to_k"),
    ):
        with pytest.raises(ValueError, match=named):
            codec_from_diffusers(config, wrong)
    ours = Codec(dataclasses.replace(TINY, likelihood="none"), 3, 16).build()
    with pytest.raises(ValueError, match="18x16"):
        ours.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match="3 channels"):
        ours.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="4 channels"):
        ours.decode(torch.zeros(1, 3, 16, 16))


def test_folders_in_shards_are_read_and_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = TheirAutoencoderKL(**SMALL)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    config, weights = read_network(tmp_path / "theirs")
    assert weights.keys() == theirs.state_dict().keys()
    assert SHARD_BYTES > 1e9
    monkeypatch.setattr("pipeline.folders.SHARD_BYTES", 100_000)
    write_network(tmp_path / "ours", config, weights)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again: Any = TheirAutoencoderKL.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in weights.items())
    before = folder_digest(tmp_path / "ours")
    shard = min((tmp_path / "ours").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert folder_digest(tmp_path / "ours") != before
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        read_network(tmp_path / "ours")
    with pytest.raises(ValueError, match="only safetensors"):
        read_network(tmp_path / "ours", "other")
