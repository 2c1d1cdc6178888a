"""Token ids against transformers, with vocabularies that the test trains and both sides read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, CLIPTokenizer, T5Tokenizer

from pipeline.text import Tokenizer, load_tokenizer
from tests.text.captions import captions

LENGTH = 77


def clip_folder(folder: Path) -> None:
    start, end = "<|startoftext|>", "<|endoftext|>"
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=[start, end],
        show_progress=False,
    )
    backend.train_from_iterator([word for text in captions(800) for word in text.lower().split()], trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for letter in alphabet:
        for token in (letter, f"{letter}</w>"):
            vocabulary.setdefault(token, len(vocabulary))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    options = {"model_max_length": LENGTH, "pad_token": end, "bos_token": start, "eos_token": end, "unk_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"tokenizer_class": "CLIPTokenizer"}))


def t5_folder(folder: Path) -> None:
    lines = [text.replace("\n", " ").replace("\0", "") for text in captions(800)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()]),
        model_prefix=str(folder / "spiece"),
        vocab_size=700,
        character_coverage=0.98,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
        max_sentence_length=20_000,
    )
    options = {
        "model_max_length": LENGTH,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 100,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"tokenizer_class": "T5Tokenizer"}))


def bert_folder(folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        captions(800), trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    )
    vocabulary = backend.get_vocab()
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    options = {"model_max_length": LENGTH, "do_lower_case": True, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


FAMILIES: dict[str, tuple[Callable[[Path], None], type]] = {
    "clip": (clip_folder, CLIPTokenizer),
    "t5": (t5_folder, T5Tokenizer),
    "bert": (bert_folder, BertTokenizer),
}
SPECIAL = [
    "before<|endoftext|>after",
    "a <|startoftext|> b",
    "x </s> y</s>z",
    "<pad>",
    "<extra_id_3> q",
    "[SEP] a[CLS]",
    "[unk]",
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, type]:
    make, theirs = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(folder)
    return folder, theirs


def assert_same_ids(ours: Tokenizer, folder: Path, theirs: type, texts: list[str]) -> None:
    their = theirs.from_pretrained(folder)
    for start in range(0, len(texts), 2000):
        part = texts[start : start + 2000]
        expected = their(part, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        found = ours(part)
        wrong = (found.ids != expected.input_ids).any(1).nonzero()[:, 0].tolist()
        assert not wrong, (len(wrong), part[wrong[0]], found.ids[wrong[0]], expected.input_ids[wrong[0]])
        assert torch.equal(found.mask, expected.attention_mask.bool())


def test_ids_are_those_of_transformers(family: tuple[Path, type]) -> None:
    folder, theirs = family
    assert_same_ids(load_tokenizer(folder), folder, theirs, captions(1000))


@pytest.mark.slow
def test_ids_are_those_of_transformers_on_10_000_captions(family: tuple[Path, type]) -> None:
    folder, theirs = family
    assert_same_ids(load_tokenizer(folder), folder, theirs, captions(10_000))


def test_special_tokens_written_in_a_caption_are_read_alike(family: tuple[Path, type]) -> None:
    folder, theirs = family
    assert_same_ids(load_tokenizer(folder), folder, theirs, SPECIAL)


def test_a_saved_tokenizer_json_is_read_alike(family: tuple[Path, type], tmp_path: Path) -> None:
    folder, theirs = family
    theirs.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert_same_ids(load_tokenizer(tmp_path), tmp_path, theirs, captions(200))


def test_the_length_is_fixed_and_truncation_is_told(family: tuple[Path, type]) -> None:
    folder, _ = family
    tokenizer = load_tokenizer(folder, length=16)
    short, long = "a red cat", "a red cat " * 50
    found = tokenizer([short, long, ""])
    assert found.ids.shape == found.mask.shape == (3, 16)
    assert found.truncated.tolist() == [False, True, False]
    assert found.counts[1] > 50
    assert found.mask.sum(1).tolist() == [min(16, int(count)) for count in found.counts]
    assert found.ids[1, -1] == found.ids[0, int(found.counts[0]) - 1]  # the end token closes a cut text too
    assert (found.ids[2][~found.mask[2]] == tokenizer.pad).all()
    alone = tokenizer([short])
    assert torch.equal(alone.ids[0], found.ids[0])


def test_folders_that_are_no_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state one of at least 2"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json; or vocab.json and merges.txt"):
        load_tokenizer(tmp_path, length=8)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"\[UNK\] is not in vocab.txt"):
        load_tokenizer(tmp_path, length=8)
