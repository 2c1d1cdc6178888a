"""What keeps a run from starting, all of it at once and before any work is done."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline import assembly, storage
from pipeline.tracking.client import Away, connect
from pipeline.tracking.runs import began
from pipeline.training.task import check_identity

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.data.sets.manifest import Manifest

PROBE = ".writable"
T = TypeVar("T")


class PreflightError(ValueError):
    """problems: one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def check(config: "RunConfig", *more: Callable[[], object]) -> "Manifest":
    """The shard set that the run trains on. more: further checks, which raise ValueError or OSError.

    Raises:
        PreflightError: lists every problem.
    """
    problems: list[str] = []

    def found(attempt: Callable[[], T]) -> T | None:
        try:
            return attempt()
        except (ValueError, OSError) as error:
            problems.append(" ".join(str(error).split()))
            return None

    manifest = found(lambda: assembly.data(config))
    if manifest is not None:
        found(lambda: assembly.fits(config.model, manifest))
    found(lambda: check_identity(assembly.began(config), assembly.choices(config), assembly.checkpoints(config)))
    found(lambda: writable(config.output))
    found(lambda: tracked(config))
    for attempt in more:
        found(attempt)
    if manifest is None or problems:
        raise PreflightError(problems)
    return manifest


def tracked(config: "RunConfig") -> None:
    """Raises ValueError where MLflow cannot be used. The server of a run that goes on may be away."""
    try:
        connect(config.tracking.uri)
    except Away:
        if not began(config):
            raise


def writable(output: str) -> None:
    """Raises ValueError where nothing can be written at `output`; makes no folder."""
    local = storage.local_path(output)
    place = output if local is None else next(path for path in (Path(local), *Path(local).parents) if path.exists())
    probe = storage.join(str(place), PROBE)
    try:
        storage.write_bytes(probe, b"")
        storage.delete(probe)
    except (OSError, ValueError) as error:
        raise ValueError(f"output: nothing can be written at {output}: {error}") from None
