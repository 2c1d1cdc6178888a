"""A model directory becomes a version, and a version becomes the same model again."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline
from pipeline.model import ModelConfig, build, save
from pipeline.tracking.client import connect
from pipeline.tracking.registry import files, register, resolve

# MLflow's own, from its import and its database models
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

NETWORK = {"name": "unet", "base_width": 8, "multipliers": [1], "blocks": 1, "attention_at": []}
CONFIG = ModelConfig(size=8, channels=1, classes=3, network=NETWORK)


def write_model(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    save(str(folder), CONFIG, build(CONFIG).state_dict(), {"class_names": ["a", "b", "c"], "images_seen": 640})
    return str(folder)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    connect(uri).create_experiment("tests", artifact_location=str(tmp_path / "artifacts"))
    return uri


def test_versions_aliases_and_the_same_model_back(uri: str, tmp_path: Path) -> None:
    run_id = connect(uri).create_run(connect(uri).get_experiment_by_name("tests").experiment_id).info.run_id  # pyright: ignore[reportOptionalMemberAccess]
    first = write_model(tmp_path / "one", 1)
    made = register(first, "m", tracking_uri=uri, experiment="tests", run_id=run_id, metrics={"evaluation/x": 2.0})
    assert (made.version, made.run_id) == (1, run_id)
    assert connect(uri).get_run(run_id).data.metrics == {"evaluation/x": 2.0}
    again = register(first, "m", tracking_uri=uri, experiment="tests")
    assert again == made  # the same digest is the same version

    second = register(write_model(tmp_path / "two", 2), "m", tracking_uri=uri, experiment="tests", alias="challenger")
    assert second.version == 2
    assert resolve("models:/m@champion", tracking_uri=uri) == made
    assert resolve("models:/m@challenger", tracking_uri=uri).digest == second.digest
    assert resolve("models:/m/2", tracking_uri=uri).digest == second.digest

    model = pipeline.load("models:/m@champion", tracking_uri=uri)
    assert model.digest == made.digest
    assert torch.equal(
        model.sample(3, labels=[0, 1, 2], seed=4), pipeline.load(first).sample(3, labels=[0, 1, 2], seed=4)
    )

    import mlflow

    flavor = mlflow.pyfunc.load_model("models:/m@champion")
    images = flavor.predict({"n": 3, "labels": [0, 1, 2], "seed": 4})
    assert np.array_equal(images, model.sample(3, labels=[0, 1, 2], seed=4).permute(0, 2, 3, 1).numpy())
    scores = flavor.predict({"images": images, "labels": [0, 1, 2], "seed": 4})
    assert scores.shape == (3,)
    assert np.isfinite(scores).all()
    with files("models:/m@champion", tracking_uri=uri) as folder:
        names = [path.suffix for path in Path(folder).rglob("*.*")]
    assert ".safetensors" in names
    assert not {".pkl", ".pickle", ".pt"} & set(names)
    assert not Path(folder).exists()


def test_what_is_not_there_or_damaged_is_named(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model models:/nothing@champion"):
        resolve("models:/nothing@champion", tracking_uri=uri)
    with pytest.raises(ValueError, match="is not models:/NAME@alias"):
        resolve("models:/nothing", tracking_uri=uri)
    url = write_model(tmp_path / "one", 1)
    weights = tmp_path / "one" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        register(url, "m", tracking_uri=uri, experiment="tests")
