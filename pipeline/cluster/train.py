"""Training on a Ray cluster: Ray Train's workers around the one training loop.

Ray Train places and restarts the worker group. Where a group starts from is what our own loader verifies, so that a run
goes on alike with and without Ray; Ray gets each committed checkpoint's metrics and place, and touches nothing.
"""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from pipeline import assembly, storage
from pipeline.cluster import capacity, hang
from pipeline.cluster.channel import listen, open_channel
from pipeline.cluster.monitoring import RunMetrics
from pipeline.cluster.preemption import NoticingTorchConfig
from pipeline.cluster.watch import Verdict
from pipeline.cluster.worker import REFUSED, work
from pipeline.resume import with_full_paths
from pipeline.storage.lease import Claim, Lease
from pipeline.training import events as say
from pipeline.training.stopping import stop_on_signals

if TYPE_CHECKING:
    from pipeline.config import RunConfig

COLLECTIVE_TIMEOUT_S = 900  # a lost peer is noticed in minutes, not in torch's 30; the watch is to notice it before
SNAPSHOT = "checkpoint_manager_snapshot.json"


def fit(
    config: "RunConfig",
    on_event: Callable[[say.Event], None],
    lease: Lease | None = None,
    backlog: Callable[[], int] = lambda: 0,
) -> say.Finished:
    """Trains on the cluster that Ray is connected to; `on_event` is called on this thread as events come. lease: on the
    output; the training ends where it is lost. `backlog`: how many events its sinks have not brought to where they go.

    A signal saves a checkpoint and stops, see `stop_on_signals`.

    Raises:
        ValueError: workers and readers that do not fit on the cluster, a run that cannot go on (see `loop.train`), or
            workers that failed more often than cluster.max_failures.
        KeyboardInterrupt: at a third wish to stop.
    """
    config = with_full_paths(config)
    for check in checks(config):
        check()
    manifest = assembly.data(config)
    finished = assembly.standing(config, manifest)
    if finished is not None:
        on_event(finished)
        return finished
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    storage.delete(storage.join(assembly.checkpoints(config), SNAPSHOT))  # our commit records are the only authority
    channel = open_channel(config.cluster.hang_factor, config.cluster.hang_floor_s)
    fitting = _Fitting(trainer(config, manifest.digest, channel, None if lease is None else lease.claim))
    with stop_on_signals() as stop, RunMetrics(config.name) as metrics:
        fitting.start()
        for heard in listen(channel, fitting, lambda: stop() or (lease is not None and lease.lost)):
            event = _event(config, channel, heard)
            if event is not None:
                metrics.handle(event)
                on_event(event)
                metrics.backlog(backlog())
            finished = event if isinstance(event, say.Finished) else finished
    if fitting.error is not None:
        raise explained(fitting.error)
    if finished is None:
        raise RuntimeError("the workers ended without an end of the training: this is a bug")
    return finished


def checks(config: "RunConfig") -> list[Callable[[], None]]:
    """What the cluster must have for this run; each raises ValueError."""
    return [
        lambda: capacity.share(config),
        lambda: capacity.check(config, capacity.alive_nodes(), capacity.most_resources()),
        lambda: _has_room(config),
    ]


def _has_room(config: "RunConfig") -> None:
    """Of a cluster that is this machine alone, whose free memory is known here."""
    if len(capacity.alive_nodes()) == 1 and capacity.most_resources() is None:
        assembly.has_room(config, config.cluster.fewest_workers)


def _event(config: "RunConfig", channel: Any, heard: str | Verdict | int) -> say.Event | None:
    if isinstance(heard, Verdict):
        return _restarted(config, channel, heard)
    if isinstance(heard, int):
        return say.Moved(heard, heard * config.stream.batch_size) if heard else None
    return _decoded(heard)


def _decoded(line: str) -> say.Event:
    if line.startswith(REFUSED):
        raise ValueError(line.removeprefix(REFUSED))
    return say.decode(line)


def _restarted(config: "RunConfig", channel: Any, verdict: Verdict) -> say.Hung | None:
    """Ends a group that stands still; None where it had ended already."""
    log = hang.end(channel, verdict, config.output)
    step = max(sign.step for sign in verdict.workers)
    return None if log is None else say.Hung(step, step * config.stream.batch_size, verdict.reason, log)


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


class Trainer(TorchTrainer):
    """Without Ray Train's cleaner of placement groups, which go with their job anyway: it asks Ray's state API every
    second, and where that does not answer the end of each training waits for it, 12 s.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]


def trainer(config: "RunConfig", data: str, channel: Any, claim: Claim | None = None) -> TorchTrainer:
    """Ray Train's description of the run on the shard set's version with digest `data`."""
    cluster, reserved = config.cluster, capacity.bundle(config)
    gpu = cluster.gpus_per_worker > 0
    folder, _, name = assembly.checkpoints(config).rpartition("/")
    if not isinstance(cluster.workers, int):  # readers run in their worker's share, see capacity.bundle
        config = replace(config, stream=replace(config.stream, reader_cpus=0.0))

    def run() -> None:  # bound here and not in train_loop_config, which the controller's process would load as well
        work(config, data, channel, claim)

    return Trainer(
        run,
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=gpu,
            resources_per_worker=reserved,
            elastic_resize_monitor_interval_s=cluster.resize_s,
        ),
        torch_config=NoticingTorchConfig(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def explained(error: BaseException) -> BaseException:
    """A failed training's error: the workers' own where a user can mend it, else Ray's, traceback and all."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, ValueError | OSError):
            return ValueError(f"worker {rank}: {cause}")
    return error
