"""The few operations that several networks share. Stateless: the weights belong to the networks."""

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning

EmbeddingOrder = Literal["sin_cos", "cos_sin"]
EmbeddingDenominator = Literal["half", "half_minus_1"]

NARROW = 4  # channels of a group below which torch's own backward pass of a group norm is the slower one
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
    """(n, width): the row of `table` of each image's label, or the sum of its tags' rows; zeros for an unconditional
    row; None if nothing is asked for.

    Raises:
        ValueError: labels or tags were given to a network that was built without classes.
    """
    label, tags = conditioning.label, conditioning.tags
    if table is None and (label is not None or tags is not None):
        given = "labels" if tags is None else "tags"
        raise ValueError(f"{given} were given to a network without classes: pass none, or build it with classes > 0")
    if table is None:
        return None
    if tags is not None:
        return tags.to(table.weight.dtype) @ table.weight
    if label is None:
        return None
    return table(label.clamp(min=0)) * (label >= 0)[:, None]


def refuse_augmentation(conditioning: Conditioning) -> None:
    """Raises ValueError where augmentation is described to a network that has no input for it."""
    if conditioning.augmentation is not None:
        raise ValueError(
            "augmentation was described to a network that takes none: pass none, or use a unet with augmentation_labels"
        )


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
        h = self.proj(attend(self.qkv(normalised(x, self.norm)), self.heads)).add_(x)
        return h if self.skip_scale == 1 else h.mul_(self.skip_scale)


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention over the pixels of (n, 3c, h, w), channels ordered (head, [q, k, v], width); (n, c, h, w)."""
    n, channels, h, w = qkv.shape
    width = channels // (3 * heads)
    tokens = qkv.flatten(2).transpose(1, 2).contiguous()  # a view in channels_last
    q, k, v = (part.transpose(1, 2) for part in tokens.unflatten(2, (heads, 3, width)).unbind(3))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, h * w, heads * width).transpose(1, 2).unflatten(2, (h, w))


def fast_layout(h: Tensor) -> Tensor:
    """Activations of a convolutional network as the device likes them: channels_last on a CPU, where it is 1.1 times as
    fast as the default and nothing downstream undoes it; elsewhere as they are (the training step decides)."""
    return h.contiguous(memory_format=torch.channels_last) if in_python(h) else h


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(x))."""
    return F.silu(normalised(x, norm))


def normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """norm(x). Narrow groups in channels_last on a CPU have a backward pass of our own: torch's is up to twice as slow
    there, for it goes through the memory group by group."""
    narrow = norm.num_channels < NARROW * norm.num_groups and layout(x) == torch.channels_last
    if narrow and in_python(x) and x.dtype == norm.weight.dtype and x.requires_grad:
        return cast(Tensor, NarrowGroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps))
    return norm(x)


class NarrowGroupNorm(torch.autograd.Function):
    """Group norm whose gradient is taken channel by channel: dx = a g + b x + c, with a, b, c constant over pixels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, channels, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, h * w, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, weight, bias, mean, rstd) = grad_outputs, ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            of = [t for t, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
            y = F.group_norm(x, ctx.groups, weight, bias, ctx.eps)
            found = iter(torch.autograd.grad(y, of, g, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
        n, channels, h, w = x.shape
        by_group = (n, ctx.groups, channels // ctx.groups)
        mean, rstd, gain = mean.unsqueeze(2), rstd.unsqueeze(2), weight.view(1, *by_group[1:])
        product = g * x
        sum_g = g.sum((2, 3)).view(by_group)
        sum_gz = rstd * (product.sum((2, 3)).view(by_group) - mean * sum_g)  # z: normalised x
        size = h * w * by_group[2]
        b = (gain * sum_gz).sum(2, keepdim=True).mul_(-rstd * rstd / size)
        c = (gain * sum_g).sum(2, keepdim=True).mul_(-rstd / size) - b * mean
        a, b, c = (t.expand(by_group).reshape(n, channels, 1, 1) for t in (gain * rstd, b, c))
        dx = torch.addcmul(c, x, b, out=product).addcmul_(g, a)
        return dx, sum_gz.sum(0).view(-1), sum_g.sum(0).view(-1), None, None


def silu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """silu(x), then each element zeroed with probability p; the random stream is torch's global one.

    On a CPU in eager mode it takes about 8 times less time than `F.dropout`, and the elements that stay are not scaled
    up: `kept_scale` belongs on the kernel that comes next, a smaller tensor.
    """
    if not training or p == 0:
        return F.silu(x)
    if not in_python(x):
        return F.dropout(F.silu(x), p)
    x = x.contiguous(memory_format=layout(x))
    return cast(Tensor, SiluDropout.apply(x, dropped_positions(x.numel(), p)))


def kept_scale(kernel: Tensor, p: float, training: bool) -> Tensor:
    """The kernel after `silu_dropout`, with the factor 1 / (1 - p) that the activations were not given."""
    return kernel * (1 / (1 - p)) if training and p and in_python(kernel) else kernel


def in_python(x: Tensor) -> bool:
    """Whether x is on a CPU in eager mode: there operations written in Python for its memory are used."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class SiluDropout(torch.autograd.Function):
    """silu(x), but 0 at some positions of its memory."""

    @staticmethod
    def forward(x: Tensor, dropped: Tensor) -> Tensor:
        y = F.silu(x)
        in_memory_order(y).index_fill_(0, dropped, 0.0)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        x, dropped = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            kept = in_memory_order(torch.ones_like(x)).index_fill_(0, dropped, 0.0).as_strided(x.shape, x.stride())
            sigmoid = torch.sigmoid(x)
            return grad_outputs[0] * kept * sigmoid * (1 + x * (1 - sigmoid)), None
        grad = torch.ops.aten.silu_backward(grad_outputs[0].contiguous(memory_format=layout(x)), x)
        in_memory_order(grad).index_fill_(0, dropped, 0.0)
        return grad, None


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
