"""Makes the fixture of a release: a tiny set, checkpoints, model and evaluation, as this checkout writes them.

    python tests/releases/make.py tests/releases/vX.Y

Run it once a release, before anything changes; `test_releases.py` reads every one of them for ever after.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
RUN_FILE = """name: release
output: run
seed: 0
shard: {source: images, url: set, image_size: 8, channels: 1, resize: exact, held_out: 0.3, samples_per_shard: 16}
stream: {url: set, batch_size: 8, logical_shards: 2, readers: 1}
model:
  size: 8
  channels: 1
  classes: 2
  network: {name: mlp, width: 8, blocks: 1}
  prediction: v
objective: {name: weighted, weight: v}
training:
  images: 64
  warmup_images: 8
  evaluate_every_images: 64
  evaluate_images: 4
  sample_every_images: 0
  checkpoint_every_images: 32
evaluation:
  samples: 8
  images: 6
  part: 4
  resamples: 10
  sampling: {sampler: euler, steps: 4}
  estimators: {vlb: {levels: 4}}
  min_agreement: null
  max_frechet_ratio: null
tracking: {uri: "sqlite:///mlflow.db"}
"""


def main(folder: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("dark", "light"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(20):
            level = 60 if label == "dark" else 200
            pixels = np.clip(random.normal(level, 25, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i:02d}.png")
    (folder / "run.yaml").write_text(RUN_FILE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for verb in ("shard", "train", "evaluate"):
        local = [] if verb == "shard" else ["--local"]
        command = [sys.executable, "-m", f"jobs.{verb}", "run.yaml", *local]
        subprocess.run(command, cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
