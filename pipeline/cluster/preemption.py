"""A worker's notice that its node goes away: SIGTERM to its process, or Ray's drain of the node.

Loads nothing of the pipeline: the controller's process imports it as well.
"""

import signal
import threading
from typing import Any

from ray.train.torch import TorchConfig

_noticed = threading.Event()  # of this process; set by the signal handler, which only the main thread may install


class Notice:
    """Asked as often as one likes, says yes once for each notice."""

    def __init__(self) -> None:
        self._drain: Any = None

    def __call__(self) -> bool:
        # Ray's public get_preemption_info is a barrier of all workers, too dear for every step
        from ray.train.v2._internal.execution.context import get_train_context

        drain = get_train_context().preemption_context.preemption_info
        new = drain is not self._drain
        self._drain = drain
        if not new and not _noticed.is_set():
            return False
        _noticed.clear()
        return True


def heed_sigterm() -> None:
    """SIGTERM no longer ends this process: it becomes a notice."""
    signal.signal(signal.SIGTERM, lambda number, frame: _noticed.set())


class _Backend(TorchConfig().backend_cls):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(heed_sigterm)  # on each worker's main thread


class NoticingTorchConfig(TorchConfig):
    """Torch's process group, on workers that heed SIGTERM."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
