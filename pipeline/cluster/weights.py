"""Verified models kept on the node, by digest: a replica comes back without the registry, whatever has become of the
files that its model was first read from."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import model as models
from pipeline import storage

log = logging.getLogger("raydiffusion.serving")

FILES = (*models.FILES, "digests.json")


def folder_of(configured: str | None) -> Path:
    """Where models are kept: as configured, else in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(configured or os.path.join(cache, "raydiffusion", "models"))


def load(url: str, digest: str, device: str, tracking_uri: str | None, folder: Path, most_bytes: int) -> models.Model:
    """The model of that digest ('' where none is known): the one kept, else from `url`, and kept from then on.

    Raises:
        ValueError, FileNotFoundError: it is not kept and cannot be had, or has another digest.
    """
    if digest and (model := _kept(folder / digest, digest, device)) is not None:
        return model
    with _fetched(url, tracking_uri) as fetched:
        model = models.load(fetched, device)
        if digest and model.digest != digest:
            raise ValueError(f"model {url} has the digest {model.digest}, expected {digest}")
        try:
            _keep(fetched, folder, model.digest, most_bytes)
        except OSError as error:  # a full disk: the model serves all the same
            log.warning("model %s could not be kept in %s: %s", url, folder, error)
    return model


def _kept(place: Path, digest: str, device: str) -> models.Model | None:
    if not place.is_dir():
        return None
    try:
        model = models.load(str(place), device)
    except (ValueError, OSError) as error:
        log.warning("the model kept in %s is damaged and is fetched again: %s", place, error)
    else:
        if model.digest == digest:
            os.utime(place)
            return model
    shutil.rmtree(place, ignore_errors=True)
    return None


@contextmanager
def _fetched(url: str, tracking_uri: str | None) -> Iterator[str]:
    """The model directory of `url` on this machine for as long as the block runs."""
    if url.startswith("models:/"):
        from pipeline.tracking.registry import files

        must_exist(url, tracking_uri)
        with files(url, tracking_uri=tracking_uri) as fetched:
            yield fetched
        return
    with tempfile.TemporaryDirectory(prefix="raydiffusion-model-") as fetched:
        for name in FILES:
            storage.fetch_file(storage.join(url, name), os.path.join(fetched, name))
        yield fetched


def must_exist(source: str, tracking_uri: str | None) -> None:
    """A registry in a file: MLflow would make an empty one where there is none."""
    path = (tracking_uri or "").removeprefix("sqlite:///")
    if path != (tracking_uri or "") and not os.path.isfile(path):
        raise FileNotFoundError(f"no registry at {path} (tracking.uri), so no model {source}: train and register first")


def _keep(fetched: str, folder: Path, digest: str, most_bytes: int) -> None:
    """Beside it first and renamed when whole; then those used longest ago leave until all are within `most_bytes`."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as whole:
        copied = Path(whole) / digest
        copied.mkdir()
        for name in FILES:
            shutil.copyfile(os.path.join(fetched, name), copied / name)
        if not (folder / digest).exists():
            copied.rename(folder / digest)
    others = [each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".new-")]
    total = 0
    for place in sorted(others, key=lambda each: each.stat().st_mtime, reverse=True):
        total += sum(file.stat().st_size for file in place.iterdir())
        if total > most_bytes and place.name != digest:
            shutil.rmtree(place, ignore_errors=True)
