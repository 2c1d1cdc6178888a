"""The variational bound over the T steps of a table, one drawn step an image: DDPM, DDIM, IDDPM.

Step index i = 1..T-1 goes from gamma_t = table[i] to gamma_s = table[i - 1]; index 0 is the decoder's. In y = z/alpha,
with r = exp(gamma_s - gamma_t) and q = 1 - r, both posteriors of the theory are

    q(y_s | y_t, x) = N( x + c (y_t - x), eta^2 s_s^2 q ),   c^2 = r (1 - eta^2 q)

eta = 1: DDPM's, c = r; other eta: DDIM's (Song et al. 2020, eq. 7). The model puts x_hat for x, so that the KL of a
step is (1 - c)^2 |x_hat - x|^2 / (2 sigma^2) = (1 - c)^2 s_t^2 |eps_hat - eps|^2 / (2 sigma^2), plus what differing
variances add. For eta = 1 and sigma^2 = beta-tilde the weight is expm1(gamma_t - gamma_s) / 2.

Note: the closed forms often printed for these weights carry misprints (a lost root, a bar, sqrt(a) - sqrt(b) taken for
sqrt(a - b)); 1 - c = q (1 + r eta^2) / (1 + c) is exact and free of cancellation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.likelihood.decoders import (
    DECODERS,
    VARIANCES,
    expected_softmax,
    log_bin_probability,
    mix_log_variance,
)
from pipeline.diffusion.objectives.loss import (
    Loss,
    Nodes,
    Regression,
    check_trains,
    draw_noise,
    draw_uniform,
    regress,
    table_of,
)
from pipeline.diffusion.objectives.variational import BIT, prior_nats
from pipeline.diffusion.pixels import PixelGrid
from pipeline.diffusion.randomness import StepKey
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.scaling import SCALINGS, step_variance

# --- the coefficients of each step --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """Per step index, float64 (T,); index 0 repeats index 1, where a step (not the decoder) is meant.

    weight: (1 - c)^2 s_t^2 / posterior variance; weight / 2 |eps_hat - eps|^2 is the KL at that variance.
    log_ratio: log(beta / posterior variance), beta the upper variance of the scaling.
    """

    weight: Tensor
    log_ratio: Tensor


def steps_of(table: Tensor, scaling: str, eta: float = 1.0) -> Steps:
    """The coefficients of a table's steps.

    Raises:
        ValueError: eta so large that the posterior does not exist, naming the step.
    """
    gamma_t, gamma_s = table[1:], table[:-1]
    r, q = torch.exp(gamma_s - gamma_t), -torch.expm1(gamma_s - gamma_t)
    kept = 1 - eta**2 * q
    if bool((kept < 0).any()):
        index = int((kept < 0).nonzero()[0]) + 1
        raise ValueError(
            f"objective.eta {eta:g} asks at step index {index} for more noise than is left there; "
            f"at most {float(q[index - 1]) ** -0.5:.6g} at that step"
        )
    c = torch.sqrt(r * kept)
    weight = q * (1 + r * eta**2) ** 2 / (eta**2 * r * (1 + c) ** 2)
    log_ratio = torch.log(step_variance(scaling, gamma_t, gamma_s)) - (math.log(eta**2) + gamma_s + torch.log(q))
    return Steps(torch.cat([weight[:1], weight]), torch.cat([log_ratio[:1], log_ratio]))


def decoder_log_variances(table: Tensor, scaling: str) -> tuple[float, float]:
    """(log beta-tilde_2, log beta_1) in model space, where alpha is 1: the decoder's range of variances, index 0.

    beta-tilde at index 0 is zero; as in IDDPM the next one stands for it.
    """
    alpha = SCALINGS[scaling](table[0])
    high = table[0] + 2 * torch.log(alpha)
    low = high + torch.log(-torch.expm1(table[0] - table[1]))
    return float(low), float(high)


# --- one term of the bound -----------------------------------------------------------------------------------------


def _kl(regression: Regression, steps: Steps, index: Tensor, variance: str, *, stop_mean: bool) -> Tensor:
    """KL of each row's step, nats: mean over dimensions, (b,) float64."""
    weight, log_ratio = (values.to(index.device)[index] for values in (steps.weight, steps.log_ratio))
    if variance == "posterior":
        return 0.5 * weight * regression.error
    residual = regression.residual.double()
    square = (residual.detach() if stop_mean else residual).square()
    high = shaped(log_ratio, square)
    log_v = mix_log_variance(variance, torch.zeros_like(high), high, regression.variance)  # above log beta-tilde
    nats = 0.5 * (log_v + torch.expm1(-log_v) + shaped(weight, square) * square * torch.exp(-log_v))
    return nats.flatten(1).mean(1)


