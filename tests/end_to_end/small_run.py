"""A small run in a folder of its own, and the environment of the jobs that tests start."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RUN_FILE = "jobs/configs/digits.yaml"


def in_folder(folder: Path) -> list[str]:
    """Overrides that keep a run inside `folder`."""
    return [
        f"output={folder}/run",
        f"shard.source={folder}/images",
        f"shard.url={folder}/shards",
        f"stream.url={folder}/shards",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
    ]


def small(folder: Path) -> list[str]:
    """A run of seconds: a tiny network, a few steps, nothing demanded of its quality."""
    return [
        *in_folder(folder),
        "shard.samples_per_shard=64",
        "model.network={name: unet, base_width: 16, multipliers: [1, 2], blocks: 1, attention_at: []}",
        "stream.batch_size=64",
        "training.images=1280",
        "training.warmup_images=128",
        "training.evaluate_images=64",
        "training.sample_images=20",
        "training.checkpoint_every_images=640",
        "evaluation.samples=40",
        "evaluation.images=32",
        "evaluation.part=20",
        "evaluation.resamples=20",
        "evaluation.estimators={vlb: {levels: 16}}",
        "evaluation.min_agreement=null",
        "evaluation.max_frechet_ratio=null",
        "cluster.workers=1",
    ]


def job(
    verb: str, *arguments: str, timeout: float = 120, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m jobs.VERB`, as a user would run it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    command = [sys.executable, "-m", f"jobs.{verb}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
