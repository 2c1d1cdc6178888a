"""Scalings: alpha and sigma as functions of gamma, and the two facts of a model that depend on them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _subvp_alpha(gamma: Tensor) -> Tensor:
    s = torch.exp(gamma / 2)
    return 2 / (s + torch.sqrt(s**2 + 4))


# alpha as a function of gamma; sigma = alpha exp(gamma / 2) in all of them. By exp: the bits of torch.sigmoid depend on
# the place in the tensor
SCALINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "vp": lambda gamma: torch.rsqrt(1 + torch.exp(gamma)),
    "ve": torch.ones_like,
    "subvp": _subvp_alpha,
    "flow": lambda gamma: 1 / (1 + torch.exp(gamma / 2)),
}


def prior_variance(scaling: str, gamma_max: float) -> float:
    """v of the prior y_1 ~ N(0, v I): 1 / alpha_1^2 where the model says z_1 ~ N(0, I), s_1^2 for 've'."""
    if scaling == "ve":
        return math.exp(gamma_max)
    alpha = SCALINGS[scaling](torch.tensor(gamma_max, dtype=torch.float64))
    return float(alpha**-2)


def step_variance(scaling: str, gamma_t: Tensor, gamma_s: Tensor) -> Tensor:
    """beta of a step in y: (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) / alpha_s^2, the upper variance of DDPM."""
    alpha = SCALINGS[scaling]
    ratio = (alpha(gamma_t) / alpha(gamma_s)) ** 2
    return ratio * torch.exp(gamma_t) * -torch.expm1(gamma_s - gamma_t)
