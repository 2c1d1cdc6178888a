"""What former releases wrote still reads: their set, checkpoints, model, evaluation and run files (see make.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline import assembly
from pipeline.config import load_config
from pipeline.data.reading.stream import held_out, train_images
from pipeline.data.sets.manifest import load as load_manifest
from pipeline.evaluation.measure import load as load_evaluation
from pipeline.training.checkpoint import newest
from pipeline.training.events import Finished

RELEASES = sorted(p for p in Path(__file__).parent.iterdir() if (p / "run.yaml").exists())
release = pytest.mark.parametrize("folder", RELEASES, ids=lambda p: p.name)


def test_there_is_a_release() -> None:
    assert RELEASES


@release
def test_its_set_reads(folder: Path) -> None:
    manifest = load_manifest(str(folder / "set"))
    real = [train_images(manifest), held_out(manifest)]
    assert [len(images.images) for images in real] == [24, 16]
    for images in real:
        assert images.labels is not None
        bright = images.images.float().flatten(1).mean(1) > 128
        assert torch.equal(bright.long(), images.labels), "dark and light have changed places"


@release
def test_its_model_scores_as_its_evaluation_said(folder: Path) -> None:
    values = json.loads((folder / "run/evaluation/evaluation.json").read_text())
    found = load_evaluation(str(folder / "run/evaluation"), values["key"])
    assert found is not None
    model = pipeline.load(str(folder / "run/model"))
    assert model.digest == values["key"]["model"]
    assert model.sample(2, labels=[0, 1], seed=3).shape == (2, 1, 8, 8)
    assert len(found.scores["vlb"].bits_per_dim) == 6


@release
def test_its_training_goes_on(folder: Path, tmp_path: Path) -> None:
    for name in ("set", "run"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "run.yaml", tmp_path)
    place = [f"output={tmp_path}/run", f"shard.url={tmp_path}/set", f"stream.url={tmp_path}/set"]
    config = load_config(str(tmp_path / "run.yaml"), [*place, "training.images=80"])
    events = list(assembly.train_here(config))
    assert isinstance(events[-1], Finished)
    state, rejected = newest(assembly.checkpoints(config))
    assert state is not None
    assert (state.step, rejected) == (10, [])


@release
def test_its_run_files_read(folder: Path) -> None:
    files = sorted((folder / "configs").glob("*.yaml"))
    assert files
    for path in files:
        load_config(str(path), [])
