"""What was found of a trained model, added to the MLflow run of its training."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from mlflow.exceptions import MlflowException
from torch import Tensor

from pipeline.tracking.client import connect, first_line, without_secret
from pipeline.tracking.facts import RUN_FILE
from pipeline.tracking.pictures import grid


def log_results(uri: str, run_id: str, metrics: Mapping[str, float], images_seen: int, samples: Tensor) -> None:
    """Metrics at step `images_seen`, and a picture of the first samples, uint8 (n, C, H, W).

    Raises:
        ValueError: MLflow does not answer, or has no such run.
    """
    client = connect(uri)
    try:
        for name, value in metrics.items():
            client.log_metric(run_id, f"evaluation/{name}", value, step=images_seen)
        client.log_image(run_id, grid(samples[:100]), artifact_file="evaluation/samples.png")
    except MlflowException as error:
        raise ValueError(f"MLflow run {run_id}: {first_line(error)}") from None


def history(uri: str, run_id: str, key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a metric of a run, in order of its steps.

    Raises:
        ValueError: MLflow does not answer, or has no such run.
    """
    try:
        found = connect(uri).get_metric_history(run_id, key)
    except MlflowException as error:
        raise ValueError(f"MLflow run {run_id}: {first_line(error)}") from None
    found = sorted(found, key=lambda metric: metric.step)
    return [float(metric.step) for metric in found], [metric.value for metric in found]


def run_file(uri: str, run_id: str) -> str:
    """The run file that a run was last started with.

    Raises:
        ValueError: MLflow does not answer, or has no such run, or the run has none.
    """
    client = connect(uri)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, RUN_FILE, folder)).read_text(encoding="utf-8")
    except (MlflowException, OSError) as error:
        raise ValueError(f"MLflow run {run_id} at {without_secret(uri)}: {first_line(error)}") from None
