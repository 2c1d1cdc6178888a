"""Training on a Ray cluster: Ray Train's workers around the one training loop.

Ray Train places and restarts the worker group. Where a group starts from is what our own loader verifies, so that a run
goes on alike with and without Ray; Ray gets each committed checkpoint's metrics and place, and touches nothing.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, CheckpointUploadMode, FailureConfig, LoggingConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import assembly
from pipeline.cluster.channel import Speaker, listen, open_channel
from pipeline.cluster.feed import ray_stream
from pipeline.data import storage
from pipeline.data.manifest import load as load_manifest
from pipeline.training import events as say
from pipeline.training.loop import RunError, train
from pipeline.training.step import Place
from pipeline.training.stopping import stop_on_signals

if TYPE_CHECKING:
    from pipeline.config import RunConfig

COLLECTIVE_TIMEOUT_S = 300  # a lost peer is noticed in minutes, not in torch's 30
SNAPSHOT = "checkpoint_manager_snapshot.json"
REFUSED = "refused: "


def fit(config: "RunConfig", on_event: Callable[[say.Event], None]) -> say.Finished:
    """Trains on the cluster that Ray is connected to; `on_event` is called on this thread as events come.

    The first SIGINT or SIGTERM saves a checkpoint and stops, the second interrupts.

    Raises:
        ValueError: workers and readers that do not fit on the cluster, a run that cannot go on (see `loop.train`), or
            workers that failed more often than cluster.max_failures.
        KeyboardInterrupt: at a second signal.
    """
    config = with_full_paths(config)
    preflight(config, alive_nodes())
    finished = assembly.standing(config, load_manifest(config.stream.url))
    if finished is not None:
        on_event(finished)
        return finished
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    storage.delete(storage.join(assembly.checkpoints(config), SNAPSHOT))  # our commit records are the only authority
    channel = open_channel()
    fitting = _Fitting(trainer(config, channel))
    with stop_on_signals() as stop:
        fitting.start()
        for line in listen(channel, fitting, stop):
            if line.startswith(REFUSED):
                raise ValueError(line.removeprefix(REFUSED))
            event = say.decode(line)
            on_event(event)
            finished = event if isinstance(event, say.Finished) else finished
    if fitting.error is not None:
        raise explained(fitting.error)
    if finished is None:
        raise RuntimeError("the workers ended without an end of the training: this is a bug")
    return finished


class _Fitting(threading.Thread):
    """`TorchTrainer.fit` in a thread, so that the main thread can listen and be interrupted."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="fit", daemon=True)
        self.trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # handed to the main thread, which raises it
            self.error = error


def trainer(config: "RunConfig", channel: Any) -> TorchTrainer:
    """Ray Train's description of the run."""
    cluster = config.cluster
    gpu = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if gpu else {})
    folder, _, name = assembly.checkpoints(config).rpartition("/")

    def run() -> None:  # bound here and not in train_loop_config, which the controller's process would load as well
        worker(config, channel)

    return TorchTrainer(
        run,
        scaling_config=ScalingConfig(num_workers=cluster.workers, use_gpu=gpu, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def worker(config: "RunConfig", channel: Any) -> None:
    """What every worker runs."""
    context = ray.train.get_context()
    gpu = config.cluster.gpus_per_worker > 0
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    place = Place(context.get_world_rank(), context.get_world_size(), device)
    speaker = Speaker(channel) if place.rank == 0 else None
    try:
        _train(config, place, speaker)
    except RunError as error:  # raised on every rank alike: a restart would meet it again
        if speaker is not None:
            speaker.say(REFUSED + " ".join(str(error).split()))
    finally:
        if speaker is not None:
            speaker.close()


def _train(config: "RunConfig", place: Place, speaker: Speaker | None) -> None:
    manifest = load_manifest(config.stream.url)
    stop = (lambda: False) if speaker is None else (lambda: speaker.stopping)
    reported = _Reported()
    for event in train(assembly.assemble(config, manifest, place, ray_stream, stop)):
        if speaker is not None:
            speaker.say(say.encode(event))
        reported.see(event)


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


# --- before the start -------------------------------------------------------------------------------------------------


def with_full_paths(config: "RunConfig") -> "RunConfig":
    """The same run with absolute local paths: workers and readers run elsewhere."""

    def full(url: str) -> str:
        path = storage.local_path(url)
        return url if path is None else os.path.abspath(path)

    return replace(config, output=full(config.output), stream=replace(config.stream, url=full(config.stream.url)))


def alive_nodes() -> list[dict[str, float]]:
    """The resources of each node that is up."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def preflight(config: "RunConfig", nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuses a run whose workers and readers could never run together, in place of waiting for ever.

    Raises:
        ValueError: what was asked and what the cluster has.
    """
    cluster, stream = config.cluster, config.stream
    if cluster.workers > stream.logical_shards:
        raise ValueError(
            f"cluster.workers is {cluster.workers}, more than stream.logical_shards, {stream.logical_shards}: some "
            f"workers would have nothing to do"
        )
    bundle = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    readers = cluster.workers * stream.readers
    wanted = [bundle] * cluster.workers + [{"CPU": stream.reader_cpus, "GPU": 0.0}] * readers
    free = [dict(node) for node in nodes]
    for ask in wanted:
        node = next((n for n in free if all(n.get(k, 0.0) + 1e-9 >= v for k, v in ask.items())), None)
        if node is None:
            has = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes) or "no node"
            raise ValueError(
                f"the cluster cannot hold this run: {cluster.workers} workers of {cluster.cpus_per_worker:g} CPU and "
                f"{cluster.gpus_per_worker:g} GPU and {readers} readers of {stream.reader_cpus:g} CPU were asked for "
                f"(cluster.*, stream.readers, stream.reader_cpus); its nodes have: {has}"
            )
        for name, value in ask.items():
            node[name] = node.get(name, 0.0) - value


def explained(error: BaseException) -> BaseException:
    """A failed training's error: the workers' own where a user can mend it, else Ray's, traceback and all."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, ValueError | OSError):
            return ValueError(f"worker {rank}: {cause}")
    return error
