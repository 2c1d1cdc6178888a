"""The few operations that several networks share. Stateless: the weights belong to the networks."""

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning

EmbeddingOrder = Literal["sin_cos", "cos_sin"]
EmbeddingDenominator = Literal["half", "half_minus_1"]

MAX_PERIOD = 10_000.0  # of the slowest sinusoid, Vaswani et al. 2017


def sinusoidal_embedding(
    level: Tensor, width: int, order: EmbeddingOrder = "cos_sin", denominator: EmbeddingDenominator = "half"
) -> Tensor:
    """(n,) levels -> (n, width) float32: sines and cosines at width / 2 frequencies from 1 down to 1 / 10000.

    The published networks differ in which half comes first and in whether the last frequency is exactly 1/10000
    ("half_minus_1": DDPM, EDM's DDPM++) or one step above it ("half": IDDPM, ADM, DiT). Weights do not carry over.
    """
    half = width // 2
    exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=level.device)
    exponent = exponent / (half if denominator == "half" else half - 1)
    angle = level.float()[:, None] * torch.exp(exponent)[None, :]
    return paired(angle, order)


def paired(angle: Tensor, order: EmbeddingOrder) -> Tensor:
    """(n, k) angles -> (n, 2k) sines and cosines."""
    return torch.cat((angle.sin(), angle.cos()) if order == "sin_cos" else (angle.cos(), angle.sin()), dim=1)


def label_embedding(table: nn.Embedding | None, conditioning: Conditioning) -> Tensor | None:
    """(n, width): rows of `table`, zeros where the label is `NO_LABEL`; None if nothing is asked for.

    Raises:
        ValueError: labels were given to a network that was built without classes.
    """
    label = conditioning.label
    if label is None:
        return None
    if table is None:
        raise ValueError("labels were given to a network without classes: pass no labels, or build it with classes > 0")
    return table(label.clamp(min=0)) * (label >= 0)[:, None]


def group_norm(width: int, groups: int, group_width: int, eps: float) -> nn.GroupNorm:
    """GroupNorm of `groups` groups, fewer where they would hold less than `group_width` channels each.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    count = min(groups, max(1, width // group_width))
    if width % count:
        raise ValueError(
            f"{width} channels do not divide into {count} groups: change the widths, norm_groups or norm_group_width"
        )
    return nn.GroupNorm(count, width, eps=eps)


class Attention(nn.Module):
    """(x + proj(self-attention over the pixels of norm(x))) * skip_scale; x (n, c, h, w)."""

    def __init__(self, norm: nn.GroupNorm, heads: int, skip_scale: float = 1.0) -> None:
        super().__init__()
        width = norm.num_channels
        self.heads, self.skip_scale = heads, skip_scale
        self.norm = norm
        self.qkv = nn.Conv2d(width, 3 * width, 1)  # channels ordered (head, [q, k, v], channel of the head)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(attend(self.qkv(self.norm(x)), self.heads)).add_(x)
        return h if self.skip_scale == 1 else h.mul_(self.skip_scale)


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention over the pixels of (n, 3c, h, w), channels ordered (head, [q, k, v], width); (n, c, h, w)."""
    n, channels, h, w = qkv.shape
    width = channels // (3 * heads)
    tokens = qkv.flatten(2).transpose(1, 2).contiguous()  # a view in channels_last
    q, k, v = tokens.unflatten(2, (heads, 3, width)).permute(3, 0, 2, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, h * w, heads * width).transpose(1, 2).unflatten(2, (h, w))


def fast_layout(h: Tensor) -> Tensor:
    """Activations of a convolutional network as the device likes them: channels_last on a CPU, where it is 1.1 times as
    fast as the default and nothing downstream undoes it; elsewhere as they are (the training step decides)."""
    on_cpu = h.device.type == "cpu" and not torch.compiler.is_compiling()
    return h.contiguous(memory_format=torch.channels_last) if on_cpu else h


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(x))."""
    return F.silu(norm(x))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability p and scale the rest by 1 / (1 - p); the random stream is torch's global one.

    On a CPU in eager mode `x` (n, c, h, w) is overwritten, and about 8 times less time goes by than in `F.dropout`.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    x = x.contiguous(memory_format=layout(x))
    return cast(Tensor, SparseDropout.apply(x, dropped_positions(x.numel(), p), 1 / (1 - p)))


class SparseDropout(torch.autograd.Function):
    """x * scale, in place, but 0 at some positions of its memory: with p numbers drawn an element in place of one."""

    @staticmethod
    def forward(x: Tensor, dropped: Tensor, scale: float) -> Tensor:
        in_memory_order(x.mul_(scale)).index_fill_(0, dropped, 0.0)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs[1])
        ctx.scale, ctx.layout = inputs[2], layout(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        grad = (grad_outputs[0] * ctx.scale).contiguous(memory_format=ctx.layout)
        in_memory_order(grad).index_fill_(0, ctx.saved_tensors[0], 0.0)
        return grad, None, None


def dropped_positions(count: int, p: float) -> Tensor:
    """Increasing positions in 0..count-1, each present with probability p.

    Distances are geometric: floor(log u / log(1 - p)) + 1.
    """
    draws = int(count * p + 6 * math.sqrt(count * p)) + 8
    u = torch.rand(draws).neg_().add_(1.0)  # in (0, 1], on the generator's own grid of 2 ** -24
    distance = u.log_().div_(math.log1p(-p)).floor_().add_(1.0).clamp_(max=count + 1)
    at = distance.long().cumsum(0).sub_(1)
    last = int(at[-1])
    if last < count:  # happens about once in 10 ** 9 calls: draw for the rest
        return torch.cat((at, last + 1 + dropped_positions(count - last - 1, p)))
    return at[: int(torch.searchsorted(at, count))]


def layout(x: Tensor) -> torch.memory_format:
    """The dense memory layout nearest to the one of (n, c, h, w) x."""
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def in_memory_order(x: Tensor) -> Tensor:
    """A flat view of dense x."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).view(-1)
