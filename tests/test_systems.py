"""Every published system's run file: it trains, samples and is scored through the same code."""

from pathlib import Path
from statistics import median

import pytest
import torch

from pipeline.choose import build as build_choice
from pipeline.config import load_config
from pipeline.diffusion.objective import OBJECTIVES
from pipeline.diffusion.randomness import StepKey
from pipeline.model import Model, Sampling, Scoring, build
from pipeline.training.step import TrainingModule

FILES = sorted((Path(__file__).parent.parent / "jobs" / "configs").glob("digits*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_step_lowers_the_loss_and_the_model_samples_and_scores(path: Path) -> None:
    config = load_config(str(path), ["model.network.base_width=16", "model.network.dropout=0"])
    torch.manual_seed(0)
    denoiser = build(config.model)
    module = TrainingModule(denoiser, build_choice(OBJECTIVES, config.objective, "objective"), config.model.classes)
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3)
    pixels = torch.full((16, *config.model.shape), 200, dtype=torch.uint8)  # what can be learnt in a few steps
    labels = torch.arange(16) % 10
    losses = []
    for step in range(12):
        loss = module(pixels, labels, StepKey(0, step, 0, 1)).per_image.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses)))
    assert median(losses[-4:]) < median(losses[:4])  # L_vlb has a step of huge loss now and then

    model = Model(config.model, denoiser)
    how = config.evaluation.sampling
    few = Sampling(how.sampler, 5, how.grid, None, 1.0, how.options)
    made = model.sample(2, [1, 2], how=few)
    assert made.shape == (2, *config.model.shape)
    for estimator in config.evaluation.estimators:
        found = model.bits_per_dim(
            pixels[:2], [1, 2], how=Scoring(estimator, {"levels": 4} if estimator == "vlb" else {})
        )
        assert torch.isfinite(found.bits_per_dim).all()
