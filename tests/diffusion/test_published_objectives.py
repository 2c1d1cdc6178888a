"""What the sources write of training and its bounds, each formula written down here once more."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.choose import build
from pipeline.diffusion.denoiser import Denoiser, Prediction, Process
from pipeline.diffusion.likelihood.bounds import vlb_discrete
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.objectives.loss import DENSITIES, draw_noise, noisy
from pipeline.diffusion.objectives.objective import OBJECTIVES, Weighted
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.scaling import SCALINGS, prior_variance
from pipeline.diffusion.schedule import VP, Cosine, LinearBeta, LinearGamma
from pipeline.model import ModelConfig
from pipeline.model import build as build_model
from tests.diffusion.objective_cases import NONE, GaussianNetwork, gaussian_denoiser, key, on_grid

F64 = torch.float64
X = on_grid(128, std=0.4)


# --- weights of one's own ---------------------------------------------------------------------------------------------


def test_a_formula_is_the_weight_it_writes() -> None:
    """min-SNR, P2 and the v-weight as formulas: the losses of their names."""
    denoiser = gaussian_denoiser(0.3)
    for name, text in (
        ("min_snr", "min(1, 5 / snr)"),
        ("p2", "1 / (1 + snr)"),
        ("v", "1 + 1 / snr"),
        ("x", "s ** 2"),
        ("eps", "alpha ** 2 + sigma ** 2"),
    ):
        formula = {"name": "weighted", "weight": "formula", "formula": text}  # as a run file has it
        got = build(OBJECTIVES, formula, "objective").loss(denoiser, X, NONE, key()).per_image
        named = Weighted(name).loss(denoiser, X, NONE, key()).per_image
        torch.testing.assert_close(got, named, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "formula"}, "objective.formula goes with objective.weight: formula"),
        ({"formula": "snr"}, "objective.formula goes with"),
        ({"weight": "table"}, "objective.table goes with"),
        ({"weight": "formula", "formula": "gamma.real"}, "objective.formula 'gamma.real'.*A formula has numbers"),
        ({"weight": "table", "table": [[0, 1]]}, "at least two rows"),
        ({"weight": "table", "table": [[0, 1], [1]]}, "two numbers each"),
        ({"weight": "table", "table": [[0, 1], [0, 2]]}, "gamma must ascend, got 0 after 0"),
        ({"weight": "table", "table": [[0, 1], [1, -2]]}, r"row 1 is \[1, -2\]"),
    ],
)
def test_bad_weights_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weighted(**options)


def test_a_weight_below_zero_is_refused_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"finite and at least 0, and is -9 at gamma = -9"):
        Weighted("formula", formula="gamma").loss(gaussian_denoiser(0.3), X, NONE, key())


# --- the mean as the target -------------------------------------------------------------------------------------------


def mean_denoiser(law: LinearBeta | Cosine, scaling: str = "vp", std: float = 0.3) -> Denoiser:
    parameterization = Parameterization("mean", scaling, table=law.table)
    return Denoiser(GaussianNetwork(parameterization, std), law, parameterization, level="log_sigma")


@pytest.mark.parametrize("law", [LinearBeta(50, 1e-4, 0.01), Cosine(40)], ids=["linear", "cosine"])
def test_the_mean_target_is_the_posterior_mean(law: LinearBeta | Cosine) -> None:
    """mu_q = [sqrt(a_t) (1 - abar_s) z_t + sqrt(abar_s) (1 - a_t) x] / (1 - abar_t), from the betas; x at step 0."""
    alphas = 1 - law.betas()
    abar = alphas.cumprod(0)
    before = torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
    x, eps = torch.tensor(0.37, dtype=F64), torch.tensor(-1.2, dtype=F64)
    z = abar.sqrt() * x + (1 - abar).sqrt() * eps
    mu = (alphas.sqrt() * (1 - before) * z + before.sqrt() * (1 - alphas) * x) / (1 - abar)
    a, b = Parameterization("mean", table=law.table).row(law.table)
    torch.testing.assert_close(a * x + b * eps, mu, rtol=1e-9, atol=1e-12)
    c_skip, c_out = Parameterization("mean", table=law.table).decode(law.table)
    torch.testing.assert_close(c_skip * z / abar.sqrt() + c_out * mu, x.expand(len(mu)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_regression_on_the_mean_is_its_own_error(scaling: str) -> None:
    """weight 'output' at the steps of the table: |mu_theta - mu_q|^2, mean over dimensions (Ho et al. 2020, eq. 8)."""
    law = LinearBeta(50, 1e-4, 0.01)
    denoiser = mean_denoiser(law, scaling)
    loss = Weighted("output", "table").loss(denoiser, X, NONE, key())
    x, eps, gamma = X.double(), draw_noise(X, key()).double(), loss.gamma
    y = noisy(X, gamma, eps.float())
    x_hat = denoiser(y, gamma, NONE).x_hat.double()
    a, b = (shaped(v, x) for v in denoiser.parameterization.row(gamma))
    s = shaped(torch.exp(gamma / 2), x)
    error = (a * (x_hat - x) + b * ((x - x_hat) / s)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.per_image, error, rtol=2e-2, atol=1e-9)
    same = Weighted("eps", "table").loss(denoiser, X, NONE, key()).per_image
    other = Weighted("eps", "table").loss(gaussian_denoiser(0.3, law, "eps", scaling), X, NONE, key()).per_image
    torch.testing.assert_close(same, other, rtol=2e-3, atol=1e-9)  # the same network by another output


def test_the_mean_needs_steps() -> None:
    with pytest.raises(ValueError, match="needs a schedule of steps"):
        gaussian_denoiser(0.3, LinearGamma(), "mean")
    config = {
        "size": 8,
        "channels": 1,
        "network": {"name": "unet", "base_width": 32, "attention_at": [4]},
        "prediction": "mean",
    }
    assert (
        build_model(ModelConfig(**config, schedule={"name": "cosine", "steps": 20})).parameterization.table is not None
    )
    with pytest.raises(ValueError, match=r"unknown prediction 'means' .did you mean 'mean'"):
        build_model(ModelConfig(**{**config, "prediction": "means"}))


# --- a table's own ends -----------------------------------------------------------------------------------------------


def test_tables_keep_their_own_ends() -> None:
    """abar_T of the published cosine law at T = 4000, betas clipped at 0.999; densities over all of its range."""
    t = torch.arange(4001, dtype=F64) / 4000
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    log_abar = torch.log1p(-(1 - f[1:] / f[:-1]).clamp(max=0.999)).sum()
    expected = float(torch.log(-torch.expm1(log_abar)) - log_abar)
    law = Cosine(4000)
    assert law.gamma_max == pytest.approx(expected, rel=1e-9)
    assert round(law.gamma_max, 2) == 22.61
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    for name in DENSITIES:
        gamma: Tensor = DENSITIES[name](law, -1.2, 1.2).gamma(ends)
        assert gamma.tolist() == pytest.approx([law.gamma_min, law.gamma_max], rel=1e-6), name
        loss = Weighted(density=name).loss(gaussian_denoiser(0.3, law), X, NONE, key())
        assert bool(torch.isfinite(loss.per_image).all()), name
    with pytest.raises(ValueError, match="20"):
        LinearGamma(-13.3, 22.61)


# --- VDM's bound of T steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_the_bound_of_t_steps_is_vdms(steps: int) -> None:
    """L_T = T/2 E_i[expm1(gamma(i/T) - gamma((i-1)/T)) |eps - eps_hat|^2] (Kingma et al. 2021, eq. 14), i = 1..T."""
    law, std, images = VP(), 0.3, on_grid(16, std=0.4)
    process = Process("vp", law.gamma_min, law.gamma_max, prior_variance("vp", law.gamma_max), law)

    def network(y: Tensor, gamma: Tensor, conditioning: Any, shared: object = None) -> Prediction:
        return Prediction(shaped(std**2 / (std**2 + torch.exp(gamma)), y) * y)

    procedure = vlb_discrete(images, process, Noise(range(70, 86)), NONE, pixels=PixelGrid(), steps=steps, spacing="t")
    found = drive(procedure, network)
    gamma = law.gamma(torch.arange(steps + 1, dtype=F64) / steps)
    weight = 0.5 * torch.expm1(gamma[1:] - gamma[:-1])
    square, d = images.double().square().flatten(1).mean(1), images[0].numel()
    k = std**2 / (std**2 + torch.exp(gamma[1:]))
    # eps_hat - eps = (1 - k) x / s - k eps
    errors = ((1 - k) ** 2 * torch.exp(-gamma[1:]))[None] * square[:, None] + k**2
    expected = d * (weight * errors).sum(1)
    error = found.standard_errors["noise"]
    pull = (found.parts["steps"] - expected) / error
    assert float(pull.square().mean()) < 4, pull  # 12 sigma of 16 values with few degrees of freedom
    assert float((found.parts["steps"] / expected - 1).abs().mean()) < 0.2
    asked = steps * (4 if steps < 8 else 1)
    assert found.evaluations.tolist() == [asked] * 16
    assert ESTIMATORS["vlb_discrete"].evaluations(d, {"steps": steps, "spacing": "t"}) == asked


def test_bad_spacings_are_refused() -> None:
    law = VP()
    straight = Process("vp", -9, 5, 1.0, LinearGamma(-9, 5))
    cases: list[tuple[Process, dict[str, Any], str]] = [
        (straight, {"spacing": "s"}, "unknown spacing 's'"),
        (straight, {"spacing": "t", "steps": 0}, "at least 1, got 0"),
        (Process("vp", -9, 5, 1.0), {"spacing": "t"}, "needs the model's time law"),
        (Process("vp", law.gamma_min, law.gamma_max, 1.0, law), {"spacing": "t", "gammas": [1.0, 0, -1]}, "no gammas"),
    ]
    for process, options, message in cases:
        with pytest.raises(ValueError, match=message):
            next(vlb_discrete(X, process, Noise(range(128)), NONE, pixels=PixelGrid(), **options))
