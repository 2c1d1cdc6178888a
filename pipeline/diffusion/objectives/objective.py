"""Training objectives by name. Each is frozen options and `loss(denoiser, x, conditioning, key) -> Loss`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objectives.discrete import DiscreteVLB, Hybrid
from pipeline.diffusion.objectives.loss import (
    DENSITIES,
    WEIGHT_NAMES,
    WEIGHTS,
    Level,
    Loss,
    Objective,
    check_trains,
    check_weight_formula,
    draw_noise,
    draw_uniform,
    drop_condition,
    regress,
    weight_formula,
    weight_table,
)
from pipeline.diffusion.objectives.score_matching import DenoisingScoreMatching, ImplicitScoreMatching
from pipeline.diffusion.objectives.variational import VLB
from pipeline.diffusion.randomness import StepKey

__all__ = [
    "OBJECTIVES",
    "VLB",
    "DenoisingScoreMatching",
    "DiscreteVLB",
    "EDMLoss",
    "Hybrid",
    "ImplicitScoreMatching",
    "Loss",
    "Objective",
    "Simple",
    "Weighted",
    "drop_condition",
]


@dataclass(frozen=True)
class Weighted:
    """w(gamma) |eps_hat - eps|^2, mean over dimensions, gamma from a density: every regression objective of the field.

    The weight is stated on eps whatever the network predicts; the weights 'x', 'v', 'flow', 'output' and 'edm' make it
    the plain or preconditioned error of those quantities.
    """

    weight: Annotated[str, "what multiplies the error of eps: " + ", ".join(WEIGHTS)] = "eps"
    density: Annotated[str, "where levels are drawn: " + ", ".join(DENSITIES)] = "schedule"
    stratified: Annotated[bool, "spread the levels of the global batch evenly over the density (less variance)"] = True
    p_mean: Annotated[float, "density log_normal: mean of ln(sigma/alpha)"] = -1.2
    p_std: Annotated[float, "density log_normal: standard deviation of ln(sigma/alpha)"] = 1.2
    snr_cap: Annotated[float, "weight min_snr: cap on the signal-to-noise ratio"] = 5.0
    formula: Annotated[str, "weight formula: arithmetic of " + ", ".join(WEIGHT_NAMES)] = ""
    table: Annotated[Sequence[Sequence[float]], "weight table: rows [gamma, weight], linear between them"] = ()

    def __post_init__(self) -> None:
        for name in ("formula", "table"):
            if bool(getattr(self, name)) != (self.weight == name):
                raise ValueError(f"objective.{name} goes with objective.weight: {name}, each with the other")
        if self.weight == "formula":
            weight_formula(self.formula)
        if self.weight == "table":
            object.__setattr__(self, "table", weight_table(self.table))
        choose(WEIGHTS, self.weight, "objective.weight")
        choose(DENSITIES, self.density, "objective.density")
        for name in ("p_std", "snr_cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name} must be positive, got {getattr(self, name):g}")

    def loss(self, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        schedule = denoiser.schedule
        check_trains(denoiser, "weighted")
        quantile = DENSITIES[self.density](schedule, self.p_mean, self.p_std)
        u = draw_uniform(len(x), key, stratified=self.stratified, device=x.device)
        parameterization = denoiser.parameterization
        if self.formula:
            check_weight_formula(self.formula, parameterization, schedule.gamma_min, schedule.gamma_max)
        table = tuple((row[0], row[1]) for row in self.table)
        level = Level(u, quantile, parameterization, self.snr_cap, self.formula, table)
        gamma = level.gamma
        error = regress(denoiser, x, gamma, draw_noise(x, key), conditioning).error
        weighted = WEIGHTS[self.weight](level) * error
        return Loss(weighted, {"error": error.detach(), "weighted": weighted.detach()}, gamma)


@dataclass(frozen=True)
class Simple:
    """L_simple: mean |eps_hat - eps|^2 at a uniform step of the table, or uniform t without one (Ho et al., eq. 14)."""

    stratified: Annotated[bool, "spread the levels of the global batch evenly over the steps (less variance)"] = True

    def loss(self, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        density = "schedule" if denoiser.schedule.table is None else "table"
        return Weighted("eps", density, self.stratified).loss(denoiser, x, conditioning, key)


@dataclass(frozen=True)
class EDMLoss:
    """EDM: log-normal noise levels and the weight that makes it the error of F (Karras et al. 2022, section 5)."""

    p_mean: Annotated[float, "mean of ln(sigma/alpha)"] = -1.2
    p_std: Annotated[float, "standard deviation of ln(sigma/alpha)"] = 1.2
    stratified: Annotated[bool, "spread the levels of the global batch evenly over the density (less variance)"] = True

    def loss(self, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        objective = Weighted("edm", "log_normal", self.stratified, self.p_mean, self.p_std)
        return objective.loss(denoiser, x, conditioning, key)


OBJECTIVES: dict[str, type[Objective]] = {
    "simple": Simple,
    "weighted": Weighted,
    "edm": EDMLoss,
    "vlb": VLB,
    "discrete_vlb": DiscreteVLB,
    "hybrid": Hybrid,
    "score_matching": DenoisingScoreMatching,
    "implicit_score_matching": ImplicitScoreMatching,
}
