"""What every Ray Train worker runs: the one training loop, its events told to the driver and to Ray Train."""

import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray.train
import torch
from ray.train import CheckpointUploadMode

from pipeline import assembly
from pipeline.cluster.channel import Speaker
from pipeline.cluster.feed import ray_stream
from pipeline.cluster.preemption import Notice
from pipeline.data.sets.manifest import load as load_manifest
from pipeline.storage.lease import Claim
from pipeline.tracking.machine import Machine
from pipeline.training import events as say
from pipeline.training.loop import Hooks, RunError, train
from pipeline.training.step import Place
from pipeline.training.task import Task

if TYPE_CHECKING:
    from pipeline.config import RunConfig

REFUSED = "refused: "


def work(config: "RunConfig", data: str, channel: Any, claim: Claim | None) -> None:
    """One rank of the training on the shard set's version `data`, from the newest checkpoint to the end. claim: see
    `assembly.assemble`.
    """
    context = ray.train.get_context()
    gpu = config.cluster.gpus_per_worker > 0
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    place = Place(context.get_world_rank(), context.get_world_size(), device)
    speaker = Speaker(channel, place.rank)
    try:
        task = assembly.assemble(config, load_manifest(config.stream.url, data), place, ray_stream, claim=claim)
        _train(task, place, speaker)
    except RunError as error:  # raised on every rank alike: a restart would meet it again
        if place.rank == 0:
            speaker.say(REFUSED + " ".join(str(error).split()))
    finally:
        speaker.close()


def _train(task: Task, place: Place, speaker: Speaker) -> None:
    machine = Machine(socket.gethostname(), ray.train.get_context().get_local_rank(), place.device)
    reported = _Reported()
    for event in train(replace(task, hooks=watched(task.hooks, speaker))):
        if isinstance(event, say.Started | say.RolledBack):
            speaker.step = event.step
        if place.rank == 0:
            speaker.say(say.encode(event))
        if (sampled := machine.after(event)) is not None:
            speaker.say(say.encode(sampled))
        if isinstance(event, say.CheckpointBegun):
            speaker.doing = "save"
        reported.see(event)


def watched(hooks: Hooks, speaker: Speaker) -> Hooks:
    """The same hooks; the speaker knows of each step, and of what takes the time of one."""

    def stop() -> bool:
        speaker.begin_step()
        return speaker.stopping

    def watching(name: str, call: Callable[..., Any] | None) -> Callable[..., Any] | None:
        def watched_call(*values: Any) -> Any:
            speaker.doing = name
            return call(*values)  # pyright: ignore[reportOptionalCall]

        return call and watched_call

    evaluate, sample = watching("evaluate", hooks.evaluate), watching("sample", hooks.sample)
    return Hooks(evaluate=evaluate, sample=sample, stop=stop, save=Notice(), commit=hooks.commit)


class _Reported:
    """Tells Ray Train of committed checkpoints: every rank calls at the same events, rank 0 brings the checkpoint."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.saved: say.CheckpointSaved | None = None

    def see(self, event: say.Event) -> None:
        if isinstance(event, say.Step | say.Evaluated):
            self.metrics |= event.metrics
        elif isinstance(event, say.CheckpointSaved):
            self.saved = event
        elif isinstance(event, say.CheckpointBegun | say.Finished):
            self._report(event)

    def _report(self, event: say.Event) -> None:
        metrics: dict[str, Any] = {**self.metrics, "step": event.step, "images": event.images}
        checkpoint = None
        if self.saved is not None:
            home: Any = ray.train.get_context().get_storage()
            path = home.build_checkpoint_path_from_name(self.saved.checkpoint.rstrip("/").rpartition("/")[2])
            checkpoint = ray.train.Checkpoint(path, filesystem=home.storage_filesystem)
            metrics["checkpoint_step"] = self.saved.step
            self.saved = None
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
