"""What MLflow is told of a run beside its metrics: parameters from an allow-list, tags, the data set, the run file."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.tracking.client import without_secret

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.config import RunConfig
    from pipeline.data.sets.manifest import Manifest

SECTIONS = ("model", "objective", "training", "stream", "shard", "cluster")  # of the run file, as parameters
RUN_FILE = "run.yaml"
HIDDEN = ("url", "source", "address", "uri")  # keys that may hold a place or a name not meant for all


def parameters(config: "RunConfig") -> dict[str, str]:
    """The run file's values by dotted key: only SECTIONS, without what names a place (`HIDDEN`)."""
    from pipeline.config import to_plain

    plain = to_plain(config)
    found = {"name": config.name, "seed": str(config.seed)}

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}.", value)
            elif key not in HIDDEN:
                found[f"{prefix}{key}"] = str(value)[:500]

    for section in SECTIONS:
        walk(f"{section}.", plain[section])
    return found


def git_commit() -> str | None:
    """The commit of the working directory, where it is a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def note(config: "RunConfig", manifest: "Manifest", run_id: str) -> str:
    """What a person who opens the run's page is told first."""
    counts = f"{manifest.split('train').total:,} training and {manifest.split('held_out').total:,} held-out images"
    return (
        f"Diffusion model `{config.name}` on {counts}, data version `{manifest.digest[:12]}`. Steps are images seen. "
        f"Samples and losses against the noise level: the newest under Artifacts, `latest/`; all of them beside `loss` "
        f"in the metrics.\n\nGo on with it: `python -m jobs.train --resume {run_id}`"
    )


def tags(config: "RunConfig", manifest: "Manifest") -> dict[str, str]:
    tags = {
        "mlflow.source.name": "jobs.train",
        "mlflow.source.type": "LOCAL",
        "raydiffusion.data": manifest.digest,
        "output": without_secret(config.output),
    }
    commit = git_commit()
    return tags | ({} if commit is None else {"mlflow.source.git.commit": commit})


def log_data(client: "MlflowClient", run_id: str, config: "RunConfig", manifest: "Manifest") -> None:
    """The shard set as an MLflow dataset with its digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    counts = {split: manifest.split(split).total for split in ("train", "held_out")}
    profile = json.dumps({**counts, "classes": len(manifest.class_names), "digest": manifest.digest})
    source = json.dumps({"url": without_secret(manifest.url), "digest": manifest.digest})
    data = Dataset(config.name[:500], manifest.digest[:36], "shards", source, profile=profile)
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])


def log_run_file(client: "MlflowClient", run_id: str, config: "RunConfig") -> None:
    """The complete run file as it is now, without credentials, as the artifact run.yaml."""
    from pipeline.config import to_yaml

    client.log_text(run_id, to_yaml(without_credentials(config)), RUN_FILE)


def without_credentials(config: "RunConfig") -> "RunConfig":
    """The same run as others may see it."""
    return replace(config, tracking=replace(config.tracking, uri=without_secret(config.tracking.uri)))


def log_parameters(client: "MlflowClient", run_id: str, config: "RunConfig") -> None:
    """MLflow keeps a parameter's first value for ever; a later one goes to a tag `changed.KEY`."""
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data.params
    now = parameters(config)
    new = [Param(key, value) for key, value in now.items() if key not in known]
    changed = [RunTag(f"changed.{key}", value) for key, value in now.items() if known.get(key, value) != value]
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100])
    if changed:
        client.log_batch(run_id, tags=changed)
