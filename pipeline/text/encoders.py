"""A text encoder from a folder as it is published: config.json and safetensors, read by what the configuration says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.choose import choose
from pipeline.folders import TRANSFORMERS_WEIGHTS, read_json, read_weights
from pipeline.text.bert import BERT, bert
from pipeline.text.clip import CLIPText, clip_text
from pipeline.text.layers import Encoded
from pipeline.text.t5 import T5Encoder, t5_encoder

__all__ = ["Encoded", "TextEncoder", "load_encoder"]

TextEncoder = CLIPText | T5Encoder | BERT

# model_type of config.json -> (config, tensors) -> encoder
ENCODERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], TextEncoder]] = {
    "clip_text_model": clip_text,
    "t5": t5_encoder,
    "bert": bert,
}


def load_encoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """The encoder of a folder, on the CPU, frozen, in evaluation mode.

    Raises:
        ValueError: no such folder, another kind of encoder, or tensors that are not its configuration's; named.
    """
    config = read_json(Path(folder) / "config.json")
    make = choose(ENCODERS, str(config.get("model_type")), f"kind of text encoder in {folder}")
    network = make(config, read_weights(folder, TRANSFORMERS_WEIGHTS))
    return network.to(dtype).requires_grad_(False)
