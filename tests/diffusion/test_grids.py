"""Grids: each is exactly what it says."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pipeline.diffusion.sampling.grids import GRIDS, explicit_grid, grid
from pipeline.diffusion.schedule import EDM, LinearBeta, LinearGamma

F64 = torch.float64


def indices(gammas: torch.Tensor, law: LinearBeta) -> list[int]:
    """Step indices of levels that are nodes."""
    position = law.time(gammas) * (law.steps - 1)
    assert torch.allclose(position, position.round(), atol=1e-9)
    return [int(i) for i in position.round()]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grids_descend_within_the_range(name: str, steps: int) -> None:
    law = LinearBeta()
    gammas = grid(name, law, steps)
    assert gammas.dtype == F64
    assert len(gammas) == steps or (name == "quadratic" and len(gammas) == 49)  # of 50, index 0 comes twice
    assert bool((gammas.diff() < 0).all())
    assert float(gammas.max()) <= law.gamma_max + 1e-12
    assert float(gammas.min()) >= law.gamma_min - 1e-12


def test_each_grid_is_what_it_says() -> None:
    law = LinearBeta()
    assert indices(grid("leading", law, 50), law) == list(range(980, -1, -20))
    assert indices(grid("leading", law, 30), law) == [i * 33 for i in range(29, -1, -1)]
    for steps in (10, 30, 50):
        trailing = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
        assert indices(grid("trailing", law, steps), law) == trailing
        assert trailing[0] == 999
        linspace = [int(i) for i in np.linspace(0, 999, steps).round()[::-1]]
        assert indices(grid("linspace", law, steps), law) == linspace
        quadratic = sorted({int(i) for i in np.linspace(0, np.sqrt(800), steps) ** 2}, reverse=True)
        assert indices(grid("quadratic", law, steps), law) == quadratic
    assert indices(grid("uniform_t", law, 1000), law) == list(range(999, -1, -1))
    assert indices(explicit_grid(law, [0, 5, 999]), law) == [999, 5, 0]
    uniform = grid("uniform_gamma", EDM(), 11)
    assert torch.allclose(uniform.diff(), uniform.diff()[:1].expand(10), rtol=1e-9)
    rho = torch.exp(grid("rho", EDM(), 18) / 2).numpy()
    i = np.arange(18) / 17
    assert np.allclose(rho, (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rtol=1e-12)
    assert torch.exp(grid("rho", EDM(), 5, rho=3.0) / 2).numpy()[2] == pytest.approx(
        (80 ** (1 / 3) / 2 + 0.002 ** (1 / 3) / 2) ** 3
    )
    assert torch.allclose(LinearGamma().time(grid("uniform_t", LinearGamma(), 5)), torch.linspace(1, 0, 5, dtype=F64))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: grid("uniform_t", LinearGamma(), 0), "steps must be at least 1, got 0"),
        (lambda: grid("leading", LinearGamma(), 5), "picks from a table of discrete steps, which LinearGamma has not"),
        (lambda: grid("leading", LinearBeta(), 1001), "repeats a level"),
        (lambda: grid("rhoo", LinearBeta(), 9), "did you mean 'rho'"),
        (lambda: explicit_grid(LinearBeta(), [3, 2]), "strictly increasing within 0..999"),
        (lambda: explicit_grid(LinearBeta(), [3, 3]), "strictly increasing"),
        (lambda: explicit_grid(LinearBeta(), [0, 1000]), "strictly increasing"),
        (lambda: explicit_grid(LinearBeta(), []), "strictly increasing"),
    ],
)
def test_bad_grids_are_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        act()
