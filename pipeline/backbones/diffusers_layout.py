"""What the readers and writers of diffusers' layouts share. Nothing here imports diffusers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.backbones.table import Architecture
from pipeline.size import shown

Weights = dict[str, Tensor]


class Diffusers(NamedTuple):
    """config: what `config.json` holds, `_class_name` included. weights: what the safetensors file holds."""

    config: dict[str, Any]
    weights: Weights


def refused(reason: str) -> ValueError:
    return ValueError(f"no interchange with diffusers: {reason}")


def square(architecture: Architecture) -> int:
    """Pixels a side. Raises ValueError for an image that is not square: `sample_size` is one number."""
    if not isinstance(architecture.size, int):
        raise refused(f"size is {shown(architecture.size)}; diffusers' sample_size is one number, for square images")
    return architecture.size


def checked(architecture: Architecture, weights: Mapping[str, Tensor]) -> Weights:
    """The weights, if names and shapes are the architecture's. Raises ValueError otherwise."""
    return fitting(skeleton(architecture), weights)


def fitting(network: nn.Module, weights: Mapping[str, Tensor]) -> Weights:
    """The weights, if names and shapes are the network's. Raises ValueError otherwise."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in weights.items()}
    for kind, names in (("missing", expected.keys() - got.keys()), ("unknown", got.keys() - expected.keys())):
        if names:
            raise refused(f"{len(names)} {kind} tensors, such as {', '.join(sorted(names)[:3])}")
    for name, shape in expected.items():
        if got[name] != shape:
            raise refused(f"tensor {name} has shape {got[name]}, not {shape}")
    return dict(weights)


def settled(config: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers configuration with its defaults filled in. Raises ValueError for an option we do not have."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        raise refused(f"unknown option {unknown[0]}")
    full = {**defaults, **given}
    kinds = {str: str, tuple: list | tuple, int: int | float, float: int | float}
    for key, default in defaults.items():
        nothing = full[key] is None and key == "attention_head_dim"  # one head of all channels
        if not nothing and not isinstance(full[key], kinds.get(type(default), object)):
            raise refused(f"{key} is {full[key]!r}; a value like {default!r} is needed")
    for key, allowed in fixed.items():
        if full[key] != allowed:
            raise refused(f"{key} is {full[key]!r}; only {allowed!r} is supported")
    return full


def taken(weights: Weights, name: str) -> Tensor:
    """`weights[name]`, removed from them. Raises ValueError where it is missing."""
    if name not in weights:
        raise refused(f"tensor {name} is missing")
    return weights.pop(name)


def skeleton(architecture: Architecture) -> nn.Module:
    """The network without storage."""
    with torch.device("meta"):
        return architecture.build()
