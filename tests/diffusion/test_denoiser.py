"""The hub: what the network is fed, what it is told, and the range it may be asked in."""

import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser, Process
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.rows import shaped
from pipeline.diffusion.scaling import SCALINGS, prior_variance
from pipeline.diffusion.schedule import EDM, Cosine, LearnedGamma, LinearBeta, LinearGamma

NONE = Conditioning()
F64 = torch.float64


class Recorder(nn.Module):
    """Keeps what it was given; answers zero."""

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.factor = factor
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        self.seen.append((z, level))
        return torch.zeros(len(z), self.factor * z.shape[1], *z.shape[2:], dtype=z.dtype)


@pytest.mark.parametrize("shared", [False, True])
def test_the_network_is_fed_and_told_what_was_published(shared: bool) -> None:
    """DDPM: z and the step index; VDM: z and normalised gamma; EDM: y / sqrt(s^2 + sd^2) and ln s / 4."""
    table = LinearBeta()
    cases = [
        (table, Parameterization(), "step_index", "z", float(table.table[700]), 700.0),
        (Cosine(), Parameterization("v"), "step_index", "z", float(Cosine().table[3]), 3.0),
        (LinearGamma(), Parameterization(), "normalised_gamma", "z", -13.3 + 0.25 * 18.3, 0.25),
        (EDM(), Parameterization("edm", "ve"), "log_sigma", "unit_variance", 2 * math.log(3.0), math.log(3.0) / 4),
    ]
    for schedule, row, level, network_input, gamma, told in cases:
        network = Recorder()
        model = Denoiser(network, schedule, row, level=level, network_input=network_input)
        y = torch.randn(3, 1, 2, 2)
        model(y, torch.full((3,), gamma, dtype=F64), NONE, gamma if shared else None)
        z, seen = network.seen[0]
        s = math.exp(gamma / 2)
        c_in = 1 / math.sqrt(s**2 + 0.25) if network_input == "unit_variance" else 1 / math.sqrt(1 + s**2)
        assert torch.allclose(z, c_in * y, rtol=1e-6)
        assert z.dtype == seen.dtype == torch.float32
        assert seen.tolist() == pytest.approx([told] * 3, rel=1e-6)
        if level == "step_index":
            assert seen.tolist() == [told] * 3  # exactly the integer


def test_state_stays_in_its_precision() -> None:
    for dtype in (torch.float32, F64):
        model = Denoiser(Recorder(), LinearGamma(), Parameterization("v"))
        assert model(torch.randn(2, 1, 2, 2, dtype=dtype), torch.zeros(2, dtype=F64), NONE).x_hat.dtype == dtype
        assert model(torch.randn(2, 1, 2, 2, dtype=dtype), torch.zeros(2, dtype=F64), NONE, 0.0).x_hat.dtype == dtype


def test_the_variance_head_is_the_second_half_of_the_channels() -> None:
    class Halves(nn.Module):
        def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
            return torch.cat([torch.zeros_like(z), torch.full_like(z, 0.7)], dim=1)

    model = Denoiser(Halves(), LinearGamma(), Parameterization("x"), learned_variance=True)
    for shared in (None, 1.0):
        got = model(torch.randn(2, 3, 2, 2), torch.ones(2, dtype=F64), NONE, shared)
        assert got.variance is not None
        assert torch.equal(got.variance, torch.full((2, 3, 2, 2), 0.7))
        assert torch.equal(got.x_hat, torch.zeros(2, 3, 2, 2))


def test_a_schedule_that_learns_is_asked_each_time() -> None:
    """The shared path keeps coefficients, but not what depends on learnt end points."""
    schedule, network = LearnedGamma(-10, 5, learn_ends=True), Recorder()
    model = Denoiser(network, schedule, Parameterization())
    y, gamma = torch.randn(1, 1, 2, 2), torch.zeros(1, dtype=F64)
    with torch.no_grad():
        model(y, gamma, NONE, 0.0)
        schedule.ends.copy_(torch.tensor([-5.0, 5.0]))
        model(y, gamma, NONE, 0.0)
    assert [float(level) for _, level in network.seen] == pytest.approx([2 / 3, 1 / 2])


def test_levels_outside_the_range_are_refused() -> None:
    model = Denoiser(Recorder(), LinearGamma(-9, 5), Parameterization())
    model.check_levels(torch.tensor([-9.0, 0.0, 5.0], dtype=F64))
    for value in (5.001, -9.001, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"is outside \[-9\.0000, 5\.0000\], the range this network was made for"):
            model.check_levels(torch.tensor([0.0, value], dtype=F64))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_process_states_the_models_facts(scaling: str) -> None:
    model = Denoiser(Recorder(), LinearGamma(-9, 5), Parameterization("v", scaling))
    assert model.process == Process(scaling, -9, 5, prior_variance(scaling, 5))


def test_undecodable_pairs_are_refused_when_the_model_is_built() -> None:
    class Endless:
        gamma_min, gamma_max = -5.0, 2000.0

    with pytest.raises(ValueError, match="prediction 'eps' under scaling 'vp' cannot be decoded at gamma"):
        Denoiser(Recorder(), Endless(), Parameterization("eps"))  # pyright: ignore[reportArgumentType]


def test_levels_are_shaped_to_rows() -> None:
    assert shaped(torch.ones(3, dtype=F64), torch.zeros(3, 1, 2, 2)).shape == (3, 1, 1, 1)
    assert shaped(torch.ones(3, dtype=F64), torch.zeros(3, 5)).dtype == torch.float32
