"""Folders that the real diffusers opens and samples from, and their weights as the start of a training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

from pipeline import interchange
from pipeline.assembly import start_from
from pipeline.diffusion.conditioning import Conditioning
from pipeline.model import Model, ModelConfig, build
from pipeline.training.restore import RunError

NETWORK = {
    "name": "unet",
    "base_width": 8,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention_at": [4],
    "norm_groups": 4,
    "norm_group_width": 1,
    "dropout": 0.0,
}
CONFIG = ModelConfig(size=8, channels=1, network=NETWORK, schedule={"name": "linear_beta"}, prediction="eps")


def model(config: ModelConfig = CONFIG, card: dict[str, Any] | None = None) -> Model:
    torch.manual_seed(0)
    made = build(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Model(config, made, card)


@pytest.mark.parametrize("prediction", ["eps", "x", "v"])
@pytest.mark.parametrize("schedule", [{"name": "linear_beta"}, {"name": "cosine", "steps": 200}])
def test_diffusers_opens_it_samples_and_agrees(tmp_path: Path, prediction: str, schedule: dict[str, Any]) -> None:
    ours = model(replace(CONFIG, prediction=prediction, schedule=schedule))
    interchange.export(ours, tmp_path)
    pipe: Any = DDPMPipeline.from_pretrained(str(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    table = ours.denoiser.schedule.table
    assert table is not None
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.double(), torch.sigmoid(-table), rtol=1e-4, atol=1e-7)
    z = torch.randn(1, 1, 8, 8)
    pipe.scheduler.config.clip_sample = False
    pipe.scheduler.set_timesteps(len(table))
    for t in (0, len(table) // 3, len(table) - 1):
        with torch.no_grad():
            output = pipe.unet(z, t).sample
        theirs = pipe.scheduler.step(output, t, z).pred_original_sample
        gamma = table[t : t + 1]
        alpha = torch.sigmoid(-gamma).sqrt().float()
        x_hat = ours.denoiser(z / alpha, gamma, Conditioning()).x_hat
        torch.testing.assert_close(theirs, x_hat, rtol=2e-4, atol=2e-4 * float(x_hat.abs().max()))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"schedule": {"name": "edm"}, "level": "log_sigma", "scaling": "ve"}, "schedule is edm"),
        ({"level": "normalised_gamma"}, "level is 'normalised_gamma'"),
        ({"prediction": "flow"}, "prediction is flow"),
        ({"learned_variance": True}, "learned_variance is True"),
        ({"network": {"name": "vdm", "width": 8, "layers": 1}}, "network is vdm"),
        ({"network": {**NETWORK, "skip_scale": 0.5}}, "skip_scale is 0.5"),
        ({"classes": 3}, "passes no labels"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(tmp_path: Path, change: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        interchange.export(model(replace(CONFIG, **change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_guided_model_is_exported_without_its_labels(tmp_path: Path) -> None:
    ours = model(replace(CONFIG, classes=3), {"label_dropout": 0.1})
    interchange.export(ours, tmp_path)
    unet: Any = DDPMPipeline.from_pretrained(str(tmp_path)).unet  # pyright: ignore[reportAttributeAccessIssue]
    z, level = torch.randn(2, 1, 8, 8), torch.tensor([5.0, 800.0])
    with torch.no_grad():
        expected = ours.denoiser.network(z, level, Conditioning())
        torch.testing.assert_close(unet(z, level.long()).sample, expected, rtol=1e-4, atol=1e-5)


def test_a_training_starts_from_such_a_folder(tmp_path: Path) -> None:
    ours = model()
    interchange.export(ours, tmp_path)
    for folder in (tmp_path, tmp_path / "unet"):
        fresh = build(CONFIG)
        start_from(fresh, CONFIG, str(folder), None)
        pairs = zip(fresh.state_dict().values(), ours.denoiser.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_weights_that_would_mean_something_else_are_refused(tmp_path: Path) -> None:
    interchange.export(model(), tmp_path)
    wider = replace(CONFIG, network={**NETWORK, "base_width": 16})
    with pytest.raises(RunError, match=r"init: the weights of .* do not fit"):
        start_from(build(wider), wider, str(tmp_path), None)
    other = replace(CONFIG, network={**NETWORK, "embedding_order": "cos_sin"})
    with pytest.raises(RunError, match="computes something else"):
        start_from(build(other), other, str(tmp_path), None)
    predicts_v = replace(CONFIG, prediction="v")
    with pytest.raises(RunError, match=r"predicts epsilon, model\.prediction is v"):
        start_from(build(predicts_v), predicts_v, str(tmp_path), None)
    (tmp_path / "unet" / interchange.WEIGHTS).unlink()
    with pytest.raises(RunError, match="only safetensors are read"):
        start_from(build(CONFIG), CONFIG, str(tmp_path), None)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