@dataclass(frozen=True)
class Terms:
    """How the terms of the bound are formed; see `DiscreteVLB` for the fields. stop_mean: no gradient through x_hat."""

    variance: str = "posterior"
    eta: float = 1.0
    decoder: str = "gaussian"
    pixels: PixelGrid = field(default_factory=PixelGrid)
    stop_mean: bool = False

    def __post_init__(self) -> None:
        choose(VARIANCES, self.variance, "objective.variance")
        choose(DECODERS, self.decoder, "objective.decoder")
        if self.variance != "posterior" and self.eta != 1:
            raise ValueError(f"objective.eta {self.eta:g} goes with variance 'posterior' alone, got '{self.variance}'")
        if not self.eta > 0:
            raise ValueError(f"objective.eta must be positive, got {self.eta:g}: without noise DDIM has no bound")

    def bits(self, denoiser: Denoiser, x: Tensor, index: Tensor, regression: Regression) -> Tensor:
        """The term of each row's step index (b,), on the CPU: bits/dim, (b,) float64 with gradient."""
        table = table_of(denoiser.schedule, "the discrete bound")
        scaling = denoiser.parameterization.scaling
        steps = steps_of(table, scaling, self.eta)
        at_decoder = (index == 0).nonzero()[:, 0]
        index = index.to(x.device)
        nats = _kl(regression, steps, index, self.variance, stop_mean=self.stop_mean) * (index > 0)
        if len(at_decoder):
            rows = at_decoder.to(x.device)
            nats = nats.index_add(0, rows, self._decoder_nats(regression, x, rows, table, scaling))
        return nats / BIT

    def _decoder_nats(self, regression: Regression, x: Tensor, rows: Tensor, table: Tensor, scaling: str) -> Tensor:
        """-log p(u | y_0) of `rows`, mean over dimensions."""
        index = self.pixels.index(x[rows])
        s = math.exp(float(table[0]) / 2)
        if self.decoder == "softmax":
            return expected_softmax(s, index, self.pixels) / x[0].numel()
        residual = regression.residual[rows].double()
        mean = x[rows].double() - s * (residual.detach() if self.stop_mean else residual)
        low, high = (torch.full_like(mean, value) for value in decoder_log_variances(table, scaling))
        head = None if regression.variance is None else regression.variance[rows]
        std = torch.exp(mix_log_variance(self.variance, low, high, head, last=True) / 2)
        return -log_bin_probability(mean, std, index, self.pixels).flatten(1).mean(1)


# --- importance sampling of steps, by what their losses were ------------------------------------------------


@dataclass(frozen=True)
class History:
    """The last ten losses of each step, float64 (T, 10), in a ring, and how many there were in all, int64 (T,)."""

    losses: Tensor
    count: Tensor

    @staticmethod
    def empty(steps: int, length: int = 10) -> "History":
        return History(torch.zeros(steps, length, dtype=torch.float64), torch.zeros(steps, dtype=torch.int64))

    def record(self, index: Tensor, loss: Tensor) -> "History":
        """With these losses (n,) of steps (n,) added in order: a pure function, the same on every worker."""
        length = self.losses.shape[1]
        order = torch.argsort(index, stable=True)
        index, loss = index[order], loss[order].double()
        drawn = torch.bincount(index, minlength=len(self.count))
        rank = torch.arange(len(index)) - (drawn.cumsum(0) - drawn)[index]  # 0, 1, ... among the draws of one step
        kept = rank >= drawn[index] - length
        losses = self.losses.clone()
        losses[index[kept], (self.count[index] + rank)[kept] % length] = loss[kept]
        return History(losses, self.count + drawn)

    def probabilities(self, uniform: float) -> Tensor:
        """float64 (T,): proportional to sqrt(E[L^2]) mixed with `uniform` of a uniform law; uniform until all are full.

        (Nichol & Dhariwal 2021, eq. 18.)
        """
        steps, length = self.losses.shape
        if bool((self.count < length).any()):
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        root = self.losses.square().mean(1).sqrt()
        return (1 - uniform) * root / root.sum() + uniform / steps


class Memory:
    """The mutable place of a `History`, for objectives whose options are frozen."""

    def __init__(self) -> None:
        self.history: History | None = None


