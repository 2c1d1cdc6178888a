"""Prediction types: what the network outputs, one row (a, b) of F = a x + b eps each, and its inverse.

With z = alpha x + sigma eps, a row is decoded by x_hat = (b z - sigma F) / (b alpha - a sigma).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.diffusion.scaling import SCALINGS
from pipeline.diffusion.schedule import Schedule

Row = tuple[Tensor, Tensor]


def _x(alpha: Tensor, sigma: Tensor, data_std: float) -> Row:
    return torch.ones_like(alpha), torch.zeros_like(alpha)


def _eps(alpha: Tensor, sigma: Tensor, data_std: float) -> Row:
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def _v(alpha: Tensor, sigma: Tensor, data_std: float) -> Row:
    """v = alpha eps - sigma x (Salimans & Ho 2022)."""
    return -sigma, alpha


def _score(alpha: Tensor, sigma: Tensor, data_std: float) -> Row:
    """grad log q(z | x) = -eps / sigma."""
    return torch.zeros_like(alpha), -1 / sigma


def _flow(alpha: Tensor, sigma: Tensor, data_std: float) -> Row:
    """eps - x (Liu et al. 2022)."""
    return -torch.ones_like(alpha), torch.ones_like(alpha)


def _edm(alpha: Tensor, sigma: Tensor, data_std: float) -> Row:
    """EDM's F = (x - c_skip y) / c_out (Karras et al. 2022, table 1), a function of s = sigma / alpha alone."""
    s = sigma / alpha
    norm = torch.sqrt(s**2 + data_std**2)
    return s / (data_std * norm), -data_std / norm


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float], Row]] = {
    "x": _x,
    "eps": _eps,
    "v": _v,
    "score": _score,
    "flow": _flow,
    "edm": _edm,
}


# --- the mean of a table's step, a row that depends on the level it goes to -------------------------------------------


def level_before(gamma: Tensor, table: Tensor) -> Tensor:
    """gamma of the step before, shaped like gamma: a table's node i goes to node i - 1, node 0 to the image, -inf.

    Between nodes as far between those before them; below node 1 linear in s^2.
    """
    high = torch.searchsorted(table, gamma.contiguous()).clamp(1, len(table) - 1)
    share = ((gamma - table[high - 1]) / (table[high] - table[high - 1])).clamp(0, 1)
    between = torch.lerp(table[(high - 2).clamp(min=0)], table[high - 1], share)
    return torch.where(high > 1, between, table[0] + torch.log(share))


def _mean(gamma: Tensor, scaling: str, table: Tensor | None) -> Row:
    """mu of q(z_s | z_t, x) = N(mu, ...), alpha_s x + alpha_s (s_s^2 / s_t) eps (Ho et al. 2020, eq. 7)."""
    if table is None:
        raise ValueError("prediction 'mean' is that of a step: it needs a schedule of steps (linear_beta, cosine)")
    gamma_s = level_before(gamma.double(), table.to(gamma.device))
    a = SCALINGS[scaling](gamma_s)
    return a.to(gamma.dtype), (a * torch.exp(gamma_s - gamma.double() / 2)).to(gamma.dtype)


@dataclass(frozen=True)
class Parameterization:
    """A prediction type under a scaling.

    scaling: key of SCALINGS; prediction: key of PREDICTIONS, or 'mean', the posterior mean of a step of `table`, gamma
    float64 (T,); data_std: sigma_data of the 'edm' row and input.
    """

    prediction: str = "eps"
    scaling: str = "vp"
    data_std: float = 0.5
    table: Tensor | None = field(default=None, compare=False, repr=False)

    def alpha_sigma(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        alpha = choose(SCALINGS, self.scaling, "scaling")(gamma)
        return alpha, alpha * torch.exp(gamma / 2)

    def row(self, gamma: Tensor) -> Row:
        """(a, b) of F = a x + b eps, shaped like gamma."""
        if self.prediction == "mean":
            return _mean(gamma, self.scaling, self.table)
        if self.prediction not in PREDICTIONS:
            choose(dict.fromkeys((*PREDICTIONS, "mean")), self.prediction, "prediction")
        alpha, sigma = self.alpha_sigma(gamma)
        return PREDICTIONS[self.prediction](alpha, sigma, self.data_std)

    def decode(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) of x_hat = c_skip y + c_out F, shaped like gamma."""
        alpha, sigma = self.alpha_sigma(gamma)
        a, b = self.row(gamma)
        determinant = b * alpha - a * sigma
        return b * alpha / determinant, -sigma / determinant

    def check(self, schedule: Schedule) -> None:
        """Raises ValueError, naming the gamma, where the row cannot be decoded within the schedule's range."""
        gamma = torch.linspace(schedule.gamma_min, schedule.gamma_max, 1001, dtype=torch.float64)
        alpha, sigma = self.alpha_sigma(gamma)
        a, b = self.row(gamma)
        determinant = b * alpha - a * sigma
        scale = (b * alpha).abs() + (a * sigma).abs()
        bad = ~(determinant.abs() > 1e-12 * scale) | ~torch.isfinite(determinant) | (alpha <= 0)
        flips = determinant.sign() != determinant.sign()[0]
        bad |= flips
        if bool(bad.any()):
            raise ValueError(
                f"prediction '{self.prediction}' under scaling '{self.scaling}' cannot be decoded at gamma = "
                f"{float(gamma[bad.nonzero()[0, 0]]):.3f}: choose another prediction, or a schedule that ends before"
            )
