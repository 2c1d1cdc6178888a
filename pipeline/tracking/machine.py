"""What a node's processors, memory and network do, as the metrics that MLflow's page shows as system metrics."""

import time

import psutil
import torch

from pipeline.training import events as say

EVERY_S = 10.0
MIB, GIB = 2**20, 2**30


class Machine:
    """The node that this process runs on, and its GPU. Rates are means since the last sample.

    local_rank: of this process among those of the node; the first one tells of the node, each of its own GPU.
    """

    def __init__(self, node: str, local_rank: int, device: torch.device) -> None:
        self.prefix, self.local_rank, self.device = f"system/{node}/", local_rank, device
        self.at, self.sent, self.received = 0.0, 0, 0
        self.sample()

    def after(self, event: say.Event) -> say.System | None:
        """What is to be said after an event: every `EVERY_S` seconds, once a step has ended, a sample."""
        if not isinstance(event, say.Step) or time.monotonic() - self.at < EVERY_S:
            return None
        return say.System(event.step, event.images, self.sample())

    def sample(self) -> dict[str, float]:
        """Metrics by key, of the time since the last call."""
        found = self._host() if self.local_rank == 0 else {}
        if self.device.type == "cuda":
            found |= {f"gpu_{self.local_rank}_{name}": value for name, value in _gpu(self.device).items()}
        self.at = time.monotonic()
        return {self.prefix + name: value for name, value in found.items()}

    def _host(self) -> dict[str, float]:
        seconds, network, memory = time.monotonic() - self.at, psutil.net_io_counters(), psutil.virtual_memory()
        found = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_gib": memory.used / GIB,
            "memory_percent": memory.percent,
            "sent_mib_per_s": (network.bytes_sent - self.sent) / MIB / seconds,
            "received_mib_per_s": (network.bytes_recv - self.received) / MIB / seconds,
        }
        self.sent, self.received = network.bytes_sent, network.bytes_recv
        return found


def _gpu(device: torch.device) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(device)
    found = {"memory_gib": (total - free) / GIB, "memory_percent": 100 * (1 - free / total)}
    try:
        return found | {"busy_percent": float(torch.cuda.utilization(device))}
    except (ModuleNotFoundError, RuntimeError):  # without nvidia-ml-py torch cannot tell
        return found
