"""Text encoders against transformers, on small random weights in folders as they are published."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import BertConfig as TheirBertConfig
from transformers import BertModel, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel
from transformers import CLIPTextConfig as TheirCLIPConfig
from transformers import T5Config as TheirT5Config

from pipeline.folders import folder_digest
from pipeline.text import load_encoder

LENGTH, VOCABULARY = 24, 99
CLIP: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "projection_dim": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "eos_token_id": 98,
    "bos_token_id": 97,
    "pad_token_id": 98,
}
T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 5}
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}
# their dataclasses are made at run time: what they take is not known to a type checker
BertConfig: Any = TheirBertConfig
CLIPTextConfig: Any = TheirCLIPConfig
T5Config: Any = TheirT5Config
THEIRS: dict[str, Any] = {
    "clip": lambda: CLIPTextModel(CLIPTextConfig(**CLIP)),
    "clip, projected, exact gelu": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, hidden_act="gelu")),
    "clip, end by the largest id": lambda: CLIPTextModel(CLIPTextConfig(**(CLIP | {"eos_token_id": 2}))),
    "t5 v1.1": lambda: T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "t5": lambda: T5EncoderModel(T5Config(**T5, relative_attention_num_buckets=8, relative_attention_max_distance=12)),
    "bert": lambda: BertModel(BertConfig(**BERT)),
}


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.2)
        else:
            nn.init.normal_(parameter, std=0.8 / max(1, parameter[0].numel()) ** 0.5)
    return model.eval()


def batch() -> tuple[Tensor, Tensor]:
    """Texts of 3 to 24 tokens, each closed by id 98 and padded by it."""
    torch.manual_seed(1)
    lengths = torch.tensor([3, 24, 11, 18])
    ids = torch.randint(5, 90, (4, LENGTH))
    mask = torch.arange(LENGTH)[None] < lengths[:, None]
    return torch.where(torch.arange(LENGTH)[None] < lengths[:, None] - 1, ids, 98), mask


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", THEIRS)
def test_states_and_pooled_vectors_are_those_of_transformers(name: str, masked: bool, tmp_path: Path) -> None:
    theirs = randomised(THEIRS[name]())
    theirs.save_pretrained(tmp_path)
    ours = load_encoder(tmp_path)
    ids, mask = batch()
    expected = theirs(input_ids=ids, attention_mask=mask.long() if masked else None, output_hidden_states=True)
    found = ours(ids, mask if masked else None)
    real = mask if masked else torch.ones_like(mask)  # what stands at masked places is nobody's
    assert difference(found.states[real], expected.last_hidden_state[real]) < 1e-5
    assert difference(found.penultimate[real], expected.hidden_states[-2][real]) < 1e-5
    if "projected" in name:
        assert found.pooled is not None
        assert difference(found.pooled, expected.text_embeds) < 1e-5
    elif "clip" in name:
        assert found.pooled is not None
        assert difference(found.pooled, expected.pooler_output) < 1e-5
    elif name == "bert":
        weight = real[..., None].float()
        mean = (expected.last_hidden_state * weight).sum(1) / weight.sum(1)
        assert found.pooled is not None
        assert difference(found.pooled, mean) < 1e-5
    else:
        assert found.pooled is None
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_published_folders_have_their_prefix(name: str, tmp_path: Path) -> None:
    """The folders on the shelves say text_model.embeddings..., bert.embeddings..., with a buffer of positions."""
    theirs = randomised(THEIRS[name]())
    theirs.save_pretrained(tmp_path)
    plain = load_encoder(tmp_path)
    prefix = {"clip": "text_model.", "bert": "bert."}[name]
    weights = {k.removeprefix(prefix): v.clone() for k, v in theirs.state_dict().items()}
    weights |= {"embeddings.position_ids": torch.arange(LENGTH)[None]}
    safetensors.torch.save_file({prefix + k: v for k, v in weights.items()}, tmp_path / "model.safetensors")
    again = load_encoder(tmp_path)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in plain.state_dict().items())


@torch.no_grad()
def test_padding_is_not_heard_where_it_is_masked(tmp_path: Path) -> None:
    for name in ("t5 v1.1", "bert"):
        randomised(THEIRS[name]()).save_pretrained(tmp_path / name)
        ours = load_encoder(tmp_path / name)
        ids, mask = batch()
        other = torch.where(mask, ids, 7)
        for a, b in zip(ours(ids, mask), ours(other, mask), strict=True):
            if a is not None and a.ndim == 3:
                assert torch.equal(a[mask], b[mask])
            elif a is not None:
                assert torch.equal(a, b)
        with pytest.raises(ValueError, match="text 1"):
            ours(ids, mask & (torch.arange(4) != 1)[:, None])


def test_half_precision_and_digest(tmp_path: Path) -> None:
    randomised(THEIRS["t5"]()).save_pretrained(tmp_path)
    assert load_encoder(tmp_path, torch.bfloat16)(*batch()).states.dtype == torch.bfloat16
    before = folder_digest(tmp_path)
    assert before == folder_digest(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-5}))
    assert folder_digest(tmp_path) != before


def test_what_is_no_encoder_of_ours_is_refused_by_name(tmp_path: Path) -> None:
    randomised(THEIRS["bert"]()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")

    def assert_refused(named: str, changed: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=named):
            load_encoder(tmp_path)

    first = next(name for name in weights if name.endswith("word_embeddings.weight"))
    assert_refused("gpt2", {"model_type": "gpt2"}, weights)
    assert_refused("swish", {"hidden_act": "swish"}, weights)
    assert_refused("position_embedding_type", {"position_embedding_type": "relative_key"}, weights)
    assert_refused("word_embeddings", {}, {k: v for k, v in weights.items() if k != first})
    assert_refused("word_embeddings", {}, weights | {first: torch.zeros(3, 48)})
    assert_refused("extra", {}, weights | {"extra.weight": torch.zeros(1)})
