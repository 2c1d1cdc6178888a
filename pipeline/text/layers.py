"""What the text encoders share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.choose import choose


class Encoded(NamedTuple):
    """states: (n, length, width) of the last layer. penultimate: the same of the layer before it, without a last norm.

    pooled: (n, features), one vector a text, or None where the encoder has none.
    """

    states: Tensor
    penultimate: Tensor
    pooled: Tensor | None


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    return choose(ACTIVATIONS, name, "activation of a text encoder")


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention over `heads` of (n, length, width), as the result is; bias broadcasts to (n, heads, length, length)."""
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """(n, length) -> (n, 1, 1, length), true where a token is looked at.

    Raises:
        ValueError: a text without a single token to look at.
    """
    if mask is None:
        return None
    empty = ~mask.bool().any(1)
    if bool(empty.any()):
        raise ValueError(f"text {int(empty.nonzero()[0, 0])} of the batch has no token that is not masked")
    return mask.bool()[:, None, None, :]


def given(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options an encoder reads, its defaults filled in; what it does not read is of training or of other tasks."""
    return {name: config.get(name, default) for name, default in defaults.items()}


def load(network: nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str], unused: tuple[str, ...]) -> None:
    """Copies published tensors into the network, in the network's dtype.

    names: our name -> theirs. unused: beginnings of the names of tensors that this encoder has no use for.

    Raises:
        ValueError: a tensor is missing, has another shape, or is unknown.
    """
    own, theirs = network.state_dict(), dict(weights)
    for ours, name in names.items():
        if name not in theirs:
            raise ValueError(f"text encoder: tensor {name} is missing")
        value = theirs.pop(name)
        if value.shape != own[ours].shape:
            raise ValueError(f"text encoder: {name} has shape {tuple(value.shape)}, not {tuple(own[ours].shape)}")
        own[ours].copy_(value)
    extra = sorted(name for name in theirs if not name.startswith(unused))
    if extra:
        raise ValueError(f"text encoder: {len(extra)} unknown tensors, such as {', '.join(extra[:3])}")
    missing = sorted(own.keys() - names.keys())
    if missing:
        raise ValueError(f"text encoder: no tensor is named for {missing[0]}")
