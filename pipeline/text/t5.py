"""The encoder of T5, Raffel et al. 2020 (1910.10683), and of T5 v1.1 with its gated perceptron."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.text.layers import Encoded, activation, attended, given, key_mask, load

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}


class Norm(nn.Module):
    """x / rms(x) times a weight, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


class Layer(nn.Module):
    """Attention with a bias by distance and no scaling, then a perceptron, each on its norm and added."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        width, heads, hidden = options["d_model"], options["num_heads"], options["d_ff"]
        inner, eps = heads * options["d_kv"], options["layer_norm_epsilon"]
        gate, act = perceptron(options["feed_forward_proj"])
        self.heads, self.act = heads, activation(act)
        self.norm1, self.norm2 = Norm(width, eps), Norm(width, eps)
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width, bias=False)
        self.mlp1 = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False) if gate else None
        self.mlp2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(attended(self.q(h), self.k(h), self.v(h), self.heads, bias, scale=1.0))
        h = self.norm2(x)
        hidden = self.act(self.mlp1(h))
        return x + self.mlp2(hidden if self.gate is None else hidden * self.gate(h))


def perceptron(name: str) -> tuple[bool, str]:
    """Whether feed_forward_proj has a gate, and its activation: "gated-gelu" is the tanh approximation's."""
    kind, _, act = name.rpartition("-")
    if kind not in ("", "gated"):
        raise ValueError(f"text encoder: feed_forward_proj is {name!r}; ACTIVATION or gated-ACTIVATION is needed")
    return bool(kind), "gelu_new" if name == "gated-gelu" else act


def buckets(length: int, count: int, farthest: int) -> Tensor:
    """int64 (length, length): the bucket of each key's distance from a query: half exact, half logarithmic, by side."""
    place = torch.arange(length)
    distance = place[None, :] - place[:, None]
    half, size = count // 2, distance.abs()
    exact = half // 2
    far = torch.log(size.clamp(min=1).float() / exact) / math.log(farthest / exact) * (half - exact)
    within = torch.where(size < exact, size, (exact + far.long()).clamp(max=half - 1))
    return within + half * (distance > 0)


class T5Encoder(nn.Module):
    """states: after the last norm; no pooled vector."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        options = given(config, DEFAULTS)
        self.buckets, self.farthest = (options[f"relative_attention_{x}"] for x in ("num_buckets", "max_distance"))
        self.width, self.longest = options["d_model"], None
        self.tokens = nn.Embedding(options["vocab_size"], self.width)
        self.distances = nn.Embedding(self.buckets, options["num_heads"])
        self.layers = nn.ModuleList(Layer(options) for _ in range(options["num_layers"]))
        self.norm_out = Norm(self.width, options["layer_norm_epsilon"])

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Encoded:
        """ids (n, length) int64; mask (n, length), true where a token is looked at, None: everywhere."""
        x = self.tokens(ids)
        place = buckets(ids.shape[1], self.buckets, self.farthest).to(ids.device)
        bias = self.distances(place).permute(2, 0, 1)[None]
        seen = key_mask(mask)
        if seen is not None:
            bias = bias.masked_fill(~seen, torch.finfo(bias.dtype).min)
        before = x
        for layer in self.layers:
            before, x = x, layer(x, bias)
        return Encoded(self.norm_out(x), before, None)


def t5_encoder(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> T5Encoder:
    """From config.json and tensors, of the encoder or of the whole model, whose decoder is left out.

    Raises:
        ValueError: tensors that are not this configuration's.
    """
    network = T5Encoder(config)
    tokens = next((n for n in ("shared.weight", "encoder.embed_tokens.weight") if n in weights), "shared.weight")
    attention = "encoder.block.0.layer.0.SelfAttention"
    names = {
        "tokens.weight": tokens,
        "distances.weight": f"{attention}.relative_attention_bias.weight",
        "norm_out.weight": "encoder.final_layer_norm.weight",
    }
    gated = perceptron(given(config, DEFAULTS)["feed_forward_proj"])[0]
    second = {"mlp1": "wi_0", "gate": "wi_1", "mlp2": "wo"} if gated else {"mlp1": "wi", "mlp2": "wo"}
    for i in range(len(network.layers)):
        block = f"encoder.block.{i}.layer"
        parts = {f"layers.{i}.{our}": f"{block}.0.SelfAttention.{our}" for our in ("q", "k", "v")}
        parts |= {f"layers.{i}.out": f"{block}.0.SelfAttention.o", f"layers.{i}.norm1": f"{block}.0.layer_norm"}
        parts |= {f"layers.{i}.{our}": f"{block}.1.DenseReluDense.{their}" for our, their in second.items()}
        parts |= {f"layers.{i}.norm2": f"{block}.1.layer_norm"}
        names |= {f"{our}.weight": f"{their}.weight" for our, their in parts.items()}
    load(network, weights, names, unused=("decoder.", "lm_head.", "encoder.embed_tokens.", "shared."))
    return network.eval()
