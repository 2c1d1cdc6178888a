"""A bound with `clip` is the bound of the model whose x_hat is clipped, and exists where eps_hat times s does not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Prediction, Process
from pipeline.diffusion.likelihood.estimators import ESTIMATORS, PixelGrid
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.scaling import prior_variance

OPTIONS: dict[str, dict[str, Any]] = {
    "vlb": {"levels": 8, "decoder": "gaussian"},
    "vlb_discrete": {"steps": 12, "decoder": "gaussian"},
    "ddim_bound": {"steps": 12, "eta": 0.5},
}
PROCESS = Process("vp", -9.0, 18.0, prior_variance("vp", 18.0))


class Rough(nn.Module):
    """An eps_hat that is off by 1% everywhere: x_hat is off by 1% of s."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        s = torch.exp(gamma / 2).view(-1, 1, 1, 1)
        return Prediction((y / (1 + s**2) + 0.01 * s).to(y.dtype).clamp(-self.limit, self.limit))


def nats(name: str, limit: float = float("inf"), **options: Any) -> Tensor:
    grid = PixelGrid()
    level = torch.randint(0, grid.levels, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    x = grid.first + grid.bin * level.double()
    estimate = ESTIMATORS[name].start(
        x, PROCESS, Noise([1, 2, 3]), Conditioning(), pixels=grid, **OPTIONS[name], **options
    )
    return drive(estimate, {"main": Rough(limit)}).nats


@pytest.mark.parametrize("name", OPTIONS)
def test_clip_is_the_bound_of_the_clipped_model(name: str) -> None:
    plain, clipped = nats(name), nats(name, clip=1.0)
    assert torch.equal(clipped, nats(name, limit=1.0))
    assert bool((clipped < plain).all())


def test_a_bad_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="clip"):
        nats("vlb", clip=-1.0)
