"""Reads a shard set through Ray from where its ledger ends, and notes every batch there.

`python -m tests.faults.data_consumer ADDRESS SET LEDGER` until LEDGER.end exists. The reading is done in a Ray task, as
a training worker's is; the driver only waits for it.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.data.reading.stream import StreamConfig
from pipeline.data.sets.manifest import load

SHARDS = 3


def config(url: str) -> StreamConfig:
    return StreamConfig(url, batch_size=24, logical_shards=SHARDS, window=2, readers=2, reader_cpus=0.5, flip=0.5)


def noted(ledger: Path) -> list[list[int]]:
    """The ids of each step that was noted whole."""
    lines = ledger.read_text().split("\n")[:-1] if ledger.exists() else []
    return [json.loads(line) for line in lines]


def read(url: str, ledger: str) -> None:
    """Appends one line a global batch to the ledger; a step is noted by one write or not at all."""
    from pipeline.cluster.feed import ray_stream

    path = Path(ledger)
    first = len(noted(path))
    with ray_stream(config(url), load(url), list(range(SHARDS)), first) as source, path.open("ab", buffering=0) as out:
        while not Path(f"{ledger}.end").exists():
            ids: list[int] = []
            for _ in range(SHARDS):
                ids += next(source).ids.tolist()
            out.write(json.dumps(ids).encode() + b"\n")
            time.sleep(0.02)  # a step of a training


def main() -> None:
    import ray

    address, url, ledger = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    task: Any = ray.remote(read).options(num_cpus=0, max_retries=0, resources={"consumer": 1}, name="consumer")
    ray.get(task.remote(url, ledger))


if __name__ == "__main__":
    main()
