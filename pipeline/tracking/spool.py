"""A local, append-only file between the training and a server that may be away."""

import threading
from pathlib import Path

MOST_BYTES = 64 << 20  # of what was delivered already, before the file starts afresh


class Spool:
    """Lines in a file: `append` them, `take` the new ones. What another process left behind comes first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._cut = self._file.tell() > 0 and not path.read_bytes().endswith(b"\n")
        self._at = 0

    def append(self, line: str) -> None:
        """Raises OSError where the disk is full; what was written of the line stays alone, a broken line."""
        data = line.encode() + b"\n"
        with self._lock:
            before, self._cut = b"\n" if self._cut else b"", True
            while before or data:
                written = self._file.write(before + data)
                before, data = b"", (before + data)[written:]
            self._cut = False

    def take(self) -> list[str]:
        """The complete lines not yet taken."""
        with open(self.path, "rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [line.decode(errors="replace") for line in whole.splitlines() if line]

    def delivered(self) -> None:
        """All that was taken has arrived: where it is much and nothing came since, the file starts afresh."""
        with self._lock:
            if self._at > MOST_BYTES and self._file.tell() == self._at:
                self._file.truncate(0)
                self._at = 0

    def close(self, delivered: bool) -> None:
        """Removes the file if everything in it was delivered."""
        self._file.close()
        if delivered:
            self.path.unlink(missing_ok=True)
