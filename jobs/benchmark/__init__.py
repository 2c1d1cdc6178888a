"""Benchmarks: `python -m jobs.benchmark NAME ...`, one module each with `main(argv) -> exit code`."""
