"""Optimizer, clipping, learning-rate laws and moving average against independent implementations."""

import math

import pytest
import torch
from torch import nn

from pipeline.training.ema import EMA, decay
from pipeline.training.optim import AdamW, clip_scale, gradient_norm, learning_rate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GroupNorm(1, 7), nn.SiLU(), nn.Linear(7, 3)).double()


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_adamw_is_torchs(weight_decay: float, clip: float) -> None:
    ours, theirs = network(), network()
    mine = AdamW(ours.named_parameters(), (0.9, 0.99), weight_decay)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))
    clipped = 0
    for step in range(20):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).double()
        for net in (ours, theirs):
            net(x).square().sum().backward()
        norm = gradient_norm(mine.gradients())
        clipped += int(clip > 0 and float(norm) > clip)
        scale = clip_scale(norm, clip)
        mine.step(1e-2, scale)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.step()
        mine.zero_grad()
        reference.zero_grad()
    assert clipped == (20 if clip else 0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if clip else 1e-9, atol=1e-9)


def test_its_state_is_flat_and_goes_on_bit_for_bit() -> None:
    def run(net: nn.Module, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).double()
            net(x).square().sum().backward()
            optimizer.step(1e-2)
            optimizer.zero_grad()

    a, b = network(), network()
    one, two = (AdamW(net.named_parameters(), (0.9, 0.99), 0.0) for net in (a, b))
    run(a, one, range(10))
    b.load_state_dict(a.state_dict())
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    run(a, one, range(10, 20))
    run(b, two, range(10, 20))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_a_state_of_another_network_is_refused() -> None:
    optimizer = AdamW(network().named_parameters(), (0.9, 0.99), 0.0)
    other = AdamW(nn.Linear(2, 2).named_parameters(), (0.9, 0.99), 0.0)
    with pytest.raises(ValueError, match="optimizer state of another network"):
        optimizer.load_state_dict(other.state_dict())
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"optimizer state mean\.0\.weight: shape \(1, 5\), expected \(7, 5\)"):
        optimizer.load_state_dict({**state, "mean.0.weight": torch.zeros(1, 5)})


def test_a_parameter_without_a_gradient_is_named() -> None:
    net = network()
    optimizer = AdamW(net.named_parameters(), (0.9, 0.99), 0.0)
    net[0](torch.zeros(1, 5).double()).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 1\.weight got no gradient"):
        optimizer.gradients()


def test_learning_rate_laws() -> None:
    law = dict(warmup_images=100, total_images=1000)
    assert learning_rate(2.0, "constant", images=50, **law) == 1.0
    assert learning_rate(2.0, "constant", images=900, **law) == 2.0
    assert learning_rate(2.0, "cosine", images=500, **law) == pytest.approx(1.0)
    assert learning_rate(2.0, "linear", images=750, **law) == pytest.approx(0.5)
    assert learning_rate(2.0, "cosine", images=1100, **law) == pytest.approx(0.0)
    assert learning_rate(2.0, "constant", 0, 1000, 1) == 2.0


def test_ema_half_life_and_ramp() -> None:
    """After one half-life of images an old value weighs one half, whatever the batch size."""
    for batch in (1, 16, 250):
        beta = decay(batch, 10**9, 1000.0, 0.05)
        assert beta ** (1000 / batch) == pytest.approx(0.5)
    assert decay(16, 0, 1000.0, 0.05) == 0.0
    assert decay(16, 200, 1000.0, 0.05) == pytest.approx(0.5 ** (16 / 10))
    assert decay(16, 0, 1000.0, None) == pytest.approx(0.5 ** (16 / 1000))
    assert decay(16, 10, 0.0, None) == 0.0


def test_ema_is_the_recursion() -> None:
    net = network()
    net.register_buffer("frequencies", torch.arange(3.0))
    average = EMA(net)
    expected = [p.detach().clone() for p in net.parameters()]
    for step in range(5):
        with torch.no_grad():
            for p in net.parameters():
                p += step
            net.get_buffer("frequencies").add_(1)
        average.update(0.75)
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, net.parameters(), strict=True)]
    for mine, value in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, value)
        assert not mine.requires_grad
    assert torch.equal(average.model.get_buffer("frequencies"), net.get_buffer("frequencies"))
    assert not average.model.training
    assert math.isclose(len(average.state_dict()), len(net.state_dict()))
