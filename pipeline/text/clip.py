"""CLIP's text encoder, Radford et al. 2021 (2103.00020): a causal transformer with its norms first."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.text.layers import Encoded, activation, attended, given, load

DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
LAYER_NAMES = {
    "norm1": "layer_norm1",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp1": "mlp.fc1",
    "mlp2": "mlp.fc2",
}
UNTAUGHT_END = 2  # eos_token_id of the first published configurations, which is not the end's: the largest id is


class Layer(nn.Module):
    """Causal attention and perceptron, each on its norm and added."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = options["hidden_size"], options["layer_norm_eps"]
        self.heads, self.act = options["num_attention_heads"], activation(options["hidden_act"])
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp1 = nn.Linear(width, options["intermediate_size"])
        self.mlp2 = nn.Linear(options["intermediate_size"], width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(attended(self.q(h), self.k(h), self.v(h), self.heads, bias))
        return x + self.mlp2(self.act(self.mlp1(self.norm2(x))))


class CLIPText(nn.Module):
    """states: after the last norm. pooled: that of the first end token, projected where there is a projection."""

    def __init__(self, config: Mapping[str, Any], projection: bool) -> None:
        super().__init__()
        options = given(config, DEFAULTS)
        width = options["hidden_size"]
        self.end, self.longest, self.width = options["eos_token_id"], options["max_position_embeddings"], width
        self.tokens = nn.Embedding(options["vocab_size"], width)
        self.positions = nn.Embedding(self.longest, width)
        self.layers = nn.ModuleList(Layer(options) for _ in range(options["num_hidden_layers"]))
        self.norm_out = nn.LayerNorm(width, eps=options["layer_norm_eps"])
        self.projection = nn.Linear(width, options["projection_dim"], bias=False) if projection else None

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Encoded:
        """ids (n, length) int64. mask (n, length): as the published pipelines never give one, None."""
        length = ids.shape[1]
        x = self.tokens(ids) + self.positions.weight[:length]
        seen = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]
        if mask is not None:
            seen = seen & mask.bool()[:, None, None, :]
        before = x
        for layer in self.layers:
            before, x = x, layer(x, seen)
        states = self.norm_out(x)
        ends = ids if self.end == UNTAUGHT_END else (ids == self.end).long()
        pooled = states[torch.arange(len(ids), device=ids.device), ends.argmax(1)]
        return Encoded(states, before, pooled if self.projection is None else self.projection(pooled))


def clip_text(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> CLIPText:
    """From config.json and tensors. Raises ValueError for tensors that are not this configuration's."""
    bare = {name.removeprefix("text_model."): value for name, value in weights.items()}
    network = CLIPText(config, "text_projection.weight" in bare)
    names = {
        "tokens.weight": "embeddings.token_embedding.weight",
        "positions.weight": "embeddings.position_embedding.weight",
        "norm_out.weight": "final_layer_norm.weight",
        "norm_out.bias": "final_layer_norm.bias",
    }
    if network.projection is not None:
        names["projection.weight"] = "text_projection.weight"
    for i in range(len(network.layers)):
        for ours, theirs in LAYER_NAMES.items():
            for part in ("weight", "bias"):
                names[f"layers.{i}.{ours}.{part}"] = f"encoder.layers.{i}.{theirs}.{part}"
    load(network, bare, names, unused=("embeddings.position_ids",))
    return cast(CLIPText, network.eval())
