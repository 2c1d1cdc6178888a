"""Shared operations against their definitions."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from pipeline.backbones import layers
from pipeline.backbones.dit import position_embedding
from pipeline.backbones.layers import (
    Attention,
    EmbeddingDenominator,
    EmbeddingOrder,
    attend,
    dropped_positions,
    kept_scale,
    normalised,
    silu_dropout,
    sinusoidal_embedding,
)
from pipeline.backbones.unet import Block, UNetConfig, resized
from pipeline.backbones.vdm import fourier_features


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin"])
@pytest.mark.parametrize("denominator", ["half", "half_minus_1"])
def test_sinusoids(order: EmbeddingOrder, denominator: EmbeddingDenominator) -> None:
    level = torch.tensor([0.0, 1.0, 0.37, 999.0])
    made = sinusoidal_embedding(level, 32, order, denominator)
    for i in range(16):
        angle = level.double() * 10_000.0 ** (-i / (16 if denominator == "half" else 15))
        sine, cosine = made[:, i + 16 * (order == "cos_sin")], made[:, i + 16 * (order == "sin_cos")]
        torch.testing.assert_close(sine.double(), angle.sin(), rtol=0, atol=2e-4)
        torch.testing.assert_close(cosine.double(), angle.cos(), rtol=0, atol=2e-4)
    theirs = get_timestep_embedding(
        level, 32, flip_sin_to_cos=order == "cos_sin", downscale_freq_shift=0 if denominator == "half" else 1
    )
    assert torch.equal(made, theirs)


def test_fourier_features_tell_grey_levels_apart() -> None:
    z = torch.rand(2, 3, 4, 4) * 2 - 1
    made = fourier_features(z, (6, 7))
    assert made.shape == (2, 15, 4, 4)
    torch.testing.assert_close(made[:, 3:6], (128 * math.pi * z.double()).sin().float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(made[:, 12:15], (256 * math.pi * z.double()).cos().float(), rtol=0, atol=1e-4)
    # one grey level is 1/128: exponent 7 has that period
    torch.testing.assert_close(
        fourier_features(z + 1 / 128, (7,))[:, 3:], made[:, [6, 7, 8, 12, 13, 14]], rtol=0, atol=2e-4
    )


def test_position_embedding_is_different_everywhere() -> None:
    table = position_embedding(32, 6, 6)
    assert table.shape == (36, 32)
    assert torch.cdist(table.double(), table.double()).add(10 * torch.eye(36)).min() > 0.5


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_against_its_definition(heads: int, layout: torch.memory_format) -> None:
    qkv = torch.randn(2, 3 * 16, 3, 5).contiguous(memory_format=layout)
    expected = torch.empty(2, 16, 3, 5)
    width = 16 // heads
    for n in range(2):
        for head in range(heads):
            q, k, v = qkv[n].flatten(1)[3 * width * head : 3 * width * (head + 1)].view(3, width, 15)
            weight = torch.softmax(q.T @ k / math.sqrt(width), dim=1)  # (asking pixel, asked pixel)
            expected[n, width * head : width * (head + 1)] = (weight @ v.T).T.view(width, 3, 5)
    torch.testing.assert_close(attend(qkv, heads), expected)


@pytest.mark.parametrize("modulation", ["shift", "scale_shift"])
@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize("projection", [False, True])
def test_block_against_its_definition(modulation: Any, resample: Any, projection: bool) -> None:
    torch.manual_seed(0)
    config = UNetConfig(
        base_width=8,
        modulation=modulation,
        resample="block",
        resample_projection=projection,
        skip_scale=0.6,
        norm_eps=1e-3,
    )
    block = Block(config, 8, 8, attention=True, resample=resample).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 32)

    def norm(h: Tensor, layer: nn.GroupNorm) -> Tensor:
        groups = h.unflatten(1, (layer.num_groups, -1))
        mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, correction=0)
        return ((groups - mean) / (variance + 1e-3).sqrt()).flatten(1, 2) * layer.weight[:, None, None] + layer.bias[
            :, None, None
        ]

    def resize(h: Tensor) -> Tensor:
        if resample == "down":
            return (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else h

    h = F.conv2d(resize(F.silu(norm(x, block.norm1))), block.conv1.weight, block.conv1.bias, padding=1)
    modulated = (block.modulation.weight @ emb.T).T + block.modulation.bias
    if modulation == "shift":
        h = norm(h + modulated[:, :, None, None], block.norm2)
    else:
        h = norm(h, block.norm2) * (1 + modulated[:, :8, None, None]) + modulated[:, 8:, None, None]
    h = F.conv2d(F.silu(h), block.conv2.weight, block.conv2.bias, padding=1)
    skip = resize(x) if block.skip is None else F.conv2d(resize(x), block.skip.weight, block.skip.bias)
    assert (block.skip is not None) == (projection and resample != "none")
    expected = 0.6 * (h + skip)
    attention = block.attention
    assert isinstance(attention, Attention)
    expected = 0.6 * (expected + attention.proj(attend(attention.qkv(norm(expected, attention.norm)), 1)))
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-4, atol=1e-4)


def test_resizing_keeps_the_mean() -> None:
    x = torch.randn(2, 3, 4, 4)
    how: Any
    for how in ("down", "up"):
        torch.testing.assert_close(resized(x, how).mean((2, 3)), x.mean((2, 3)))


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropped_positions_are_independent_with_the_right_probability(p: float) -> None:
    """Counts in cells of 1/50 of the range are binomial, and so is the number of neighbours that are both dropped."""
    torch.manual_seed(0)
    count, repeats = 10_000, 40
    masks = torch.zeros(repeats, count)
    for mask in masks:
        positions = dropped_positions(count, p)
        assert positions.numel() == 0 or (positions.diff().min() >= 1 and positions[0] >= 0 and positions[-1] < count)
        mask[positions] = 1
    cells = masks.view(-1, count // 50).sum(1)
    chi2 = float(((cells - count / 50 * p) ** 2).sum() / (count / 50 * p * (1 - p)))
    assert abs(chi2 - len(cells)) < 5 * math.sqrt(len(cells) * (2 + 1 / (count / 50 * p * (1 - p))))
    pairs, n = float((masks[:, 1:] * masks[:, :-1]).sum()), repeats * (count - 1)
    assert abs(pairs - n * p * p) < 6 * math.sqrt(n * p * p * (1 + 2 * p))
    first, last = masks[:, 0].mean(), masks[:, -1].mean()
    assert max(abs(first - p), abs(last - p)) < 5 * math.sqrt(p * (1 - p) / repeats)


def test_too_few_draws_are_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that all say "the very next one" run out long before the end."""
    drawn: list[int] = []
    true_rand = torch.rand

    def short(n: int) -> Tensor:
        drawn.append(n)
        return torch.zeros(n) if len(drawn) == 1 else true_rand(n)  # u = 1: distance 1

    monkeypatch.setattr(layers.torch, "rand", short)
    torch.manual_seed(0)
    positions = dropped_positions(100_000, 0.01)
    assert len(drawn) == 2
    assert torch.equal(positions[: drawn[0]], torch.arange(drawn[0]))
    rest = positions[drawn[0] :]
    assert rest.diff().min() >= 1
    assert abs(len(rest) - 0.01 * (100_000 - drawn[0])) < 6 * math.sqrt(1000)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_scales_and_its_gradient_has_the_same_mask(
    layout: torch.memory_format, grad_layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    leaf = (torch.randn(4, 8, 6, 6).abs() + 0.1).contiguous(memory_format=layout).requires_grad_()
    out = silu_dropout(leaf, 0.25, training=True)
    kept = out != 0
    assert 0.6 < kept.float().mean() < 0.9
    torch.testing.assert_close(out, torch.where(kept, F.silu(leaf), 0.0))
    upstream = torch.randn(4, 8, 6, 6).contiguous(memory_format=grad_layout)
    (grad,) = torch.autograd.grad(out, leaf, upstream)
    (expected,) = torch.autograd.grad(F.silu(leaf), leaf, torch.where(kept, upstream, 0.0))
    torch.testing.assert_close(grad, expected)
    kernel = torch.randn(2, 2)
    torch.testing.assert_close(kept_scale(kernel, 0.25, training=True), kernel / 0.75)
    assert kept_scale(kernel, 0.25, training=False) is kernel
    assert kept_scale(kernel, 0.0, training=True) is kernel


def test_a_block_keeps_its_mean_under_dropout() -> None:
    """The factor on the kernel makes the expectation of the training output that of the evaluation."""
    torch.manual_seed(0)
    config = UNetConfig(base_width=8, dropout=0.4, last_gain=1.0)
    block, x, emb = Block(config, 8, 8, attention=False), torch.randn(1, 8, 4, 4), torch.randn(1, 32)
    with torch.no_grad():
        expected = block.eval()(x, emb)
        block.train()
        runs = torch.stack([block(x, emb) for _ in range(4000)])
    error = (runs.mean(0) - expected) / (runs.std(0) / math.sqrt(len(runs)))
    assert error.abs().max() < 5


def test_dropout_follows_the_global_seed_and_does_nothing_in_evaluation() -> None:
    x = torch.randn(2, 4, 8, 8)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return silu_dropout(x.clone(), 0.3, training=True)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    before = torch.get_rng_state()
    assert torch.equal(silu_dropout(x, 0.3, training=False), F.silu(x))
    assert torch.equal(silu_dropout(x, 0.0, training=True), F.silu(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_takes_views() -> None:
    torch.manual_seed(0)
    leaf = torch.rand(2, 8, 6, 6, requires_grad=True)
    out = silu_dropout((leaf + 1).permute(0, 3, 1, 2), 0.25, training=True)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    (expected,) = torch.autograd.grad((F.silu(leaf + 1) * (out != 0).permute(0, 2, 3, 1)).sum(), leaf)
    torch.testing.assert_close(grad, expected)


def test_dropout_differentiates_twice() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return silu_dropout(x.sin(), 0.3, training=True).square()

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


# --- group norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [3, 6])
def test_narrow_groups_have_torchs_gradients(groups: int) -> None:
    """Once and twice, where torch's own kernel would be the slow one; elsewhere it is torch's kernel."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, 6, eps=1e-3).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    wide = torch.randn(2, 6, 3, 4, dtype=torch.float64) + 3
    x = wide.contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = (x, norm.weight, norm.bias)
    g = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    made = normalised(x, norm)
    assert "NarrowGroupNorm" in type(made.grad_fn).__name__
    assert "NarrowGroupNorm" not in type(normalised(wide.requires_grad_(), norm).grad_fn).__name__
    for mine, theirs in zip(torch.autograd.grad(made, leaves, g), torch.autograd.grad(norm(x), leaves, g), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradgradcheck(lambda x, w, b: normalised(x, norm), leaves)
