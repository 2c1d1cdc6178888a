"""A run that goes on with its server away: `python -m tests.faults.tracking_driver OUTPUT DATA URI` tells 100 steps,
says so and waits to be killed.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from pipeline.data.sets.manifest import load
from pipeline.tracking.runs import open_run
from pipeline.training import events as say
from tests.cluster.test_train import run_config


def main() -> None:
    output, data, uri = sys.argv[1:]
    made = run_config(Path(output), data)
    tracked = open_run(replace(made, tracking=replace(made.tracking, uri=uri)), load(data), lambda line: None)
    for step in range(1, 101):
        tracked.handle(say.Step(step, step, {"loss": 1.0 / step}))
    print(100, flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main()
