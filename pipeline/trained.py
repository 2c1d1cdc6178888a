"""The model of a run: what its end left, or, of one that is under way or was stopped, its newest checkpoint."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline import assembly, model, storage
from pipeline.model import Model
from pipeline.tracking.facts import RUN_FILE
from pipeline.tracking.runs import STORED
from pipeline.training.checkpoint import committed, newest

if TYPE_CHECKING:
    from pipeline.training.checkpoint import State

CHECKPOINTS, MODEL = "checkpoints", "model"


def is_output(url: str) -> bool:
    """Whether a run's output is there, and no model directory."""
    if storage.exists(storage.join(url, "digests.json")):
        return False
    return storage.exists(storage.join(url, RUN_FILE)) or bool(committed(storage.join(url, CHECKPOINTS)))


def load(output: str, device: str = "cpu") -> Model:
    """The model of the run at this folder or s3:// prefix: OUTPUT/model, or the EMA weights of its newest checkpoint
    where that is further on; the card's `complete` says whether the training had ended.

    Raises:
        ValueError: no model and no checkpoint that verifies, or a damaged model.
    """
    url, store = storage.join(output, MODEL), storage.join(output, CHECKPOINTS)
    steps = committed(store)
    exported = _card(url)
    if exported is not None and (not steps or steps[0] <= exported.get("step", 0)):
        return model.load(url, device)
    state, rejected = newest(store)
    if state is not None and (exported is None or state.step > exported.get("step", 0)):
        return _of(output, state, device)
    if exported is not None:
        return model.load(url, device)
    raise ValueError(
        f"{output} has no model: no checkpoint there is committed; train first {'; '.join(rejected)}".rstrip()
    )


def half(found: Model) -> str | None:
    """One line for a model whose training had not ended; None for any other."""
    if found.card.get("complete", True):
        return None
    return f"half-trained: the checkpoint of {found.card['images_seen']:,} images, whose training has not ended"


def _card(url: str) -> Mapping[str, Any] | None:
    """Of a committed model directory, not verified."""
    if not storage.exists(storage.join(url, "digests.json")):
        return None
    try:
        return json.loads(storage.read_bytes(storage.join(url, "card.json")))
    except (FileNotFoundError, ValueError):
        return {}  # loading it says what is wrong


def _of(output: str, state: "State", device: str) -> Model:
    told = state.facts.get("about")
    if not told:
        raise ValueError(
            f"the checkpoints at {output} are of a release that kept no card in them: go on with the training, if only "
            f"for a step (training.images), and they have one"
        )
    card = assembly.card(state.facts, state.step, {}) | {"mlflow_run": _mlflow_run(output)}
    return model.in_memory(model.config_from(told["model"]), state.tensors["ema"], card, device)


def _mlflow_run(output: str) -> str:
    try:
        return json.loads(storage.read_bytes(storage.join(output, STORED)))["run_id"]
    except (FileNotFoundError, ValueError, KeyError):
        return ""
