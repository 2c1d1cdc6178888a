"""What every job shares: a run file and overrides on the command line, and errors as one line with exit code 2."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from rich.console import Console

from pipeline.training.stopping import SIGNALS, WISH_S, leave_terminal

console = Console(stderr=False, highlight=False)


class _Parser(argparse.ArgumentParser):
    """Lists the keys of the run file when help is asked for, and not before: that imports every section's owner."""

    sections: Sequence[str] = ()

    def format_help(self) -> str:
        from jobs import choices
        from pipeline.config import describe

        keys, named = describe(self.sections), choices.describe(self.sections)
        self.epilog = f"keys of the run file, override with section.key=value [default]:\n\n{keys}\n{named}"
        return super().format_help()


def parser(
    verb: str, description: str, sections: Sequence[str], *, run_file_needed: bool = True
) -> argparse.ArgumentParser:
    """`python -m jobs.VERB RUN_FILE [key=value ...]`. The help lists the keys of the sections that the job reads."""
    made = _Parser(
        prog=f"python -m jobs.{verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.sections = sections
    needed = None if run_file_needed else "?"
    made.add_argument("run_file", nargs=needed, help="a complete run file, for example jobs/configs/digits.yaml")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="values laid on top of the run file")
    return made


def one_line(error: BaseException) -> str:
    """What a user needs of an error: the cause's message, on one line."""
    cause = getattr(error, "cause", None)  # Ray wraps what a task raised
    if isinstance(cause, BaseException):
        return one_line(cause)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


AGAIN = "run the same command again: it goes on from what was saved"


def main(run: Callable[[], int | None]) -> None:
    """Run a job: 0 done, 2 for what a user can mend (a line of each on stderr), 1 where Ray failed, 130 after Ctrl-C,
    SIGTERM or a closed terminal.

    RAYDIFFUSION_TRACEBACK=1 shows the traceback as well.
    """
    _end_well()
    try:
        code = run() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (ValueError, OSError) as error:
        if os.environ.get("RAYDIFFUSION_TRACEBACK"):
            raise
        for line in getattr(error, "problems", None) or [one_line(error)]:
            print(f"error: {line}", file=sys.stderr)
        code = 2
    except Exception as error:
        if os.environ.get("RAYDIFFUSION_TRACEBACK") or not _by_ray(error):
            raise
        print(f"error: Ray lost a part of itself ({one_line(error)[:300]}); {AGAIN}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.exit(code)


def _by_ray(error: BaseException) -> bool:
    """Whether it comes of Ray's own processes (a node, its store, a controller) and not of code that they ran."""
    if not type(error).__module__.startswith("ray."):
        return False
    from ray.exceptions import RayTaskError

    return not isinstance(error, RayTaskError) and not getattr(error, "worker_failures", None)


def _end_well() -> None:
    """SIGTERM and a closed terminal end a job as Ctrl-C does, so that it ends what it started; signals within
    WISH_S of the first are the same wish. Jobs that can save something first lay their own handlers over these.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    heard: list[float] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # what is still said must not fail for want of a terminal
            leave_terminal()
        heard.append(time.monotonic())
        if len(heard) == 1 or heard[-1] - heard[0] > WISH_S:
            raise KeyboardInterrupt

    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not where nohup ignores it
            signal.signal(number, on_signal)
