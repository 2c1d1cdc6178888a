"""Score matching: denoising (Vincent 2011; Song & Ermon 2019; Song et al. 2021) and implicit (Hyvarinen 2005).

All at the noisy y = x + s eps, weighted with s^2 as the field does: s score(y) = -eps_hat, so that the denoising loss
is 1/2 |eps_hat - eps|^2 and the implicit one 1/2 |eps_hat|^2 - s tr(d eps_hat / d y); their expectations differ by 1/2.
Losses are means over an image's dimensions.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objectives.loss import (
    DENSITIES,
    WEIGHTS,
    Level,
    Loss,
    Nodes,
    Quantile,
    check_trains,
    draw_noise,
    draw_uniform,
    eps_factor,
    noisy,
    regress,
)
from pipeline.diffusion.randomness import StepKey
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.schedule import Schedule

EXACT_TRACE_LIMIT = 256  # dimensions; each costs a backward pass that is itself differentiated


def _levels(schedule: Schedule, levels: int) -> Quantile:
    """levels > 0: that many at equal t, equally likely (one: the lowest); 0: uniform t."""
    if levels < 0:
        raise ValueError(f"objective.levels must be at least 0 (0: continuous), got {levels}")
    return Nodes(schedule.gamma(torch.linspace(0, 1, levels, dtype=torch.float64))) if levels else schedule


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """1/2 weight |score(y) - grad log q(y | x)|^2, on discrete noise levels (NCSN) or in continuous time.

    weighting 'sigma2' multiplies by s^2; 'likelihood' by the squared diffusion coefficient of the SDE, which makes it
    the diffusion term of the bound, in nats a dimension (Song et al. 2021, "Maximum likelihood training of score-based
    diffusion models"). Uniform t then has a large variance; `importance` draws t in proportion to that weight, which
    is uniformly in gamma.
    """

    levels: Annotated[int, "noise levels, equally spaced in t (geometric sigma: NCSN); 0: continuous"] = 0
    weighting: Annotated[str, "sigma2 or likelihood"] = "sigma2"
    importance: Annotated[bool, "weighting likelihood: draw t in proportion to the weight"] = True
    stratified: Annotated[bool, "spread the levels of the global batch evenly (less variance)"] = True

    def __post_init__(self) -> None:
        choose(dict.fromkeys(("sigma2", "likelihood")), self.weighting, "objective.weighting")
        if self.levels < 0:
            raise ValueError(f"objective.levels must be at least 0 (0: continuous), got {self.levels}")
        if self.levels and self.weighting == "likelihood":
            raise ValueError("objective.weighting 'likelihood' needs continuous time: set levels: 0")

    def loss(self, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        check_trains(denoiser, "score_matching")
        likelihood = self.weighting == "likelihood"
        if likelihood and self.importance:
            quantile = DENSITIES["uniform_gamma"](denoiser.schedule, 0.0, 1.0)
        else:
            quantile = _levels(denoiser.schedule, self.levels)
        u = draw_uniform(len(x), key, stratified=self.stratified, device=x.device)
        level = Level(u, quantile, denoiser.parameterization, snr_cap=1.0)
        error = regress(denoiser, x, level.gamma, draw_noise(x, key), conditioning).error
        weighted = WEIGHTS["elbo"](level) * error if likelihood else 0.5 * error
        return Loss(weighted, {"error": error.detach(), "weighted": weighted.detach()}, level.gamma)


# --- implicit: no target, the divergence instead ------------------------------------------------------------


def _products(eps_hat: Tensor, y: Tensor, vectors: Tensor) -> Tensor:
    """v^T (d eps_hat / d y) v for each of the vectors (k, b, ...): (k, b), itself differentiable."""
    rows = [(torch.autograd.grad(eps_hat, y, v, create_graph=True)[0] * v).flatten(1).sum(1) for v in vectors]
    return torch.stack(rows)


def _unit_vectors(y: Tensor) -> Tensor:
    """(D, b, ...)."""
    d = y[0].numel()
    return torch.eye(d, dtype=y.dtype, device=y.device).view(d, 1, *y.shape[1:]).expand(d, *y.shape)


def _exact(eps_hat: Tensor, y: Tensor, probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if y[0].numel() > EXACT_TRACE_LIMIT:
        raise ValueError(
            f"objective.trace 'exact' takes one backward pass a dimension; the images have {y[0].numel()}, "
            f"the limit is {EXACT_TRACE_LIMIT}: use hutchinson or sliced"
        )
    return eps_hat.square().flatten(1).sum(1), _products(eps_hat, y, _unit_vectors(y)).sum(0)


def _hutchinson(eps_hat: Tensor, y: Tensor, probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    signs = torch.empty(probes, *y.shape, dtype=y.dtype, device=y.device).bernoulli_(0.5, generator=generator)
    return eps_hat.square().flatten(1).sum(1), _products(eps_hat, y, 2 * signs - 1).mean(0)


def _sliced(eps_hat: Tensor, y: Tensor, probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both terms along random directions (Song et al. 2019, "Sliced score matching")."""
    v = torch.randn(probes, *y.shape, generator=generator, dtype=y.dtype, device=y.device)
    return (v * eps_hat).flatten(2).sum(2).square().mean(0), _products(eps_hat, y, v).mean(0)


TRACES = {
    "exact": _exact,
    "hutchinson": _hutchinson,
    "sliced": _sliced,
}  # (|eps_hat|^2, tr(d eps_hat / d y)), (b,) each


@dataclass(frozen=True)
class ImplicitScoreMatching:
    """s^2 (1/2 |score|^2 + div score) at y, without a target: 1/2 |eps_hat|^2 - s tr(d eps_hat / d y).

    Costs one differentiated backward pass a probe. levels 1 fits the score at the schedule's lowest level alone.
    """

    trace: Annotated[str, "exact (D passes), hutchinson (random signs) or sliced (random directions, both terms)"] = (
        "hutchinson"
    )
    probes: Annotated[int, "random vectors an image"] = 1
    levels: Annotated[int, "noise levels, equally spaced in t (geometric sigma: NCSN); 0: continuous"] = 0
    stratified: Annotated[bool, "spread the levels of the global batch evenly (less variance)"] = True

    def __post_init__(self) -> None:
        choose(TRACES, self.trace, "objective.trace")
        if self.probes < 1:
            raise ValueError(f"objective.probes must be at least 1, got {self.probes}")
        if self.levels < 0:
            raise ValueError(f"objective.levels must be at least 0 (0: continuous), got {self.levels}")

    def loss(self, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        check_trains(denoiser, "implicit_score_matching")
        u = draw_uniform(len(x), key, stratified=self.stratified, device=x.device)
        gamma = _levels(denoiser.schedule, self.levels).gamma(u)
        y = noisy(x, gamma, draw_noise(x, key)).requires_grad_()
        generator = key.generator("probes", device=x.device)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
            output = denoiser.raw(y, gamma, conditioning).to(y.dtype)
            a, _ = denoiser.parameterization.row(gamma)
            eps_hat = shaped(eps_factor(denoiser.parameterization, gamma), y) * (output - shaped(a, y) * y)
            square, trace = TRACES[self.trace](eps_hat, y, self.probes, generator)
        d = y[0].numel()
        norm, divergence = 0.5 * square.double() / d, -torch.exp(gamma / 2) * trace.double() / d
        return Loss(norm + divergence, {"norm": norm.detach(), "divergence": divergence.detach()}, gamma)
