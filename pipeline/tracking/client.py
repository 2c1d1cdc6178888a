"""Reaching MLflow: a server or a database, or one line that says why not."""

import base64
import http.client
import logging
import os
import urllib.error
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from pipeline.tracking import database

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")


REFUSED = {  # by status: what to do
    401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the job runs",
    403: "its --allowed-hosts do not name it so, or the user may not read",
}


class Away(ValueError):
    """A server that does not answer."""


def connect(uri: str) -> "MlflowClient":
    """A client of a server or a database that answers.

    Raises:
        ValueError: a scheme that MLflow cannot use, a server that refuses or is of another version, a broken database.
        Away: no answer.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    client = client_of(uri)
    if uri.startswith("http"):
        _answers(uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        kind = Away if uri.startswith("http") else ValueError
        raise kind(f"MLflow at {without_secret(uri)} cannot be used: {first_line(error)}") from None
    except SQLAlchemyError as error:
        raise ValueError(f"MLflow's database {without_secret(uri)} cannot be used: {first_line(error)}") from None
    return client


def client_of(uri: str) -> "MlflowClient":
    """A client of a server or a database, whether it answers or not.

    Raises:
        ValueError: a scheme that MLflow cannot use.
    """
    scheme = uri.partition(":")[0].partition("+")[0]
    if "://" not in uri or scheme not in SCHEMES:
        raise ValueError(
            f"tracking.uri must be a server (http://...) or a database (sqlite:///path.db), got '{without_secret(uri)}'"
        )
    _quiet()
    if scheme == "sqlite":
        database.prepare(uri)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def without_secret(uri: str) -> str:
    """A URI without user and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def first_line(error: BaseException) -> str:
    """What a user needs of an MLflow error."""
    return str(error).strip().partition("\n")[0][:300]


def _quiet() -> None:
    """MLflow's own waits are short, because ours are patient; its migrations and hints are not for a user."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _who_asks() -> dict[str, str]:
    """The header by which MLflow's own client says who it is: a server with users asks for it at every address."""
    from mlflow.utils.credentials import read_mlflow_creds

    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    found = read_mlflow_creds()
    if not (found.username and found.password):
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{found.username}:{found.password}".encode()).decode()}


def _answers(uri: str) -> None:
    """Raises Away where no MLflow server answers, ValueError where it refuses or is one of another major version."""
    import mlflow

    try:
        asked = urllib.request.Request(f"{uri.rstrip('/')}/version", headers=_who_asks())
        with urllib.request.urlopen(asked, timeout=10) as answer:
            version = answer.read(100).decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in REFUSED:
            raise ValueError(
                f"the MLflow server at {without_secret(uri)} refuses this job ({error}): {REFUSED[error.code]}"
            ) from None
        raise Away(f"no MLflow server answers at {without_secret(uri)}: {error}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise Away(f"no MLflow server answers at {without_secret(uri)}: {reason}") from None
    ours = mlflow.__version__  # pyright: ignore[reportPrivateImportUsage]
    if version.partition(".")[0] != ours.partition(".")[0]:
        raise ValueError(
            f"the MLflow server at {without_secret(uri)} says it is version {version[:40]!r}, this is a client of "
            f"{ours}: it must be of the same major version"
        )
