"""Variational diffusion models: the bound on bits/dim as an objective, schedule fixed or learnt (Kingma et al. 2021).

A learned schedule's end points follow the bound itself. Its interior does not change the bound in continuous time, only
the variance of its estimate, and follows the gradient of that. With gamma' = d gamma / dt, e the error of eps_hat and
l = gamma' e / 2 the estimate at a uniform t, the second moment is J = E[l^2] = 1/4 E[gamma'^2 e^2]. Its variation under
an interior change d(t), d(0) = d(1) = 0, has a term in the derivative of e along gamma, which would need a second
backward pass (Kingma et al. 2021, appendix I.2); integrated by parts, that term is gone:

    dJ = 1/4 E[ e^2 (gamma' d' - gamma'' d) ]

so the surrogate 1/4 sum_i e_i^2 (gamma'_i gamma'(t_i; phi) - gamma''_i gamma(t_i; phi)), coefficients detached, has an
unbiased gradient in one ordinary backward.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.likelihood.decoders import expected_softmax
from pipeline.diffusion.objectives.loss import Loss, UniformGamma, draw_noise, draw_uniform, regress
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.randomness import StepKey
from pipeline.diffusion.scaling import SCALINGS
from pipeline.diffusion.schedule import LearnedGamma, Schedule, derivative

BIT = math.log(2)


# --- the terms without a network, differentiable in the end points --------------------------------


def prior_nats(x: Tensor, gamma_max: Tensor, scaling: str) -> Tensor:
    """KL( N(x, s_1^2) || N(0, v) ) of y at gamma_max: mean over an image's dimensions, (b,) float64.

    v = 1 / alpha_1^2 where the model says z_1 ~ N(0, I), s_1^2 for 've'; gamma_max is a float64 scalar.
    """
    alpha = SCALINGS[scaling](gamma_max)
    ratio = torch.ones_like(gamma_max) if scaling == "ve" else alpha**2 * torch.exp(gamma_max)  # s_1^2 / v
    mean_square = x.double().square().flatten(1).mean(1)
    return 0.5 * (mean_square * ratio * torch.exp(-gamma_max) + ratio - 1 - torch.log(ratio))


def softmax_nats(gamma_min: Tensor, index: Tensor, pixels: PixelGrid) -> Tensor:
    """E over y_0 of -log p(u | y_0), the softmax decoder's term, by quadrature: mean over dimensions, (b,) float64.

    As `expected_softmax`, but differentiable in gamma_min. With k the distance between two levels, y_0 - v = k bin +
    s_0 eps needs no images; levels further than 16 s_0 carry less than 1e-10, and only pixels that near to an end
    differ from the others.
    """
    s = torch.exp(gamma_min / 2)
    last = pixels.levels - 1
    reach = min(last, math.ceil(16 * float(s.detach()) / pixels.bin) + 1)
    alike = max(0, last - 2 * reach)  # levels reach..last - reach have equal neighbours: one row for all
    level = torch.arange(last + 1 - alike, device=index.device)
    level = torch.where(level > reach, level + alike, level)
    eps = torch.linspace(-9, 9, 181, dtype=torch.float64, device=index.device)
    weight = torch.exp(-0.5 * eps**2) / math.sqrt(2 * math.pi) * (eps[1] - eps[0])
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64, device=index.device)
    outside = (level[:, None] + offset < 0) | (level[:, None] + offset > last)
    logits = -0.5 * (offset * pixels.bin / s - eps[:, None]) ** 2
    log_sum = torch.logsumexp(logits.masked_fill(outside[:, None], -math.inf), -1)
    table = ((log_sum + 0.5 * eps**2) * weight).sum(-1)
    return table[index - (index - reach).clamp(0, alike)].flatten(1).mean(1)


# --- the schedule, split into what the bound and what the variance may move -----------------------


class Path(NamedTuple):
    """gamma and slope = gamma'(t) at t (b,): gradient to learnt end points alone. Ends: float64 scalars, with theirs.

    fraction: (value, derivative, second derivative) of the normalised interior, gradient to a learnt one, or None.
    """

    gamma: Tensor
    slope: Tensor
    gamma_min: Tensor
    gamma_max: Tensor
    fraction: tuple[Tensor, Tensor, Tensor] | None = None


def path(schedule: Schedule, t: Tensor, density: str = "schedule") -> Path:
    """The law at t (b,) float64, for the continuous bound; density 'uniform_gamma' puts the straight line for it.

    Raises:
        ValueError: another density than its own for a learnt law.
    """
    if not isinstance(schedule, LearnedGamma):
        low, high = t.new_tensor([schedule.gamma_min, schedule.gamma_max])
        law = UniformGamma(schedule.gamma_min, schedule.gamma_max) if density == "uniform_gamma" else schedule
        return Path(law.gamma(t), derivative(law.gamma, t), low, high)
    if density != "schedule":
        raise ValueError("a learned schedule is its own density: set objective.density: schedule")
    low, high = schedule.ends
    fraction, slope, curvature = schedule.interior(t)
    interior = (fraction, slope, curvature.detach()) if fraction.requires_grad else None
    return Path(low + (high - low) * fraction.detach(), (high - low) * slope.detach(), low, high, interior)


def interior_surrogate(p: Path, error: Tensor) -> Tensor:
    """(b,) zeros with the gradient of E[l^2] in the schedule's interior, l = slope error / 2 in the unit of error."""
    if p.fraction is None:
        return torch.zeros_like(error)
    fraction, slope, curvature = p.fraction
    width = (p.gamma_max - p.gamma_min).detach()
    moment = 0.25 * (width * error.detach()) ** 2
    surrogate = moment * (slope.detach() * slope - curvature * fraction)
    return surrogate - surrogate.detach()


