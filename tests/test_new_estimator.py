"""A new estimator is a procedure and its line in ESTIMATORS: nothing else is told of it."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs import choices
from pipeline.data.formats.codecs import encode_png
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser, Process
from pipeline.diffusion.likelihood.decoders import Grid
from pipeline.diffusion.likelihood.estimate import Likelihood
from pipeline.diffusion.likelihood.estimators import ESTIMATORS, Estimator
from pipeline.diffusion.procedure import Procedure, Query
from pipeline.diffusion.randomness import Noise
from pipeline.evaluation.bits_per_dim import joined
from pipeline.evaluation.measure import title_of
from pipeline.model import Model, ModelConfig, Scoring, build
from pipeline.serving.config import ServingConfig
from pipeline.serving.plans import plan_likelihood
from pipeline.serving.refusals import RequestError
from pipeline.serving.requests import LikelihoodOptions

NETWORK = {"name": "unet", "base_width": 8, "multipliers": [1], "blocks": 1, "attention_at": []}
PIXELS = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
D = 16


def gaussian(
    x: Tensor,
    process: Process,
    noise: Noise,
    conditioning: Conditioning,
    *,
    pixels: Grid,
    looks: int = 3,
    depth: float = 0.0,
) -> Procedure[Likelihood]:
    """Bits by a Gaussian around the mean of a few x_hat.

    looks: network evaluations.
    """
    total = torch.zeros_like(x)
    for _ in range(looks):
        gamma = torch.full((len(x),), depth, dtype=torch.float64)
        total += (yield Query(x + noise.normal_like(x), gamma, conditioning)).x_hat
    error = (x - total / looks).double().square().flatten(1).sum(1)
    parts = {"gaussian": 0.5 * (error + D * math.log(2 * math.pi))}
    return Likelihood(
        parts["gaussian"], parts, {"noise": torch.zeros(len(x)).double()}, torch.full((len(x),), looks), D
    )


def looks(dimensions: int, options: Mapping[str, Any]) -> float:
    return options["looks"]


def middle(options: Mapping[str, Any], model: Denoiser) -> Mapping[str, Any]:
    return {"depth": (model.schedule.gamma_min + model.schedule.gamma_max) / 2, **options}


def model(**changes: Any) -> Model:
    torch.manual_seed(0)
    config = ModelConfig(4, 1, network=NETWORK, prediction="v", **changes)
    return Model(config, build(config))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Estimator:
    made = Estimator(gaussian, "Gaussian around x_hat", looks, middle, clips=True)
    monkeypatch.setitem(ESTIMATORS, "gaussian", made)
    return made


def test_a_new_estimator_is_scored_with_what_it_needs_of_the_model(toy: Estimator) -> None:
    """Its `needs` reach it, its options too, and one that it has not is refused by its names."""
    made = model()
    found = made.bits_per_dim(PIXELS, "gaussian", looks=2)
    assert found.evaluations.tolist() == [2, 2, 2]
    law = made.denoiser.schedule
    same = made.bits_per_dim(PIXELS, "gaussian", looks=2, depth=(law.gamma_min + law.gamma_max) / 2)
    other = made.bits_per_dim(PIXELS, "gaussian", looks=2, depth=law.gamma_min)
    assert torch.equal(found.nats, same.nats)
    assert not torch.equal(found.nats, other.nats)
    assert not torch.equal(found.nats, made.bits_per_dim(PIXELS, "gaussian", looks=2, clip=0.01).nats)
    with pytest.raises(ValueError, match="'gaussian' has no option 'steps'; it has: looks, depth, clip"):
        made.bits_per_dim(PIXELS, "gaussian", steps=2)


def test_a_new_estimator_is_served_at_its_price(toy: Estimator) -> None:
    image = encode_png(PIXELS[0].permute(1, 2, 0).numpy())

    def planned(limit: int, **options: Any) -> int:
        request = LikelihoodOptions.model_validate({"estimator": "gaussian", "options": options})
        return plan_likelihood(request, [image, image], model(), ServingConfig(max_request_cost=limit), 0).cost

    assert planned(10**6) == 2 * 3
    assert planned(10**6, looks=50) == 2 * 50
    assert planned(2 * 50 * D, looks=50) == 2 * 50
    with pytest.raises(RequestError, match="2 images x 51 network evaluations"):
        planned(2 * 50 * D, looks=51)
    with pytest.raises(RequestError, match="did you mean 'looks'"):
        planned(10**6, look=1)


def test_a_new_estimator_is_in_the_help_and_in_reports(toy: Estimator) -> None:
    text = choices.describe(["evaluation"])
    part = text.split("\n  gaussian:  Bits by a Gaussian around the mean of a few x_hat.")[1]
    assert "    looks                    network evaluations [3]" in part
    assert title_of("gaussian") == "Gaussian around x_hat"
    assert title_of("of an older release") == "of an older release"
    assert joined("gaussian", [model().bits_per_dim(PIXELS, "gaussian")]).evaluations == 3


CASES: list[tuple[str, dict[str, Any]]] = [
    ("vlb", {"levels": 5}),
    ("vlb", {"levels": 5, "decoder": "gaussian", "decoder_draws": 3}),
    ("vlb_discrete", {"steps": 6}),
    ("vlb_discrete", {"steps": 6, "terms": 3}),
    ("vlb_discrete", {"steps": 5, "spacing": "t"}),
    ("vlb_discrete", {"steps": 9, "spacing": "t", "decoder": "softmax"}),
    ("ddim_bound", {"steps": 6, "decoder_draws": 2}),
    ("ddim_bound", {"gammas": [4.0, 1.0, 0.0, -2.0]}),
]


@pytest.mark.parametrize("law", ["linear_beta", "linear_gamma"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_bounds_price_is_what_it_takes(name: str, options: dict[str, Any], law: str) -> None:
    """With a table of steps, whose bounds have another decoder, and without one."""
    made = model(schedule={"name": law, **({"steps": 20, "beta_end": 0.01} if law == "linear_beta" else {})})
    taken = made.bits_per_dim(PIXELS, Scoring(name, options)).evaluations
    completed = made.scoring_options(Scoring(name, options))
    assert taken.tolist() == [ESTIMATORS[name].evaluations(D, completed)] * 3
