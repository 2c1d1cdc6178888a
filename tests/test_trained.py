"""Half-trained is a model, and a card tells what the weights were trained with, whatever the run file says by now."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import pipeline
from jobs import register, sample, train
from pipeline import assembly, preflight, trained
from pipeline.config import RunConfig
from pipeline.data.sets.manifest import Manifest
from pipeline.training import checkpoint
from pipeline.training import events as say
from tests.cluster.test_train import run_config
from tests.data.folders import small_set
from tests.tracking.database import database

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of its libraries
QUIET = {"images": 64, "evaluate_images": 0, "sample_images": 0, "checkpoint_every_images": 0, "label_dropout": 0.2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return small_set(tmp_path_factory.mktemp("set"), 40, held_out=0.1)


@pytest.fixture
def config(tmp_path: Path, data: Manifest) -> RunConfig:
    made = run_config(tmp_path / "run", data.url, name=f"half-{tmp_path.name}", training=QUIET)
    sampling = replace(made.evaluation.sampling, steps=2, sampler="ddim", options={})
    evaluation = replace(made.evaluation, sampling=sampling)
    return replace(made, evaluation=evaluation, tracking=replace(made.tracking, uri=database()))


def with_training(config: RunConfig, **change: object) -> RunConfig:
    return replace(config, training=replace(config.training, **change))


def stopped(config: RunConfig, after: int) -> say.Finished:
    """A training that is asked to stop after so many steps."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= after

    last = list(assembly.train_here(config, stop))[-1]
    assert isinstance(last, say.Finished)
    assert last.reason == "stopped"
    return last


def test_the_newest_checkpoint_is_a_model(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="has no model: no checkpoint there is committed; train first"):
        register.run(config, None)
    stopped(config, 2)
    found = pipeline.load(config.output)
    stored = checkpoint.read(assembly.checkpoints(config), 2).tensors["ema"]
    assert all(torch.equal(value, stored[name]) for name, value in found.denoiser.state_dict().items())
    assert (found.card["images_seen"], found.card["complete"], found.card["label_dropout"]) == (32, False, 0.2)
    assert trained.load(config.output).digest == found.digest
    assert sample.run(config, images=4, local=True).card["generated"]["model"] == found.digest
    assert "half-trained: the checkpoint of 32 images" in capsys.readouterr().out
    version = register.run(config, None)
    assert "half-trained" in capsys.readouterr().out
    client = MlflowClient(tracking_uri=database())
    there = client.get_model_version(config.name, str(version.version))
    assert there.tags["half_trained"] == "32 images"
    assert not there.aliases
    register.run(config, None, alias="trial")
    assert client.get_model_version(config.name, str(version.version)).aliases == ["trial"]
    assert train.run(config, local=True).complete
    whole = pipeline.load(config.output)
    assert whole.card["complete"]
    assert whole.digest == pipeline.load(f"{config.output}/model").digest
    done = register.run(config, None)
    assert client.get_model_version(config.name, str(done.version)).aliases == ["champion"]
    longer = with_training(config, images=128)
    stopped(longer, 1)
    assert pipeline.load(config.output).card["images_seen"] == 80, "further on than the model of the end before"


def test_a_finished_run_is_not_described_otherwise_than_it_was_trained(config: RunConfig) -> None:
    assert train.run(config, local=True).complete
    before = (Path(config.output) / "model" / "card.json").read_bytes()
    for changed, named in [
        (with_training(config, label_dropout=0.1), r"training\.label_dropout was 0\.2, is 0\.1"),
        (with_training(config, learning_rate=1e-3), r"training\.learning_rate was 0\.0002, is 0\.001"),
        (with_training(config, betas=(0.8, 0.9)), r"training\.betas was \[0\.9, 0\.999\], is \[0\.8, 0\.9\]"),
        (replace(config, name="another"), rf"name was '{config.name}', is 'another'"),
    ]:
        with pytest.raises(preflight.PreflightError, match=rf"has ended \(budget, 64 images\).*{named}"):
            train.run(changed, local=True)
    with pytest.raises(ValueError, match=r"name was .*, is 'another'"):
        list(assembly.train_here(replace(config, name="another")))
    assert train.run(with_training(config, keep=1, max_hours=3.0), local=True).complete
    assert (Path(config.output) / "model" / "card.json").read_bytes() == before
    longer = with_training(config, images=96, learning_rate=1e-3, label_dropout=0.1)
    assert train.run(longer, local=True).images == 96
    card = pipeline.load(config.output).card
    parts = [(p["from_images"], p["images"], p["learning_rate"], p["label_dropout"]) for p in card["trained_with"]]
    assert parts == [(0, 64, 2e-4, 0.2), (64, 96, 1e-3, 0.1)]
    assert card["label_dropout"] == 0.1
