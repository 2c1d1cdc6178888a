"""A copied output is recognised by its place alone, without a server."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config import RunConfig, from_plain
from pipeline.tracking import runs


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return from_plain(
        {
            "name": "small",
            "output": str(tmp_path / "run"),
            "shard": {"source": "x", "url": "x", "image_size": 8},
            "stream": {"url": "x"},
            "model": {"size": 8, "channels": 1},
        }
    )


def test_a_copy_on_another_machine_or_in_a_bucket(
    config: RunConfig, tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another machine's folders only the inode is known; of a bucket's prefixes, whether the first is there."""
    runs._store(config, "1" * 32)
    monkeypatch.setattr("platform.node", lambda: "another")
    assert runs._stored(config) == "1" * 32, "the same folder, seen from another machine"
    shutil.copytree(config.output, tmp_path / "copied back")
    shutil.rmtree(config.output)
    (tmp_path / "copied back").rename(config.output)
    assert runs._stored(config) is None
    there, other = replace(config, output=f"{s3_bucket}/run"), replace(config, output=f"{s3_bucket}/other")
    runs._store(there, "2" * 32)
    storage.write_bytes(f"{other.output}/mlflow.json", storage.read_bytes(f"{there.output}/mlflow.json"))
    assert runs._stored(there) == "2" * 32
    assert runs._stored(other) is None
    assert runs._original(other) == there.output
    storage.delete(f"{there.output}/mlflow.json")
    assert runs._stored(other) == "2" * 32
