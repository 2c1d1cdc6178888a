"""What keeps a run from starting, all of it at once and before any work is done."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline import assembly, storage
from pipeline.data.sets.manifest import HELD_OUT, TRAIN
from pipeline.evaluation.config import unmeasurable
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
        found(lambda: looked_at(config, manifest))
    found(lambda: check_identity(assembly.began(config), assembly.choices(config), assembly.checkpoints(config)))
    found(lambda: assembly.changes_nothing_finished(config))
    found(lambda: assembly.demands(config))
    found(lambda: writable(config.output))
    found(lambda: tracked(config))
    for attempt in more:
        found(attempt)
    if manifest is None or problems:
        raise PreflightError(problems)
    return manifest


def looked_at(config: "RunConfig", manifest: "Manifest") -> None:
    """Raises ValueError where a training would stop at its first look at held-out images: there are none."""
    if config.training.evaluate_images and not manifest.split(HELD_OUT).total:
        raise ValueError(
            f"the shard set at {manifest.url} has no held-out images, which training.evaluate_images "
            f"{config.training.evaluate_images} asks for: shard it with shard.held_out above 0, or set "
            f"training.evaluate_images to 0"
        )


def later(config: "RunConfig", manifest: "Manifest") -> list[str]:
    """What will go wrong after the training, or is seldom meant: a line each. It keeps no run from starting."""
    train, held_out = (manifest.split(name).total for name in (TRAIN, HELD_OUT))
    told = [
        f"jobs.evaluate will refuse: {line}" for line in unmeasurable(config.evaluation, config.model.classes, held_out)
    ]
    if train < config.stream.batch_size:
        told.append(
            f"the set has {train} training images, a batch is {config.stream.batch_size}: each step takes images more "
            f"than once; set stream.batch_size lower"
        )
    if config.model.classes == 1:
        told.append("there is one class: labels tell the network nothing, and no class agreement is measured")
    return told


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
