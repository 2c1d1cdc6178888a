"""A network as it is published: a folder with config.json and safetensors, in one file or in shards with an index."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
TRANSFORMERS_WEIGHTS = "model"
SHARD_BYTES = 5_000_000_000  # of one file at most, where a network is written


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, where there is none or it holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; an object is needed")
    return value


def weight_files(folder: str | Path, stem: str) -> dict[Path, list[str] | None]:
    """The safetensors files of a network, with the tensors that the index expects in each (None: whatever is there).

    Raises:
        ValueError: neither STEM.safetensors nor STEM.safetensors.index.json, or a shard that the index names is missing
            or lies outside the folder.
    """
    root = Path(folder)
    single, index = root / f"{stem}.safetensors", root / f"{stem}.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        others = sorted(path.name for path in root.glob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".safetensors"))
        seen = f"; it holds {', '.join(others)}" if others else ""
        raise ValueError(f"{root} has no {single.name} and no {index.name}: only safetensors are read{seen}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map")
    files: dict[Path, list[str] | None] = {}
    for tensor, file in names.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index} names the file {file!r} for {tensor}: a file of this folder is needed")
        if not (root / file).is_file():
            raise ValueError(f"{root} lacks {file}, which {index.name} names for {tensor}")
    for file in dict.fromkeys(names.values()):
        files[root / file] = [tensor for tensor, where in names.items() if where == file]
    return files


def read_weights(folder: str | Path, stem: str = DIFFUSERS_WEIGHTS) -> dict[str, Tensor]:
    """All tensors of a network, on the CPU, in the dtype they are stored in.

    Raises:
        ValueError: no such files, a file that is no safetensors, or a shard without a tensor that the index names.
    """
    weights: dict[str, Tensor] = {}
    for path, expected in weight_files(folder, stem).items():
        try:
            part = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
        missing = sorted(set(expected or ()) - part.keys())
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} tensors that its index names, such as {missing[0]}")
        weights |= part
    return weights


def read_network(folder: str | Path, stem: str = DIFFUSERS_WEIGHTS) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors). Raises ValueError as `read_json` and `read_weights`."""
    return read_json(Path(folder) / "config.json"), read_weights(folder, stem)


def write_network(
    folder: str | Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], stem: str = DIFFUSERS_WEIGHTS
) -> None:
    """config.json and the tensors, in shards with an index above `SHARD_BYTES`; config.json is written last."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in weights.items():
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value.detach().cpu().contiguous()
        size += value.nbytes
    if len(shards) == 1:
        safetensors.torch.save_file(shards[0], root / f"{stem}.safetensors", metadata={"format": "pt"})
    else:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            safetensors.torch.save_file(shard, root / name, metadata={"format": "pt"})
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(value.nbytes for value in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(root / f"{stem}.safetensors.index.json", index)
    write_json(root / "config.json", config)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def folder_digest(folder: str | Path) -> str:
    """sha256 over the names and bytes of all files below a folder, in order of name: what an answer depends on.

    Raises:
        ValueError: no such folder, or nothing in it.
    """
    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else []
    if not files:
        raise ValueError(f"{root} is no folder with files in it")
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            own = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{path.relative_to(root).as_posix()}\0{own}\n".encode())
    return total.hexdigest()