# --- the objectives -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscreteVLB:
    """The bound over the table's T steps, bits/dim: prior + T x one drawn term (DDPM, DDIM and IDDPM's L_vlb).

    With `importance` steps are drawn in proportion to sqrt(E[L^2]) of their last ten losses and each loss is divided by
    its probability. The losses of all shards, `Loss.observed` joined in shard order, must then be given to `update`
    after each step; `state_dict` belongs in a checkpoint.
    """

    variance: Annotated[
        str, "of the model's steps: posterior (beta-tilde; DDIM's with eta), beta, beta_throughout or learned"
    ] = "posterior"
    eta: Annotated[float, "variance posterior: DDIM's eta; 1 is DDPM"] = 1.0
    decoder: Annotated[str, "the last term: gaussian (N(x_hat, variance) over each bin) or softmax"] = "gaussian"
    importance: Annotated[bool, "draw steps in proportion to the size of their losses"] = False
    uniform: Annotated[float, "importance: share of steps drawn uniformly, 0 to 1"] = 0.001
    stratified: Annotated[bool, "spread the steps of the global batch evenly over their law (less variance)"] = True
    pixels: Annotated[PixelGrid, "where the grey levels lie in model space"] = field(default_factory=PixelGrid)
    memory: Memory = field(default_factory=Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._terms()  # checks them
        if not 0 < self.uniform <= 1:
            raise ValueError(f"objective.uniform must be above 0 and at most 1, got {self.uniform:g}")

    def _terms(self) -> Terms:
        return Terms(self.variance, self.eta, self.decoder, self.pixels)

    def loss(self, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        """x on the pixel grid. Raises ValueError where it is not, and where the schedule has no table."""
        check_trains(denoiser, "discrete_vlb", variance=self.variance == "learned")
        table = table_of(denoiser.schedule, "objective discrete_vlb")
        probabilities = self.probabilities(len(table))
        u = draw_uniform(len(x), key, stratified=self.stratified)
        index = torch.searchsorted(probabilities.cumsum(0), u, right=True).clamp(max=len(table) - 1)
        gamma = table[index].to(x.device)
        regression = regress(denoiser, x, gamma, draw_noise(x, key), conditioning)
        bits = self._terms().bits(denoiser, x, index, regression)
        gamma_max = gamma.new_tensor(denoiser.schedule.gamma_max)
        prior = prior_nats(x, gamma_max, denoiser.parameterization.scaling) / BIT
        weighted = bits / probabilities[index].to(x.device)
        seen = (bits.detach() * len(table)).cpu()
        observed = torch.stack([index.double(), seen], dim=1) if self.importance else None
        return Loss(prior + weighted, {"prior": prior, "steps": weighted.detach()}, gamma, observed)

    def probabilities(self, steps: int) -> Tensor:
        """float64 (T,): of drawing each step now."""
        if not self.importance:
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        history = self.memory.history or History.empty(steps)
        if len(history.count) != steps:
            raise ValueError(f"the saved history of losses has {len(history.count)} steps, the schedule {steps}")
        self.memory.history = history
        return history.probabilities(self.uniform)

    def update(self, observed: Tensor) -> None:
        """Record the global batch: observed (n, 2), every shard's `Loss.observed` in shard order."""
        if self.memory.history is not None:
            self.memory.history = self.memory.history.record(observed[:, 0].long().cpu(), observed[:, 1].cpu())

    def state_dict(self) -> dict[str, Tensor]:
        history = self.memory.history
        return {} if history is None else {"losses": history.losses, "count": history.count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the entries are not those of `state_dict`."""
        if not state:
            self.memory.history = None
            return
        if set(state) != {"losses", "count"} or state["losses"].shape[:1] != state["count"].shape:
            raise ValueError(f"objective state: need losses (T, 10) and count (T,), got {', '.join(sorted(state))}")
        self.memory.history = History(state["losses"].double().cpu(), state["count"].long().cpu())


@dataclass(frozen=True)
class Hybrid:
    """IDDPM's L_simple + weight x L_vlb; L_vlb trains the variance alone, its mean detached (Nichol & Dhariwal 2021).

    L_vlb is T x the drawn term, bits/dim, so that `vlb_weight` means the same at any T (their RESCALED_MSE).
    """

    vlb_weight: Annotated[float, "factor on the bound, bits/dim"] = 0.001
    stratified: Annotated[bool, "spread the steps of the global batch evenly (less variance)"] = True
    pixels: Annotated[PixelGrid, "where the grey levels lie in model space"] = field(default_factory=PixelGrid)

    def __post_init__(self) -> None:
        if not self.vlb_weight > 0:
            raise ValueError(f"objective.vlb_weight must be positive, got {self.vlb_weight:g}; use objective simple")

    def loss(self, denoiser: Denoiser, x: Tensor, conditioning: Conditioning, key: StepKey) -> Loss:
        """x on the pixel grid. Raises ValueError where it is not, without a table, or without learned variance."""
        check_trains(denoiser, "hybrid", variance=True)
        if not denoiser.learned_variance:
            raise ValueError("objective 'hybrid' trains a learned variance: set learned_variance: true, or use simple")
        table = table_of(denoiser.schedule, "objective hybrid")
        index = Nodes(table).index(draw_uniform(len(x), key, stratified=self.stratified))
        gamma = table[index].to(x.device)
        regression = regress(denoiser, x, gamma, draw_noise(x, key), conditioning)
        bits = Terms("learned", pixels=self.pixels, stop_mean=True).bits(denoiser, x, index, regression)
        steps = len(table) * bits
        parts = {"simple": regression.error.detach(), "steps": steps.detach()}
        return Loss(regression.error + self.vlb_weight * steps, parts, gamma)
