"""Likelihood by the probability-flow ODE against score_sde's scheme, one network, one core.

    pytest -m slow -s tests/benchmarks/test_likelihood.py

The scheme (likelihood.py of score_sde): scipy's RK45 on (z, log p) in the VP time from 1e-5 to 1, one error norm for the
whole batch, one Rademacher vector an image for the whole solve, a forward for the drift and another under the
vector-Jacobian product. Both sides start from the same y_0 with the same vectors, so that both near the same number.
"""

import json
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pipeline.backbones.unet import UNet, UNetConfig
from pipeline.diffusion import ode
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.fields import mat
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.schedule import VP

pytestmark = pytest.mark.slow

COUNT, STEPS, ROUNDS = 16, 500, 3
NONE = Conditioning()
LAW = VP()
BITS = 64 * math.log(2)


def trained() -> Denoiser:
    """A small U-Net, trained long enough on `mat` that its ODE is that of a network which has learnt something."""
    torch.manual_seed(0)
    network = UNet(UNetConfig(base_width=24, multipliers=(1, 2), blocks=1, attention_at=(), dropout=0.0), 1, 8, 0, 1)
    denoiser = Denoiser(network, LAW, Parameterization("v", "vp"))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    field, generator = mat(), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x = field.images(field.sample(64, generator)).float()
        gamma = LAW.gamma(torch.rand(64, generator=generator, dtype=torch.float64))
        s = torch.exp(gamma / 2).float().view(-1, 1, 1, 1)
        eps = torch.randn(x.shape, generator=generator)
        weight = 1 / (1 + s**2)  # that of v
        error = (denoiser(x + s * eps, gamma, NONE).x_hat - x) / s
        optimizer.zero_grad()
        (weight * error**2 * (1 + s**-2) * s**2).mean().backward()
        optimizer.step()
    network.requires_grad_(False).eval()
    return denoiser


class Counted:
    """The denoiser, counting forwards of single images."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.rows = denoiser, 0

    def __call__(self, *arguments: Any) -> Any:
        self.rows += len(arguments[0])
        return self.denoiser(*arguments)


def score_sde(denoiser: Any, y: Tensor, probes: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """log volume from y at gamma_min, (n,), and evaluations. z' = (-z beta - score beta) / 2 in the VP time."""
    n, shape = len(y), y.shape
    alpha = float(torch.sigmoid(torch.tensor(-LAW.gamma_min, dtype=torch.float64)).sqrt())

    def drift(z: Tensor, t: float) -> Tensor:
        gamma = LAW.gamma(torch.tensor((t - LAW.t_min) / (1 - LAW.t_min), dtype=torch.float64)).clamp(max=LAW.gamma_max)
        alpha_t = torch.sigmoid(-gamma).sqrt()
        x_hat = denoiser(z / alpha_t, gamma.expand(n), NONE).x_hat
        score = (alpha_t * x_hat - z) / torch.sigmoid(gamma)
        beta = LAW.beta_min + t * (LAW.beta_max - LAW.beta_min)
        return -0.5 * beta * (z + score)

    def right_hand_side(t: float, state: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(state[:z_size].copy()).view(shape)
        with torch.no_grad():
            move = drift(z, t)
        with torch.enable_grad():
            point = z.requires_grad_()
            product = torch.autograd.grad(drift(point, t), point, probes)[0]
        divergence = (product * probes).flatten(1).sum(1)
        return np.concatenate([move.flatten().numpy(), divergence.numpy()])

    z_size = y.numel()
    start = np.concatenate([(alpha * y).flatten().numpy(), np.zeros(n)])
    end = solve_ivp(right_hand_side, (LAW.t_min, 1.0), start, rtol=tolerance, atol=tolerance, method="RK45")
    alpha_end = float(torch.sigmoid(torch.tensor(-LAW.gamma_max, dtype=torch.float64)).sqrt())
    # a volume in z, turned into one in y
    change = y[0].numel() * math.log(alpha / alpha_end)
    return torch.from_numpy(end.y[z_size:, -1]) + change, int(end.nfev)


def ours(denoiser: Any, y: Tensor, tolerance: float) -> tuple[Tensor, float]:
    trace = ode.Trace("fixed", 1, Noise(range(COUNT)).generators)
    ends = (LAW.gamma_min, LAW.gamma_max)
    end = drive(ode.solve(y, ends, NONE, trace, tolerance=tolerance, pair="dopri5"), denoiser)
    return end.log_volume, float(end.evaluations.double().mean())


def clocked(act: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = act()
    return time.perf_counter() - begin, result


def test_against_score_sde() -> None:
    torch.set_num_threads(1)
    denoiser = Counted(trained())
    field = mat()
    x = field.images(field.sample(COUNT, torch.Generator().manual_seed(1)))
    y = Noise(range(100, 100 + COUNT)).normal_like(x).mul_(math.exp(LAW.gamma_min / 2)).add_(x)
    probes = ode.Trace("fixed", 1, Noise(range(COUNT)).generators).vectors(y, range(COUNT))[:, 0]
    exact, _ = ours(denoiser, y, 1e-6)

    def error(value: Tensor) -> float:
        return float((value - exact).square().mean().sqrt()) / BITS

    record: dict[str, Any] = {"machine": platform.processor(), "torch": torch.__version__, "images": COUNT}
    # at 1e-5 on both sides, alternating
    seconds: dict[str, list[float]] = {"score_sde": [], "ours": []}
    for _ in range(ROUNDS):
        for name, act in (
            ("score_sde", lambda: score_sde(denoiser, y, probes, 1e-5)),
            ("ours", lambda: ours(denoiser, y, 1e-5)),
        ):
            denoiser.rows = 0
            taken, (value, evaluations) = clocked(act)
            seconds[name].append(taken)
            record[name] = {
                "s": min(seconds[name]),
                "evaluations": evaluations,
                "forwards an evaluation": denoiser.rows / COUNT / evaluations,
                "error bits/dim": error(value),
            }
    record["speed-up at 1e-5"] = record["score_sde"]["s"] / record["ours"]["s"]
    # the least work of each within 0.005 bits/dim
    work: dict[str, float] = {}
    for name, solve in (
        ("score_sde", lambda tolerance: score_sde(denoiser, y, probes, tolerance)),
        ("ours", lambda tolerance: ours(denoiser, y, tolerance)),
    ):
        for tolerance in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5):
            taken, (value, evaluations) = clocked(lambda: solve(tolerance))
            if error(value) <= 0.005:
                work[name] = taken
                record[f"{name} within 0.005"] = {
                    "tolerance": tolerance,
                    "s": taken,
                    "evaluations": evaluations,
                    "error bits/dim": error(value),
                }
                break
    record["speed-up within 0.005"] = work["score_sde"] / work["ours"]
    print(json.dumps(record, indent=2))
    assert record["ours"]["forwards an evaluation"] == pytest.approx(1)
    assert record["score_sde"]["forwards an evaluation"] == pytest.approx(2)
    assert record["speed-up at 1e-5"] > 1.35
    assert record["speed-up within 0.005"] > 1.35
