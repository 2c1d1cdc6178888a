"""A training event as what MLflow holds: metrics, pictures and tags of a run."""

from collections.abc import Mapping
from typing import Any, cast

from pipeline.tracking import pictures
from pipeline.training import events as say

GROUPS = {  # metric -> the group that MLflow's page shows it in; the loss and groups of their own stay as they are
    **{f"loss_quarter_{n}": f"loss_by_noise/quarter_{n}" for n in (1, 2, 3, 4)},
    **{name: f"optimizer/{name}" for name in ("grad_norm", "learning_rate", "skipped_steps", "rollbacks")},
    **{name: f"speed/{name}" for name in ("images_per_s", "data_wait", "tflops", "mfu", "peak_memory_gib")},
    "lost_images": "data/lost_images",
}
CONSTANT = ("held_out/images",)  # no curve


def metrics(event: say.Event) -> dict[str, float]:
    """Those of an event, by MLflow's keys; most events have none."""
    found: Mapping[str, float] = getattr(event, "metrics", {})
    return {GROUPS.get(key, key): value for key, value in found.items() if key not in CONSTANT}


def picture_key(event: say.Event) -> str | None:
    """The name of the pictures that this event is one of; None for one that is not seen."""
    match event:
        case say.Samples():
            return "samples" if event.weights == "ema" else f"samples_{event.weights}"
        case say.Curve():
            return "loss_against_gamma"
        case _:
            return None


def picture(event: say.Event) -> Any:
    """An event with a `picture_key` as uint8 (H, W, 3)."""
    return pictures.grid(event.pixels) if isinstance(event, say.Samples) else pictures.curve(cast(say.Curve, event))


def tags(event: say.Event) -> Mapping[str, str]:
    """Tags that the run has from this event on."""
    match event:
        case say.Started():
            known = {"parameters": f"{event.parameters:,}", "workers": str(event.world_size)}
            return known | ({"resumed_from": event.checkpoint} if event.checkpoint else {})
        case say.Prepared():
            speed = {"gflop_per_image": event.flops_per_image / 1e9, "peak_tflop_per_s": event.peak_flops / 1e12}
            return {"precision": event.precision} | {name: f"{value:.3g}" for name, value in speed.items()}
        case say.CheckpointSaved():
            return {"checkpoint": event.checkpoint}
        case say.CheckpointFailed():
            what = "older ones not removed" if event.committed else "not saved"
            return {"alarm": f"checkpoint of step {event.step}: {what}: {event.reason}"}
        case say.Hung():
            return {"alarm": f"workers stood still at step {event.step}: {event.reason}; stacks: {event.log}"}
        case say.RolledBack():
            return {"alarm": f"from step {event.from_step} back to {event.step}: {event.reason}"}
        case say.Skipped():
            return {"last_skipped_step": event.reason}
        case say.Finished():
            return {"ended": event.reason}
        case _:
            return {}
