"""The same images as independent implementations make from the same network and the same noise.

diffusers and torchdiffeq come with the development dependencies. k-diffusion does not (its package pulls in far more
than its samplers): its formulas are written down here.
"""

import importlib
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser, Process
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.sampling.grids import grid
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.diffusion.schedule import EDM, LinearBeta, Schedule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers: Any = importlib.import_module("diffusers")
    from torchdiffeq import odeint

# numpy's word about how diffusers converts its tables
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

NONE = Conditioning()
SEEDS = range(3)
SHAPE = (3, 3, 8, 8)


class Net(nn.Module):
    """A smooth fixed network of the noisy image and the level, in float32."""

    def __init__(self, channels: int = 3, level_scale: float = 1000.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randn(8, 3, 3, 3, generator=generator) / 4)
        self.register_buffer("second", torch.randn(channels, 8, 3, 3, generator=generator) / 6)
        self.level_scale = level_scale

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning = NONE) -> Tensor:
        told = (level.float() / self.level_scale).view(-1, 1, 1, 1)
        hidden = torch.tanh(nn.functional.conv2d(z, self.get_buffer("first"), padding=1) + told)
        out = nn.functional.conv2d(hidden, self.get_buffer("second"), padding=1)
        return out + 0.7 * nn.functional.pad(z, (0, 0, 0, 0, 0, out.shape[1] - z.shape[1]))


def start(deviation: float) -> Tensor:
    return Noise(SEEDS).normal_like(torch.empty(SHAPE)) * deviation


def ours(name: str, denoiser: Denoiser, gammas: Tensor, y: Tensor, **options: Any) -> Tensor:
    noise = Noise([seed + 100 for seed in SEEDS])
    return drive(SAMPLERS[name].start(denoiser.process, y.clone(), gammas, noise, NONE, **options), denoiser)


def agree(ours: Tensor, theirs: Tensor, relative: float = 1e-5) -> None:
    assert float((ours - theirs).abs().max()) < relative * float(theirs.abs().max())


def table_denoiser(schedule: LinearBeta, **options: Any) -> Denoiser:
    network = Net(6) if options.get("learned_variance") else Net()
    return Denoiser(network, schedule, Parameterization("eps"), level="step_index", **options)


@pytest.fixture(autouse=True)
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their draws are ours: one generator an image, seeded as in `ours`."""
    noise = Noise([seed + 100 for seed in SEEDS])

    def draw(shape: Any, *_: Any, **__: Any) -> Tensor:
        return noise.normal_(torch.empty(*shape))

    for name in ("ddpm", "ddim", "euler_ancestral_discrete", "dpmsolver_multistep", "euler_discrete"):
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(module, "randn_tensor", draw)


def ddpm(**options: Any) -> Any:
    """T = 100, so betas ten times those of T = 1000. Its tables, kept in float32, are given their digits."""
    scheduler: Any = diffusers.DDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, **options)
    scheduler.betas = torch.linspace(1e-3, 0.2, 100, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def theirs(scheduler: Any, steps: int, network: Net, z: Tensor, **options: Any) -> Tensor:
    """Their own loop, from z as they scale it, with levels as they tell them."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(z, t)
            z = scheduler.step(network(scaled, t.repeat(len(z))), t, z, **options).prev_sample
    return z


LINEAR: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


# --- DDPM and DDIM ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 20), ("leading", 50), ("trailing", 20), ("trailing", 50)])
def test_ddim_of_diffusers(spacing: str, steps: int, eta: float) -> None:
    """Its linspace spacing is left out: it steps by T // n there, up to 11 indices off."""
    denoiser = table_denoiser(LinearBeta())
    gammas = grid(spacing, denoiser.schedule, steps)
    scheduler = diffusers.DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing=spacing)
    z = start(1.0)
    expected = theirs(scheduler, steps, Net(), z, eta=eta)
    agree(ours("ddim", denoiser, gammas, z * math.sqrt(1 + math.exp(gammas[0])), eta=eta), expected)


@pytest.mark.parametrize(
    ("variance", "variance_type"),
    [("posterior", "fixed_small"), ("beta", "fixed_large"), ("learned", "learned_range")],
)
def test_ddpm_of_diffusers(variance: str, variance_type: str) -> None:
    denoiser = table_denoiser(LinearBeta(100), learned_variance=variance == "learned")
    gammas = grid("leading", denoiser.schedule, 100)
    scheduler = ddpm(clip_sample=False, variance_type=variance_type)
    z = start(1.0)
    network = denoiser.network
    assert isinstance(network, Net)
    expected = theirs(scheduler, 100, network, z)
    agree(ours("ancestral", denoiser, gammas, z * math.sqrt(1 + math.exp(gammas[0])), variance=variance), expected)


def test_clipping_as_ddpm_of_diffusers_does() -> None:
    """x_hat clipped to [-1, 1] before the posterior mean is formed."""
    denoiser = table_denoiser(LinearBeta(100))
    gammas = grid("leading", denoiser.schedule, 100)
    scheduler = ddpm(clip_sample=True)
    z = start(1.0)
    expected = theirs(scheduler, 100, Net(), z)
    agree(ours("ancestral", denoiser, gammas, z * math.sqrt(1 + math.exp(gammas[0])), clip=1.0), expected)
    assert float(expected.abs().max()) <= 1


