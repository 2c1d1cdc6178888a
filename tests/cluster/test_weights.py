"""Models kept on a node: verified at every use, made whole again, and never more than their bytes."""

import shutil
from pathlib import Path

import pytest

from pipeline.cluster import weights
from tests.serving.tiny import save_tiny


def test_a_kept_model_outlives_its_source_and_is_verified(tmp_path: Path) -> None:
    source, kept = tmp_path / "source", tmp_path / "kept"
    digest = save_tiny(str(source))

    def load(wanted: str = digest) -> str:
        return weights.load(str(source), wanted, "cpu", None, kept, 1 << 30).digest

    assert load() == digest
    assert [each.name for each in kept.iterdir()] == [digest]
    file = kept / digest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # damaged: fetched again
    assert load() == digest
    shutil.rmtree(source)
    assert load() == digest
    file.write_bytes(b"")
    with pytest.raises(FileNotFoundError):
        load()
    save_tiny(str(source), seed=1)
    with pytest.raises(ValueError, match=f"has the digest .*, expected {digest}"):
        load()
    assert not list(kept.iterdir())


def test_those_used_longest_ago_leave(tmp_path: Path) -> None:
    digests = [save_tiny(str(tmp_path / str(seed)), seed=seed) for seed in range(3)]
    size = sum(file.stat().st_size for file in (tmp_path / "0").iterdir())
    for index in (0, 1, 0, 2):
        weights.load(str(tmp_path / str(index)), digests[index], "cpu", None, tmp_path / "kept", int(2.5 * size))
    assert {each.name for each in (tmp_path / "kept").iterdir()} == {digests[0], digests[2]}


def test_a_node_that_cannot_keep_serves_all_the_same(tmp_path: Path) -> None:
    digest = save_tiny(str(tmp_path / "source"))
    (tmp_path / "file").write_text("")
    assert (
        weights.load(str(tmp_path / "source"), digest, "cpu", None, tmp_path / "file" / "kept", 1 << 30).digest
        == digest
    )
