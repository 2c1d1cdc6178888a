"""Memory of a process and everything it started, as it runs."""

import threading

import psutil


class PeakMemory:
    """The largest sum of proportional set sizes over this process's tree, sampled in a thread. Use as a context."""

    def __init__(self, every_s: float = 1.0) -> None:
        self.every_s = every_s
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def take(self) -> int:
        """The peak since the last call, bytes."""
        peak, self.bytes = max(self.bytes, tree_bytes(psutil.Process())), 0
        return peak

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self.every_s):
            self.bytes = max(self.bytes, tree_bytes(me))


def tree_bytes(root: psutil.Process) -> int:
    """Proportional set size (pages shared by n processes count 1/n) of a process and its descendants; resident size
    where the system does not tell it.
    """
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            info = process.memory_full_info()
        except psutil.Error:  # gone, or not ours to read
            continue
        total += getattr(info, "pss", info.rss)
    return total
