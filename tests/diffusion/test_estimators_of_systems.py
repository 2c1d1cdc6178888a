"""Any model by any estimator: in theory, and from every published system's run file with options as plain as there."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load_config
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.oracles.exact import oracle_denoiser
from pipeline.diffusion.parameterization import PREDICTIONS, Parameterization
from pipeline.diffusion.sampling.grids import explicit_grid, grid
from pipeline.diffusion.scaling import SCALINGS
from pipeline.diffusion.schedule import SCHEDULES, LearnedGamma
from pipeline.model import Model, ModelConfig, Sampling, Scoring, build
from tests.diffusion.likelihood_cases import estimate, gaussian_field, grey_images
from tests.diffusion.sampler_cases import pairwise

FILES = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("digits_*.yaml"))
QUICK: dict[str, dict[str, Any]] = {
    "vlb": {"levels": 4},
    "vlb_discrete": {"steps": 6},
    "ddim_bound": {"steps": 6},
    "ode": {"tolerance": 0.3},
}
PIXELS = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def small(config: ModelConfig) -> Model:
    torch.manual_seed(0)
    config = replace(
        config, size=4, network={"name": "unet", "base_width": 8, "multipliers": [1], "blocks": 1, "attention_at": []}
    )
    return Model(config, build(config))


def test_any_model_by_any_estimator() -> None:
    """A pairwise covering of schedule x scaling x prediction x estimator: a perfect network's value is the oracle's."""
    oracle, x = gaussian_field(2), grey_images(1, 2)
    laws = [LearnedGamma(hidden=8) if name == "learned" else law() for name, law in SCHEDULES.items()]
    scalings, predictions, estimators = list(SCALINGS), list(PREDICTIONS), list(ESTIMATORS)
    for a, b, c, d in pairwise(*map(len, (laws, scalings, predictions, estimators))):
        denoiser = oracle_denoiser(oracle, laws[a], Parameterization(predictions[c], scalings[b]))
        options = QUICK[estimators[d]]
        got = estimate(estimators[d], denoiser, x, facts=denoiser.process, **options)
        expected = estimate(estimators[d], oracle, x, facts=denoiser.process, **options)
        case = laws[a], scalings[b], predictions[c], estimators[d]
        assert torch.allclose(got.nats, expected.nats, rtol=1e-6), case
        assert torch.equal(got.evaluations, expected.evaluations), case


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_estimator_scores_every_system(path: Path) -> None:
    model = small(load_config(str(path), []).model)
    assert set(QUICK) == set(ESTIMATORS)
    for estimator, options in QUICK.items():
        found = model.bits_per_dim(PIXELS, Scoring(estimator, options), labels=[1, 2])
        assert bool(torch.isfinite(found.bits_per_dim).all()), estimator
        assert bool(torch.isfinite(found.standard_error).all()), estimator


def scored(model: Model, estimator: str, **options: Any) -> dict[str, Any]:
    return model.scoring_options(Scoring(estimator, options))


def table_model(**changes: Any) -> Model:
    return small(ModelConfig(4, 1, schedule={"name": "linear_beta", "steps": 20, "beta_end": 0.01}, **changes))


@pytest.mark.parametrize("estimator", ["vlb_discrete", "ddim_bound"])
def test_a_bound_over_steps_is_that_of_the_models_table(estimator: str) -> None:
    model = table_model()
    schedule = model.denoiser.schedule
    assert torch.equal(scored(model, estimator)["gammas"], grid("linspace", schedule, 20))
    assert torch.equal(scored(model, estimator, steps=4)["gammas"], grid("linspace", schedule, 4))
    assert scored(model, estimator)["decoder"] == "gaussian"
    assert scored(model, estimator, decoder="softmax")["decoder"] == "softmax"
    by_name = model.bits_per_dim(PIXELS, how=Scoring(estimator, {"steps": 20}))
    assert torch.equal(model.bits_per_dim(PIXELS, how=Scoring(estimator)).nats, by_name.nats)
    assert by_name.evaluations.tolist() == [19 + 4] * 2  # every step, four draws of the decoder's
    listed = explicit_grid(schedule, [0, 3, 9, 19]).tolist()
    subset = model.bits_per_dim(PIXELS, how=Scoring(estimator, {"gammas": listed}))
    assert subset.evaluations.tolist() == [3 + 4] * 2


def test_learned_variance_is_used_where_the_model_has_it() -> None:
    plain, learned = table_model(), table_model(learned_variance=True)
    assert "variance" not in scored(plain, "vlb_discrete")
    assert scored(learned, "vlb_discrete")["variance"] == "learned"
    assert scored(learned, "vlb_discrete", variance="beta")["variance"] == "beta"
    assert "variance" not in scored(learned, "ddim_bound")  # whose variance is eta's
    values = {
        name: float(learned.bits_per_dim(PIXELS, how=Scoring("vlb_discrete", {"variance": name})).nats.sum())
        for name in ("learned", "beta", "posterior")
    }
    assert len({round(value, 3) for value in values.values()}) == 3
    assert values["learned"] == float(learned.bits_per_dim(PIXELS, how=Scoring("vlb_discrete")).nats.sum())
    with pytest.raises(ValueError, match="needs a network with a variance head"):
        plain.bits_per_dim(PIXELS, how=Scoring("vlb_discrete", {"variance": "learned"}))


def test_a_law_without_a_table_is_walked_in_even_steps_of_gamma() -> None:
    model = small(ModelConfig(4, 1, schedule={"name": "linear_gamma"}))
    assert scored(model, "vlb_discrete", steps=9) == {"steps": 9}
    assert model.bits_per_dim(PIXELS, how=Scoring("vlb_discrete", {"steps": 9})).evaluations.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        ("vlb", {"gammas": [1.0]}, "estimator 'vlb' has no option 'gammas'; it has: levels"),
        ("vlb_discrete", {"pixels": 3}, "has no option 'pixels'"),
        ("vlb_discrete", {"steps": 21}, r"steps must be an integer in 3\.\.20, the table's, got 21"),
        ("vlb_discrete", {"steps": 2}, "got 2"),
        ("ddim_bound", {"steps": 3.5}, "got 3.5"),
        ("vlb_discrete", {"gammas": [0.0, 1.0, 2.0]}, "strictly descending"),
        ("vlb_discrete", {"gammas": [math.inf, 1.0, 0.0]}, "leave"),
    ],
)
def test_bad_options_are_named(estimator: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_model().bits_per_dim(PIXELS, how=Scoring(estimator, options))


def test_by_plain_names() -> None:
    model = small(ModelConfig(4, 1, classes=3))
    how = Scoring("ode", {"tolerance": 0.3})
    expected = model.bits_per_dim(PIXELS, how=how).nats
    assert torch.equal(model.bits_per_dim(PIXELS, "ode", tolerance=0.3).nats, expected)
    labelled = model.bits_per_dim(PIXELS, how, labels=[1, 2]).nats
    assert torch.equal(model.bits_per_dim(PIXELS, "ode", labels=[1, 2], tolerance=0.3).nats, labelled)
    made = model.sample(2, Sampling("ddim", 4, options={"eta": 0.5}), labels=[1, 2])
    assert torch.equal(model.sample(2, "ddim", labels=[1, 2], steps=4, eta=0.5), made)
    assert torch.equal(model.sample(2, labels=[1, 2], how="ddim", steps=4, eta=0.5), made)
    assert torch.equal(model.sample(2, steps=4), model.sample(2, "heun", steps=4))
    for call, message in (
        (lambda: model.sample(2, "huen"), "did you mean 'heun'"),
        (lambda: model.sample(2, "heun", eta=0.5), "no option 'eta'"),
        (lambda: model.bits_per_dim(PIXELS, "ode", levels=3), "no option 'levels'"),
        (lambda: model.bits_per_dim(PIXELS, how=how, tolerance=0.1), "a Scoring has its own"),
        (lambda: model.bits_per_dim(PIXELS, chunk=0), "chunk must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
