"""Where the data of a run lie: keys of the run file that are paths, laid under one root, and who can see them.

A submitted job runs in Ray's copy of the working directory, on a node that nobody chose: what it writes at a relative
path is gone with that copy, and no other node ever sees it.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

PATHS = (
    "output",
    "init",
    "shard.source",
    "shard.url",
    "shard.image_root",
    "shard.removals",
    "shard.mixture",
    "stream.url",
    "stream.removals",
    "tracking.uri",
    "serving.model",
    "serving.more_models",
)
SQLITE = "sqlite:///"
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` runs
Values = Mapping[str, Any]


def in_submitted_job() -> bool:
    """Whether `ray job submit` started this process, or what did."""
    return SUBMITTED in os.environ


def under(root: str, values: Values) -> dict[str, Any]:
    """The same run file, its relative paths laid under `root`; absolute ones, URLs and registered models as they are.

    Raises:
        ValueError: `root` is relative itself, a path begins with ~, or a relative SQLite file would lie on S3.
    """
    if _is_relative(root):
        raise ValueError(f"root: must be an absolute path or s3://bucket/prefix, got '{root}'")

    def laid(key: str, path: str) -> str:
        if path.removeprefix(SQLITE).startswith("~"):
            raise ValueError(f"{key}: '~' stands for another folder on each node: write the whole path, got '{path}'")
        if not path.startswith(SQLITE):
            return f"{root.rstrip('/')}/{os.path.normpath(path)}"
        if "://" in root:
            raise ValueError(f"{key}: no database can lie on {root}: write {key}=http://HOST:PORT, an MLflow server")
        return f"{SQLITE}{root.rstrip('/')}/{path.removeprefix(SQLITE)}"

    return _replaced(values, laid)


def private(values: Values) -> list[str]:
    """KEY=VALUE of each path that only a process in the same folder would find."""
    found: list[str] = []

    def note(key: str, path: str) -> str:
        found.append(f"{key}={path}")
        return path

    _replaced(values, note)
    return found


def refuse_private(values: Values) -> None:
    """Raises ValueError where a path of the run file would be lost or not be found by other processes."""
    found = private(values)
    if found:
        raise ValueError(
            f"only this process would find {', '.join(found)} (a submitted job runs in Ray's own copy of the working "
            f"directory, which is thrown away): add root=/folder/that/all/nodes/see or root=s3://bucket/prefix, under "
            f"which they are laid, or write absolute paths, and for MLflow tracking.uri=http://HOST:PORT"
        )


def _is_relative(path: str) -> bool:
    """Neither empty, nor absolute, nor a URL with a host, nor a registered model."""
    if path.startswith(SQLITE):
        return not path.removeprefix(SQLITE).startswith("/")
    return bool(path) and not path.startswith(("/", "models:/")) and "://" not in path


def _replaced(values: Values, change: Callable[[str, str], str]) -> dict[str, Any]:
    """A copy of `values` with `change(key, path)` in place of each relative path."""

    def of(key: str, value: Any) -> Any:
        if isinstance(value, str):
            return change(key, value) if _is_relative(value) else value
        if isinstance(value, Mapping):
            return {of(key, str(path)): weight for path, weight in value.items()}
        if isinstance(value, list | tuple):
            return [of(key, each) for each in value]
        return value

    copy = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, section, name in _present(copy):
        section[name] = of(key, section[name])
    return copy


def _present(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each key of PATHS that `values` holds, with the section it stands in and its name there."""
    for key in PATHS:
        section, _, name = key.rpartition(".")
        owner = values.get(section, {}) if section else values
        if isinstance(owner, dict) and owner.get(name) is not None:
            yield key, owner, name
