"""One MLflow database for all tests of this process: making its tables takes seconds."""

import tempfile
from functools import cache
from pathlib import Path

from pipeline.tracking.client import connect

EXPERIMENT = "raydiffusion"
_folder = tempfile.TemporaryDirectory(prefix="raydiffusion-mlflow-")


@cache
def database() -> str:
    """Its URI; it has the experiment EXPERIMENT."""
    uri = f"sqlite:///{_folder.name}/mlflow.db"
    connect(uri).create_experiment(EXPERIMENT, artifact_location=str(Path(_folder.name) / "artifacts"))
    return uri
