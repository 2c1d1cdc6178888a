"""BERT, Devlin et al. 2019 (1810.04805), and what has its layout, such as the MiniLM sentence encoders."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.text.layers import Encoded, activation, attended, given, key_mask, load

DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
}
LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp1": "intermediate.dense",
    "mlp2": "output.dense",
    "norm2": "output.LayerNorm",
}


class Layer(nn.Module):
    """Attention and perceptron, each added and then normed."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = options["hidden_size"], options["layer_norm_eps"]
        self.heads, self.act = options["num_attention_heads"], activation(options["hidden_act"])
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.mlp1 = nn.Linear(width, options["intermediate_size"])
        self.mlp2 = nn.Linear(options["intermediate_size"], width)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        x = self.norm1(x + self.out(attended(self.q(x), self.k(x), self.v(x), self.heads, seen)))
        return self.norm2(x + self.mlp2(self.act(self.mlp1(x))))


class BERT(nn.Module):
    """pooled: the mean of the states that are not masked, as the sentence encoders have it, not normalised."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        options = given(config, DEFAULTS)
        for name in ("position_embedding_type", "is_decoder"):
            if options[name] != DEFAULTS[name]:
                raise ValueError(f"text encoder: {name} is {options[name]!r}; only {DEFAULTS[name]!r} is read")
        width, eps = options["hidden_size"], options["layer_norm_eps"]
        self.width, self.longest = width, options["max_position_embeddings"]
        self.tokens, self.positions = nn.Embedding(options["vocab_size"], width), nn.Embedding(self.longest, width)
        self.types = nn.Embedding(options["type_vocab_size"], width)
        self.norm_in = nn.LayerNorm(width, eps=eps)
        self.layers = nn.ModuleList(Layer(options) for _ in range(options["num_hidden_layers"]))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Encoded:
        """ids (n, length) int64; mask (n, length), true where a token is looked at, None: everywhere."""
        seen = key_mask(mask)
        x = self.norm_in(self.tokens(ids) + self.types.weight[0] + self.positions.weight[: ids.shape[1]])
        before = x
        for layer in self.layers:
            before, x = x, layer(x, seen)
        weight = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        return Encoded(x, before, (x * weight).sum(1) / weight.sum(1))


def bert(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> BERT:
    """From config.json and tensors; heads for other tasks are left out.

    Raises:
        ValueError: tensors that are not this configuration's.
    """
    bare = {name.removeprefix("bert."): value for name, value in weights.items()}
    network = BERT(config)
    names = {
        "tokens.weight": "embeddings.word_embeddings.weight",
        "positions.weight": "embeddings.position_embeddings.weight",
        "types.weight": "embeddings.token_type_embeddings.weight",
        "norm_in.weight": "embeddings.LayerNorm.weight",
        "norm_in.bias": "embeddings.LayerNorm.bias",
    }
    for i in range(len(network.layers)):
        for ours, theirs in LAYER_NAMES.items():
            for part in ("weight", "bias"):
                names[f"layers.{i}.{ours}.{part}"] = f"encoder.layer.{i}.{theirs}.{part}"
    load(network, bare, names, unused=("pooler.", "cls.", "embeddings.position_ids"))
    return network.eval()
