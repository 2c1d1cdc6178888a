"""Tokenizers from folders as they are published: of fixed length, with the mask kept and truncation told.

Read is what lies there, in this order: tokenizer.json (any), vocab.json and merges.txt (CLIP), vocab.txt (BERT),
spiece.model (T5).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

from pipeline.folders import read_json

NO_LIMIT = 100_000  # model_max_length above this says that the tokenizer knows none
# of CLIP: words, single digits, runs of other signs, and English contractions; white space is dropped
CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
T5_SPECIAL = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
EXTRA_IDS = 100  # sentinels of T5, after its vocabulary, counted down


@dataclass(frozen=True)
class Tokens:
    """ids: int64 (n, length), padded. mask: bool (n, length), false where padded. counts: int64 (n,), tokens the text
    has, the special ones included, before it was cut."""

    ids: Tensor
    mask: Tensor
    counts: Tensor

    @property
    def truncated(self) -> Tensor:
        """bool (n,): the text was longer than the length and its end is not heard."""
        return self.counts > self.ids.shape[1]


@dataclass(frozen=True)
class Tokenizer:
    """encode: texts -> all their ids with the special ones, the last of which ends a text also where it is cut.

    length: every text is padded or cut to it. pad: the id of padding.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    length: int
    pad: int

    def __call__(self, texts: Sequence[str]) -> Tokens:
        every = self.encode(list(texts))
        ids = torch.full((len(every), self.length), self.pad, dtype=torch.int64)
        mask = torch.zeros(len(every), self.length, dtype=torch.bool)
        for row, found in enumerate(every):
            kept = found if len(found) <= self.length else [*found[: self.length - 1], found[-1]]
            ids[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
            mask[row, : len(kept)] = True
        return Tokens(ids, mask, torch.tensor([len(found) for found in every], dtype=torch.int64))


def load_tokenizer(folder: str | Path, length: int | None = None) -> Tokenizer:
    """The tokenizer of a folder.

    length: of every text; None: the folder's own model_max_length.

    Raises:
        ValueError: no file of a known kind, or a length that neither the caller nor the folder states.
    """
    root = Path(folder)
    options = read_json(root / "tokenizer_config.json") if (root / "tokenizer_config.json").is_file() else {}
    special = read_json(root / "special_tokens_map.json") if (root / "special_tokens_map.json").is_file() else {}
    stated = options.get("model_max_length")
    if length is None and isinstance(stated, int | float) and stated <= NO_LIMIT:
        length = int(stated)
    if length is None or length < 2:
        raise ValueError(f"{root}: the length of a text is {length}; state one of at least 2 tokens")
    for names, read in READERS.items():
        if all((root / name).is_file() for name in names):
            encode, pad = read(root, _specials(special | options))
            return Tokenizer(encode, length, pad)
    known = "; or ".join(" and ".join(names) for names in READERS)
    raise ValueError(f"{root} holds no tokenizer; needed are {known}")


def _specials(options: Mapping[str, Any]) -> dict[str, str]:
    """The text of each special token that the folder names: {"pad_token": "<pad>", ...}."""
    named = {name: value for name, value in options.items() if name.endswith("_token") and value is not None}
    return {name: value["content"] if isinstance(value, dict) else str(value) for name, value in named.items()}


Read = tuple[Callable[[Sequence[str]], list[list[int]]], int]


def _batched(backend: tokenizers.Tokenizer) -> Callable[[Sequence[str]], list[list[int]]]:
    backend.no_padding()
    backend.no_truncation()
    return lambda texts: [found.ids for found in backend.encode_batch(list(texts))]


def _id(backend: tokenizers.Tokenizer, token: str, root: Path) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise ValueError(f"{root}: the special token {token!r} is not in the vocabulary")
    return found


def _any(root: Path, special: Mapping[str, str]) -> Read:
    backend = tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))
    pad = special.get("pad_token") or (backend.padding or {}).get("pad_token")
    if pad is None:
        raise ValueError(f"{root}: no pad_token is named in tokenizer_config.json or special_tokens_map.json")
    return _batched(backend), _id(backend, pad, root)


def _clip(root: Path, special: Mapping[str, str]) -> Read:
    start, end = special.get("bos_token", "<|startoftext|>"), special.get("eos_token", "<|endoftext|>")
    pad, unknown = special.get("pad_token", end), special.get("unk_token", end)
    vocabulary = json.loads((root / "vocab.json").read_text(encoding="utf-8"))
    lines = (root / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.split() for line in lines if not line.startswith("#version")]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=unknown,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    missing = [token for token in (start, end, unknown, pad) if token not in vocabulary]
    if missing:
        raise ValueError(f"{root}: the special token {missing[0]} is not in vocab.json")
    backend.add_special_tokens(list(dict.fromkeys((start, end, unknown, pad))))
    ends = (end, _id(backend, end, root)), (start, _id(backend, start, root))
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return _batched(backend), _id(backend, pad, root)


def _bert(root: Path, special: Mapping[str, str]) -> Read:
    words = (root / "vocab.txt").read_text(encoding="utf-8").split("\n")
    names = {name: special.get(f"{name}_token", f"[{name.upper()}]") for name in ("unk", "sep", "pad", "cls", "mask")}
    options = read_json(root / "tokenizer_config.json") if (root / "tokenizer_config.json").is_file() else {}
    vocabulary = {word: i for i, word in enumerate(words) if word or i < len(words) - 1}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=names["unk"]))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    missing = [token for token in names.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"{root}: the special token {missing[0]} is not in vocab.txt")
    backend.add_special_tokens(list(names.values()))
    ends = {name: (names[name], _id(backend, names[name], root)) for name in ("cls", "sep")}
    backend.post_processor = processors.BertProcessing(ends["sep"], ends["cls"])
    return _batched(backend), _id(backend, names["pad"], root)


def _sentencepiece(root: Path, special: Mapping[str, str]) -> Read:
    """T5's: the model's pieces and character map, each word by itself with a sign for the space before it."""
    model = ModelProto.FromString((root / "spiece.model").read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise ValueError(
            f"{root}: spiece.model is of type {model.trainer_spec.model_type}; only unigram models are read"
        )
    names = {name: special.get(f"{name}_token", text) for name, text in T5_SPECIAL.items()}
    extra = [f"<extra_id_{i}>" for i in reversed(range(EXTRA_IDS))]
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces] + [(text, 0.0) for text in extra]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=model.trainer_spec.unk_id, byte_fallback=False))
    if model.normalizer_spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    backend.add_special_tokens([*names.values(), *extra])
    end = names["eos"]
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, _id(backend, end, root))]
    )
    return _batched(backend), _id(backend, names["pad"], root)


READERS: dict[tuple[str, ...], Callable[[Path, Mapping[str, str]], Read]] = {
    ("tokenizer.json",): _any,
    ("vocab.json", "merges.txt"): _clip,
    ("vocab.txt",): _bert,
    ("spiece.model",): _sentencepiece,
}
