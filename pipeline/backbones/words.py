"""What a network is told in words: encoded texts, and the keys and values that its cross-attention makes of them."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Words(NamedTuple):
    """Encoded texts, one a row.

    states: (n, length, text width). mask: bool (n, length), true where a token is attended to; None: everywhere, as the
    published Stable Diffusion families were trained. pooled: (n, pooled width), one vector a text. sizes: float (n, k),
    pixels and ratios that describe the image. Whichever the network has no input for is None.
    """

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None


class Prompt(NamedTuple):
    """What a network makes of `Words` once, whatever the image and the level.

    keys, values: of each cross-attention layer, (n, heads, length, head width). mask: (n, 1, 1, length) or None.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    pooled: Tensor | None
    sizes: Tensor | None


class CrossAttention(nn.Module):
    """Image tokens (n, l, width) look at a text's keys and values."""

    def __init__(self, width: int, text_width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.place = 0  # of this layer among those of its network
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(text_width, 2 * width, bias=bias)  # features ([k, v], head, width of a head)
        self.proj = nn.Linear(width, width)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Each (n, heads, length, head width)."""
        k, v = self.kv(states).chunk(2, dim=2)
        return in_heads(k, self.heads), in_heads(v, self.heads)

    def forward(self, x: Tensor, prompt: Prompt) -> Tensor:
        q, k, v = in_heads(self.q(x), self.heads), prompt.keys[self.place], prompt.values[self.place]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=prompt.mask)
        return self.proj(out.transpose(1, 2).flatten(2))


def in_heads(x: Tensor, heads: int) -> Tensor:
    """(n, l, heads width) -> (n, heads, l, width)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def prompt_of(layers: list[CrossAttention], states: Tensor, words: Words) -> Prompt:
    """Keys and values of every layer in order; states are the words' own, or what the network made of them.

    Raises:
        ValueError: a mask of another shape than the texts.
    """
    mask = words.mask
    if mask is not None and mask.shape != states.shape[:2]:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} was given with texts of {tuple(states.shape[:2])}")
    made = [layer.keys_values(states) for layer in layers]
    keys, values = (tuple(pair[i] for pair in made) for i in range(2))
    return Prompt(keys, values, None if mask is None else mask[:, None, None, :], words.pooled, words.sizes)


def check_text(words: Words, text_width: int, pooled_width: int, sizes: int) -> None:
    """Raises ValueError where the words do not have what a network of these widths takes."""
    if words.states.ndim != 3 or words.states.shape[2] != text_width:
        raise ValueError(
            f"texts of shape {tuple(words.states.shape)} were given to a network that takes (n, length, {text_width})"
        )
    for name, value, width in (("pooled", words.pooled, pooled_width), ("sizes", words.sizes, sizes)):
        got = None if value is None else tuple(value.shape[1:])
        if got != ((width,) if width else None):
            raise ValueError(
                f"{name} of shape {got} a row was given to a network that takes {(width,) if width else None}"
            )
