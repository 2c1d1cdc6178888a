"""A local, append-only file between the training and a server that may be away."""

import os
from pathlib import Path


class Spool:
    """Lines in a file: `append` them, `take` the new ones. What another process left behind comes first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # a line that was cut off stays alone
            self._file.flush()
        self._at = 0

    def append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def take(self) -> list[str]:
        """The complete lines not yet taken."""
        with open(self.path, "rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [line.decode(errors="replace") for line in whole.splitlines() if line]

    def close(self, delivered: bool) -> None:
        """Removes the file if everything in it was delivered."""
        self._file.close()
        if delivered:
            self.path.unlink(missing_ok=True)