# --- the objective --------------------------------------------------------------------------------


@dataclass(frozen=True)
class VLB:
    """The bound of a variational diffusion model, bits/dim: prior + diffusion + reconstruction (Kingma et al. 2021).

    steps 0, continuous time: diffusion = 1/2 gamma'(t) |eps_hat - eps|^2 (eq. 17). steps T: T/2 expm1(gamma_t -
    gamma_s) |eps_hat - eps|^2 with t uniform on 1/T..1 and s = t - 1/T (eq. 14); a learnt schedule then follows the
    bound throughout. Only the diffusion term is drawn: prior and reconstruction are exact.

    In continuous time the value depends on the end points alone; laws that hurry through part of the range (edm, flow)
    make its estimate noisy, which density 'uniform_gamma' mends.
    """

    steps: Annotated[int, "steps T of the discrete bound; 0: continuous time"] = 0
    density: Annotated[str, "continuous time: draw gamma by the schedule's t (schedule) or uniform_gamma"] = "schedule"
    stratified: Annotated[bool, "spread the times of the global batch evenly over 0..1 (less variance)"] = True
    pixels: Annotated[PixelGrid, "where the grey levels lie in model space"] = field(default_factory=PixelGrid)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"objective vlb: steps must be at least 0 (0: continuous time), got {self.steps}")
        choose(dict.fromkeys(("schedule", "uniform_gamma")), self.density, "objective.density")
        if self.steps and self.density != "schedule":
            raise ValueError("objective vlb: density 'uniform_gamma' goes with continuous time alone, steps: 0")

    def loss(self, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        """x on the pixel grid. Raises ValueError where it is not."""
        t = draw_uniform(len(x), key, stratified=self.stratified, device=x.device)
        eps = draw_noise(x, key)
        p, factor = (self._discrete if self.steps else self._continuous)(denoiser.schedule, t)
        error = regress(denoiser, x, p.gamma, eps, conditioning).error / BIT
        parts = {
            "prior": prior_nats(x, p.gamma_max, denoiser.parameterization.scaling) / BIT,
            "diffusion": factor * error,
            "reconstruction": self._reconstruction(p.gamma_min, x) / BIT,
        }
        per_image = torch.stack(list(parts.values())).sum(0) + interior_surrogate(p, error)
        return Loss(per_image, {name: part.detach() for name, part in parts.items()}, p.gamma.detach())

    def _continuous(self, schedule: Schedule, t: Tensor) -> tuple[Path, Tensor]:
        p = path(schedule, t, self.density)
        return p, 0.5 * p.slope

    def _discrete(self, schedule: Schedule, t: Tensor) -> tuple[Path, Tensor]:
        """gamma with its full gradient: for finite T the bound depends on the interior too."""
        step = torch.floor(t * self.steps)
        gamma_t, gamma_s = schedule.gamma((step + 1) / self.steps), schedule.gamma(step / self.steps)
        p = path(schedule, t)._replace(gamma=gamma_t, fraction=None)
        return p, 0.5 * self.steps * torch.expm1(gamma_t - gamma_s)

    def _reconstruction(self, gamma_min: Tensor, x: Tensor) -> Tensor:
        index = self.pixels.index(x)
        if gamma_min.requires_grad:
            return softmax_nats(gamma_min, index, self.pixels)
        dimensions = x[0].numel()
        return expected_softmax(math.exp(float(gamma_min) / 2), index, self.pixels) / dimensions
