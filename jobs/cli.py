"""What every job shares: a run file and overrides on the command line, and errors as one line with exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

console = Console(stderr=False, highlight=False)


class _Parser(argparse.ArgumentParser):
    """Lists the keys of the run file when help is asked for, and not before: that imports every section's owner."""

    sections: Sequence[str] = ()

    def format_help(self) -> str:
        from pipeline.config import describe

        keys = describe(self.sections)
        self.epilog = f"keys of the run file, override with section.key=value [default]:\n\n{keys}"
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


def main(run: Callable[[], int | None]) -> None:
    """Run a job: 0 done, 2 for what a user can mend (a line of each on stderr), 130 after Ctrl-C.

    RAYDIFFUSION_TRACEBACK=1 shows the traceback as well.
    """
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
    sys.stdout.flush()
    sys.exit(code)
