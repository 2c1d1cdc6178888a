"""The driver of a training as a process of its own, so that it can be killed: `python -m tests.cluster.train_driver
RUN_FILE` tells the events as JSON lines; with `--empty N` it starts N workers that only say that they run.
"""

import sys
import time
from pathlib import Path
from typing import Any

import ray
import ray.train

from pipeline.cluster.session import session
from pipeline.cluster.train import fit, trainer
from pipeline.config import load_config
from pipeline.training import events as say


def main() -> None:
    run_file = sys.argv[1]
    config = load_config(run_file)
    with session():
        if "--empty" in sys.argv:
            empty(config, Path(run_file).parent / "started")
        else:
            fit(config, lambda event: print(say.encode(event), flush=True))


def empty(config: Any, file: Path) -> None:
    """Ray Train as the run has it, around a function that does nothing: rank 0 writes down when it started."""

    def run() -> None:
        if ray.train.get_context().get_world_rank() == 0:
            with file.open("a") as lines:
                lines.write(f"{time.time()}\n")
        time.sleep(3600)

    real = trainer(config, "", None)
    real.train_loop_per_worker = run
    real.fit()


if __name__ == "__main__":
    main()
