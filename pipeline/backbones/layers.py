"""The few operations that several networks share. Stateless: the weights belong to the networks."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning

EmbeddingOrder = Literal["sin_cos", "cos_sin"]
EmbeddingDenominator = Literal["half", "half_minus_1"]

MAX_PERIOD = 10_000.0  # of the slowest sinusoid, Vaswani et al. 2017


def sinusoidal_embedding(level: Tensor, width: int, order: EmbeddingOrder, denominator: EmbeddingDenominator) -> Tensor:
    """(n,) float32 levels -> (n, width): sines and cosines at width / 2 frequencies from 1 down to 1 / 10000.

    The published networks differ in which half comes first and in whether the last frequency is exactly 1/10000
    ("half_minus_1": DDPM, EDM's DDPM++) or one step above it ("half": IDDPM, ADM, DiT). Weights do not carry over.
    """
    half = width // 2
    exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=level.device)
    exponent = exponent / (half if denominator == "half" else half - 1)
    angle = level.float()[:, None] * torch.exp(exponent)[None, :]
    parts = (angle.sin(), angle.cos()) if order == "sin_cos" else (angle.cos(), angle.sin())
    return torch.cat(parts, dim=1)


def label_embedding(table: nn.Embedding | None, conditioning: Conditioning) -> Tensor | None:
    """(n, width) rows of `table`, zeros where the label is `NO_LABEL`; None if nothing is asked for.

    Raises:
        ValueError: labels were given to a network that was built without classes.
    """
    label = conditioning.label
    if label is None:
        return None
    if table is None:
        raise ValueError("labels were given to a network without classes: pass no labels, or build it with classes > 0")
    return table(label.clamp(min=0)) * (label >= 0)[:, None]


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention over the pixels of (n, 3c, h, w), channels ordered (head, [q, k, v], width); (n, c, h, w)."""
    n, channels, h, w = qkv.shape
    width = channels // (3 * heads)
    q, k, v = qkv.flatten(2).transpose(1, 2).unflatten(2, (heads, 3, width)).permute(3, 0, 2, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, h * w, heads * width).transpose(1, 2).unflatten(2, (h, w))


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(x))."""
    return F.silu(norm(x))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability p and scale the rest by 1 / (1 - p); the random stream is torch's global one.

    On a CPU `x` is changed in place.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return SparseDropout.apply(x, p)


class SparseDropout(torch.autograd.Function):
    """Dropout that draws the gaps between dropped elements (geometric) in place of one number an element."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        ctx.dropped, ctx.scale = dropped_positions(x.numel(), p), 1 / (1 - p)
        ctx.mark_dirty(x)
        x.mul_(ctx.scale)
        in_memory_order(x).index_fill_(0, ctx.dropped, 0.0)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad * ctx.scale
        in_memory_order(grad).index_fill_(0, ctx.dropped, 0.0)
        return grad, None


def in_memory_order(x):
    if x.is_contiguous():
        return x.view(-1)
    return x.permute(0, 2, 3, 1).view(-1)


def dropped_positions(count: int, p: float) -> Tensor:
    draws = int(count * p + 6 * math.sqrt(count * p)) + 8
    gaps = torch.rand(draws).neg_().add_(1).log_().mul_(1 / math.log1p(-p)).floor_().add_(1).to(torch.int32)
    at = gaps.cumsum(0, dtype=torch.int32).sub_(1)
    return at[: int(torch.searchsorted(at, count))].long()