# --- samplers in sigma ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("euler", "EulerDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "zero"}),
        (
            "dpmpp_2m_sde",
            "DPMSolverMultistepScheduler",
            {"lower_order_final": False, "final_sigmas_type": "zero", "algorithm_type": "sde-dpmsolver++"},
        ),
    ],
)
def test_sigma_samplers_of_diffusers(name: str, scheduler: str, options: dict[str, Any]) -> None:
    denoiser = table_denoiser(LinearBeta())
    gammas = grid("trailing", denoiser.schedule, 20)
    other = getattr(diffusers, scheduler)(**LINEAR, timestep_spacing="trailing", **options)
    s, noise = math.exp(gammas[0] / 2), start(1.0)
    z = noise * (math.sqrt(1 + s**2) if name in ("euler", "heun", "euler_ancestral") else 1.0)
    agree(ours(name, denoiser, gammas, noise * math.sqrt(1 + s**2)), theirs(other, 20, Net(), z))


@pytest.mark.parametrize(
    ("name", "scheduler"), [("euler", "EDMEulerScheduler"), ("dpmpp_2m", "EDMDPMSolverMultistepScheduler")]
)
def test_edm_samplers_of_diffusers(name: str, scheduler: str) -> None:
    schedule = EDM()
    denoiser = Denoiser(
        Net(level_scale=1.0), schedule, Parameterization("edm", "ve"), level="log_sigma", network_input="unit_variance"
    )
    options = {} if name == "euler" else {"lower_order_final": False, "final_sigmas_type": "zero"}
    other = getattr(diffusers, scheduler)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0, **options)
    y = start(80.0)
    expected = theirs(other, 18, Net(level_scale=1.0), y)
    agree(ours(name, denoiser, grid("rho", schedule, 18), y), expected)


def test_adaptive_agrees_with_torchdiffeq() -> None:
    """Its dopri5 on dy/ds = (y - x_hat) / s."""
    denoiser = table_denoiser(LinearBeta())
    denoiser.network.double()
    denoiser.dtype = torch.float64
    g_max, g_min = denoiser.schedule.gamma_max, denoiser.schedule.gamma_min
    y = start(math.sqrt(1 + math.exp(g_max))).double()

    def slope(log_s: Tensor, y: Tensor) -> Tensor:
        return y - denoiser(y, (2 * log_s).expand(len(y)), NONE).x_hat

    times = torch.tensor([g_max / 2, g_min / 2], dtype=torch.float64)
    with torch.no_grad():
        end: Any = odeint(slope, y, times, rtol=1e-7, atol=1e-7)
        expected = denoiser(end[1], torch.full((3,), g_min, dtype=torch.float64), NONE).x_hat
    agree(ours("adaptive", denoiser, torch.tensor([g_max, g_min], dtype=torch.float64), y, tolerance=1e-7), expected)


# --- k-diffusion ------------------------------------------------------------------------------------------------------
# its samplers as they are published (Karras et al. 2022, algorithms 1 and 2; Lu et al. 2022, algorithm 2), written down
# once more in sigma alone, where ours walk in gamma by moves

Model = Callable[[Tensor, float], Tensor]  # x_hat at (x, sigma)


def in_sigma_euler(model: Model, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    for now, then in pairwise(sigmas):
        x = x + (x - model(x, now)) / now * (then - now)
    return x


def in_sigma_heun(model: Model, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    for now, then in pairwise(sigmas):
        slope = (x - model(x, now)) / now
        ahead = x + slope * (then - now)
        if then > 0:
            slope = (slope + (ahead - model(ahead, then)) / then) / 2
        x = x + slope * (then - now)
    return x


def in_sigma_dpmpp_2m(model: Model, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    before: tuple[Tensor, float] | None = None
    for now, then in pairwise(sigmas):
        x_hat = model(x, now)
        if then == 0:
            return x_hat
        h, mixed = math.log(now / then), x_hat
        if before is not None:
            ratio = before[1] / h
            mixed = (1 + 1 / (2 * ratio)) * x_hat - before[0] / (2 * ratio)
        x, before = then / now * x - math.expm1(-h) * mixed, (x_hat, h)
    return x


def in_sigma_euler_ancestral(model: Model, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Tensor:
    for now, then in pairwise(sigmas):
        up = then * math.sqrt(1 - (then / now) ** 2)
        x = x + (x - model(x, now)) / now * (math.sqrt(then**2 - up**2) - now)
        x = x + up * draw() if then > 0 else x
    return x


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("euler", in_sigma_euler),
        ("heun", in_sigma_heun),
        ("dpmpp_2m", in_sigma_dpmpp_2m),
        ("euler_ancestral", in_sigma_euler_ancestral),
    ],
)
def test_k_diffusion(name: str, theirs: Callable[..., Tensor]) -> None:
    schedule: Schedule = EDM()
    denoiser = Denoiser(
        Net(level_scale=1.0), schedule, Parameterization("edm", "ve"), level="log_sigma", network_input="unit_variance"
    )
    gammas, y = grid("rho", schedule, 18), start(80.0)
    sigmas = [80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7)) for i in range(18)]
    noise = Noise([seed + 100 for seed in SEEDS])

    def model(x: Tensor, sigma: float) -> Tensor:
        return denoiser(x, torch.full((len(x),), 2 * math.log(sigma), dtype=torch.float64), NONE).x_hat

    with torch.no_grad():
        expected = theirs(model, y.clone(), [s**7 for s in sigmas] + [0.0], lambda: noise.normal_like(y))
    agree(ours(name, denoiser, gammas, y), expected)


def test_shared_facts() -> None:
    """What the tests above rest on: both sides' tables are one."""
    schedule = LinearBeta()
    abar = diffusers.DDIMScheduler(**LINEAR).alphas_cumprod.double()
    assert torch.allclose(torch.sigmoid(-schedule.table), abar, rtol=1e-5)
    assert isinstance(table_denoiser(schedule).process, Process)
    assert shaped(torch.ones(3), torch.zeros(SHAPE)).shape == (3, 1, 1, 1)
