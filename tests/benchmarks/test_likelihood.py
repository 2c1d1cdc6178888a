"""Likelihood by the probability-flow ODE against score_sde's scheme, one network, one core.

    pytest -m slow -s tests/benchmarks/test_likelihood.py

The scheme (likelihood.py of score_sde): scipy's RK45 on (z, log p) in the VP time from 1e-5 to 1, one error norm for
the whole batch, one Rademacher vector an image for the whole solve, a forward for the drift and another under the
vector-Jacobian product. Both sides start from the same y_0 with the same vectors, so that both near the same number.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pipeline.backbones.unet import UNet, UNetConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.likelihood import ode
from pipeline.diffusion.oracles.fields import mat
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.schedule import VP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

COUNT, STEPS, ROUNDS = 16, 500, 3
TOLERANCES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
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
        error = (denoiser(x + s * eps, gamma, NONE).x_hat - x) / s
        optimizer.zero_grad()
        (error**2).mean().backward()
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


def ours(denoiser: Any, y: Tensor, tolerance: float, pair: str, kind: str = "fixed") -> tuple[Tensor, float]:
    """log volume, (n,), and evaluations an image."""
    trace = ode.Trace(kind, 1, Noise(range(len(y))).generators)
    ends = (LAW.gamma_min, LAW.gamma_max)
    end = drive(ode.solve(y, ends, NONE, trace, tolerance=tolerance, pair=pair), denoiser)
    return end.log_volume, float(end.evaluations.double().mean())


def test_against_score_sde() -> None:
    torch.set_num_threads(1)
    denoiser = Counted(trained())
    field = mat()
    x = field.images(field.sample(COUNT, torch.Generator().manual_seed(1)))
    y = Noise(range(100, 100 + COUNT)).normal_like(x).mul_(math.exp(LAW.gamma_min / 2)).add_(x)
    probes = ode.Trace("fixed", 1, Noise(range(COUNT)).generators).vectors(y, range(COUNT))[:, 0]
    kept, _ = ours(denoiser, y, 1e-6, "dopri5")  # the limit of both with these vectors
    exact, _ = ours(denoiser, y, 1e-4, "dopri5", "exact")

    def error(value: Tensor, limit: Tensor) -> float:
        return float((value - limit).square().mean().sqrt()) / BITS

    solvers: dict[str, Callable[[float], tuple[Tensor, float]]] = {
        "score_sde": lambda tolerance: score_sde(denoiser, y, probes, tolerance),
        "ours, same solver": lambda tolerance: ours(denoiser, y, tolerance, "dopri5"),
        "ours": lambda tolerance: ours(denoiser, y, tolerance, "bosh3"),
        "ours, refreshed": lambda tolerance: ours(denoiser, y, tolerance, "bosh3", "refreshed"),
    }

    def measure(settings: dict[str, float]) -> dict[str, dict[str, float]]:
        """Each solver at its tolerance, rounds interleaved, the median time."""
        rounds: dict[str, list[float]] = {name: [] for name in settings}
        found: dict[str, dict[str, float]] = {}
        for _ in range(ROUNDS):
            for name, tolerance in settings.items():
                denoiser.rows = 0
                begin = time.perf_counter()
                value, evaluations = solvers[name](tolerance)
                rounds[name].append(time.perf_counter() - begin)
                found[name] = {
                    "tolerance": tolerance,
                    "s": statistics.median(rounds[name]),
                    "evaluations": evaluations,
                    "forwards an evaluation": denoiser.rows / COUNT / evaluations,
                    "solver error, bits/dim": error(value, kept),
                    "whole error, bits/dim": error(value, exact),
                }
        return found

    def coarsest(name: str) -> float:
        return next(t for t in TOLERANCES if error(solvers[name](t)[0], kept) <= 0.005)

    strict = measure({"score_sde": 1e-5, "ours, same solver": 1e-5})
    equal = measure({name: coarsest(name) for name in ("score_sde", "ours")} | {"ours, refreshed": 1e-2})
    theirs, refreshed = equal["score_sde"], equal["ours, refreshed"]
    gain = (theirs["whole error, bits/dim"] / refreshed["whole error, bits/dim"]) ** 2
    ratios = {
        "at 1e-5": strict["score_sde"]["s"] / strict["ours, same solver"]["s"],
        "within 0.005 of the solver's limit": theirs["s"] / equal["ours"]["s"],
        "at equal whole error (theirs averaged over more vectors)": gain * theirs["s"] / refreshed["s"],
    }
    record = {"torch": torch.__version__, "machine": platform.machine(), "images": COUNT, "threads": 1}
    print(json.dumps(record | {"at 1e-5": strict, "within 0.005": equal, "ratios": ratios}, indent=2))
    assert strict["ours, same solver"]["forwards an evaluation"] == pytest.approx(1)
    assert strict["score_sde"]["forwards an evaluation"] == pytest.approx(2)
    assert ratios["at 1e-5"] > 1.35
    assert ratios["within 0.005 of the solver's limit"] > 1.35
    assert ratios["at equal whole error (theirs averaged over more vectors)"] > 3
