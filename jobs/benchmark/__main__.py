"""Benchmarks, each with its own options: `python -m jobs.benchmark NAME --help`.

Only the chosen benchmark is imported, and this module needs the standard library alone: one that measures the core must
run where no more than that is installed.
"""

import argparse
import importlib
import os
import sys

BENCHMARKS = {  # module jobs.benchmark.NAME, and what it measures
    "systems": "ten published systems on the digits: bits/dim by every estimator, sample quality",
    "known_entropy": "a model trained on fields whose entropy is known: the gap of its likelihood to the truth",
    "step": "a whole training step beside diffusers' and a bare convolution; on a GPU also MFU",
    "loop": "the training loop with its data, in this process and as a worker of a Ray cluster",
    "engine": "the serving engine alone beside a bare loop over the same network, on any device",
    "serve": "a running endpoint: capacity, latency against load, how many replicas that asks for",
}


def run(argv: list[str]) -> int:
    """The exit code of the benchmark that argv[0] names, given the rest."""
    listed = "\n".join(f"  {name:<16}{what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark",
        description=__doc__,
        epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="one of those below")
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="what that benchmark takes")
    args = parser.parse_args(argv)
    from pipeline.choose import choose  # the standard library alone, too

    choose(BENCHMARKS, args.name, "benchmark")
    try:
        chosen = importlib.import_module(f"jobs.benchmark.{args.name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("jobs", "pipeline"):
            raise  # ours, and a bug
        raise ValueError(f"benchmark '{args.name}' needs the package '{error.name}', which is not installed") from error
    return chosen.main(args.rest)


def main(argv: list[str]) -> int:
    """0 done, 1 a bar missed, 2 for what a user can mend (one line on stderr), 130 after Ctrl-C."""
    try:
        return run(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("RAYDIFFUSION_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
