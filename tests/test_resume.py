"""--resume: a run goes on by the run file that it kept, and cannot be made another run."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import train
from pipeline import resume
from pipeline.config import RunConfig
from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.sets.manifest import Manifest
from pipeline.storage.lease import Held, hold
from pipeline.tracking import runs
from tests.cluster.test_train import run_config
from tests.data.folders import write_images
from tests.tracking.database import database

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of its libraries


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    write_images(tmp_path / "images", 40, 8, 1)
    return shard_in_process(ShardConfig(str(tmp_path / "images"), str(tmp_path / "set"), image_size=8, channels=1))


@pytest.fixture
def config(tmp_path: Path, data: Manifest) -> RunConfig:
    made = run_config(tmp_path / "run", data.url, training={"images": 32, "evaluate_images": 0, "sample_images": 0})
    return replace(made, tracking=replace(made.tracking, uri=database()))


def test_goes_on_from_the_output_and_from_the_mlflow_run(config: RunConfig) -> None:
    assert train.run(config, local=True).images == 32
    assert resume.resumed(config.output, []) == config
    longer = resume.resumed(config.output, ["training.images=64"])
    assert train.run(longer, local=True).images == 64
    run_id = runs._stored(config)
    assert run_id is not None
    uri = f"tracking.uri={config.tracking.uri}"
    assert resume.resumed(run_id, [uri]) == longer
    with pytest.raises(ValueError, match=r"MLflow run f{32} at sqlite"):
        resume.resumed("f" * 32, [uri])


def test_what_would_be_another_run_is_refused_by_name(config: RunConfig) -> None:
    resume.keep(config)
    for override, message in {
        "model.network.base_width=16": r"model\.network\.base_width was 8, is 16",
        "model.network={name: mlp}": r"model\.network\.name was 'unet', is 'mlp'",
        "stream.batch_size=32": r"stream\.batch_size was 16, is 32",
        "seed=1": "seed was 0, is 1",
        "output=elsewhere": "output was '.*', is 'elsewhere'",
    }.items():
        with pytest.raises(ValueError, match=f"would be another run: .*{message}"):
            resume.resumed(config.output, [override])
    changed = resume.resumed(config.output, ["training.learning_rate=1e-3", "cluster.workers=1"])
    assert changed.training.learning_rate == 1e-3


def test_one_training_at_a_time_has_an_output(config: RunConfig) -> None:
    with hold(config.output, "jobs.train of another terminal"), pytest.raises(Held, match="of another terminal"):
        train.run(config, local=True)
    assert not (Path(config.output) / "run.yaml").exists(), "the second has written nothing"
    assert not (Path(config.output) / "mlflow.json").exists()
    assert train.run(config, local=True).images == 32


def test_a_place_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run was started there: it has no run\.yaml"):
        resume.resumed(str(tmp_path), [])


def test_credentials_are_not_kept(config: RunConfig) -> None:
    secret = replace(config, tracking=replace(config.tracking, uri="https://me:pw@host:5000"))
    resume.keep(secret)
    text = (Path(config.output) / "run.yaml").read_text()
    assert "pw" not in text
    assert "https://host:5000" in text


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resume.with_full_paths(run_config(Path("out"), "s3://bucket/set"))
    assert config.output == str(tmp_path / "out")
    assert config.stream.url == "s3://bucket/set"


def test_a_copied_output_is_a_run_of_its_own_and_a_moved_one_is_not(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied with its times or without, beside it or with the contents alone; found by --resume or by the run file."""
    assert train.run(config, local=True).images == 32
    first = runs._stored(config)
    assert first is not None
    client = MlflowClient(tracking_uri=config.tracking.uri)

    def points(run_id: str) -> list[int]:
        return [point.step for point in client.get_metric_history(run_id, "loss")]

    before = points(first)
    copy, longer = tmp_path / "copy", ["training.images=64"]
    shutil.copytree(config.output, copy, copy_function=shutil.copy2)
    (copy / "mlflow.spool").write_text("what the original has yet to deliver\n")
    copied = resume.resumed(str(copy), longer)
    assert copied.output == str(copy)
    assert train.run(copied, local=True).images == 64
    assert "is a copy of" in capsys.readouterr().out
    second = runs._stored(copied)
    assert second not in (None, first)
    assert points(first) == before
    assert points(str(second)) == [48, 64]
    assert client.get_run(str(second)).data.tags["raydiffusion.copy_of"] == first
    assert train.run(copied, local=True).images == 64
    assert runs._stored(copied) == second, "the copy goes on in its own run"
    assert runs._stored(config) == first

    moved = tmp_path / "moved"
    Path(config.output).rename(moved)
    assert train.run(resume.resumed(str(moved), longer), local=True).images == 64
    assert points(first) == [*before, 48, 64]
    Path(config.output).mkdir()
    shutil.copy2(copy / "mlflow.json", config.output)  # another run where it was
    assert runs._stored(replace(config, output=str(moved))) == first
    assert "is a copy of" not in capsys.readouterr().out
