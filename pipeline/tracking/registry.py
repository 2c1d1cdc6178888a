"""The model registry: a model directory becomes version N of `models:/NAME`, and `models:/NAME@alias` becomes a
directory again.

MLflow stores the files of a model directory as they are (safetensors and JSON with digests, see `pipeline.model`), so
nothing is pickled on the way in or out.
"""

import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model as MLmodel

from pipeline import model as models
from pipeline import storage
from pipeline.tracking.client import connect

FILES = (*models.FILES, "digests.json")


NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the second of an alias that nothing has


@dataclass(frozen=True)
class Version:
    """A registered version. digest: the model's (see `pipeline.model.load`); run_id: the training run, or ''."""

    name: str
    version: int
    digest: str
    run_id: str

    @property
    def url(self) -> str:
        return f"models:/{self.name}/{self.version}"


def register(
    url: str,
    name: str,
    *,
    tracking_uri: str,
    experiment: str,
    run_id: str = "",
    alias: str | None = "champion",
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Version:
    """The model directory at `url` as a version of `name`, with `alias` (None: none) pointing to it. The same model
    again is the same version.

    Raises:
        ValueError: the directory is damaged, or MLflow refuses; says why.
    """
    model = models.load(url)
    images_seen = int(model.card.get("images_seen", 0))
    client = _client(tracking_uri)
    try:
        version = _known(client, name, model.digest) or _create(
            client, url, name, model.digest, experiment, run_id, dict(tags or {}), dict(metrics or {}), images_seen
        )
        if alias:
            client.set_registered_model_alias(name, alias, str(version.version))
    except MlflowException as error:
        raise ValueError(f"registering {name} at {tracking_uri}: {error}") from error
    return version


class Gone(ValueError):
    """The registry answers and has no such model, version or alias."""


def resolve(url: str, *, tracking_uri: str | None = None) -> Version:
    """The version that `models:/NAME@alias` or `models:/NAME/VERSION` names.

    Raises:
        ValueError: not of that form, or no such version.
    """
    client = _client(tracking_uri)
    body = url.removeprefix("models:/")
    name, at, alias = body.partition("@")
    try:
        if at:
            found = client.get_model_version_by_alias(name, alias)
        else:
            name, slash, number = body.rpartition("/")
            if not slash or not number.isdigit():
                raise ValueError(f"'{url}' is not models:/NAME@alias or models:/NAME/VERSION")
            found = client.get_model_version(name, number)
    except MlflowException as error:
        kind = Gone if error.error_code in NOT_THERE else ValueError
        raise kind(f"no model {url} in the registry at {client.tracking_uri}: {error.message}") from error
    return Version(found.name, int(found.version), (found.tags or {}).get("digest", ""), found.run_id or "")


@contextmanager
def files(url: str, *, tracking_uri: str | None = None) -> Iterator[str]:
    """The model directory of a version, on this machine for as long as the block runs.

    Raises:
        ValueError: no such version, or its files cannot be had.
    """
    version = resolve(url, tracking_uri=tracking_uri)
    with tempfile.TemporaryDirectory(prefix="raydiffusion-model-") as folder:
        try:
            path = mlflow.artifacts.download_artifacts(  # pyright: ignore[reportPrivateImportUsage]
                artifact_uri=version.url, dst_path=folder, tracking_uri=tracking_uri
            )
        except (MlflowException, OSError) as error:
            raise ValueError(f"the files of {version.url} cannot be had: {error}") from error
        yield str(path)


def _client(tracking_uri: str | None) -> MlflowClient:
    """A client; `tracking_uri` also becomes MLflow's own setting, which it reads where a version's source is a logged
    model.
    """
    if tracking_uri is None:
        return MlflowClient()
    client = connect(tracking_uri)
    mlflow.set_tracking_uri(tracking_uri)  # pyright: ignore[reportPrivateImportUsage]
    return client


def _known(client: MlflowClient, name: str, digest: str) -> Version | None:
    for found in client.search_model_versions(f"name = '{name}'"):
        if (found.tags or {}).get("digest") == digest:
            return Version(name, int(found.version), digest, found.run_id or "")
    return None


def _create(
    client: MlflowClient,
    url: str,
    name: str,
    digest: str,
    experiment: str,
    run_id: str,
    tags: dict[str, str],
    metrics: dict[str, float],
    images_seen: int,
) -> Version:
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"MLflow has no experiment '{experiment}'")
    logged = client.create_logged_model(
        experiment_id=found.experiment_id, name=name, source_run_id=run_id or None, model_type="diffusion", tags=tags
    )
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            storage.fetch_file(storage.join(url, file), str(Path(folder) / file))
        _mlmodel(folder, logged.model_id, run_id)
        client.log_model_artifacts(logged.model_id, folder)
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id:
        for key, value in metrics.items():
            client.log_metric(run_id, key, value, step=images_seen, model_id=logged.model_id)
    _create_name(client, name)
    made = client.create_model_version(
        name,
        source=f"models:/{logged.model_id}",
        run_id=run_id or None,
        tags={**tags, "digest": digest},
        model_id=logged.model_id,
    )
    return Version(name, int(made.version), digest, run_id)


def _create_name(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _mlmodel(folder: str, model_id: str, run_id: str) -> None:
    """The MLmodel file: `mlflow.pyfunc.load_model` calls `_load_pyfunc` of the named module, and unpickles nothing."""
    description: Any = MLmodel(run_id=run_id or None, model_id=model_id)
    description.add_flavor(
        "python_function", loader_module="pipeline.tracking.flavor", python_version=platform.python_version()
    )
    description.save(str(Path(folder) / "MLmodel"))
