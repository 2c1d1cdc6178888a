"""The loss curve of 50 steps, exactly as it was committed: a refactor must match it, a change must argue.

    python -m tests.training.test_golden

writes the curve of this platform anew (a platform: torch's version and what the processor can do).
"""

import json
import tempfile
from pathlib import Path

import torch

from pipeline.training.loop import train
from tests.training.runs import BATCH, losses, task

STORED = Path(__file__).parent / "golden.json"


def platform() -> str:
    instructions = {"bf16": torch.cpu._is_avx512_bf16_supported(), "amx": torch.cpu._is_amx_tile_supported()}
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join([f"torch {torch.__version__}", capability, *(name for name, has in instructions.items() if has)])


def curve(store: str) -> list[float]:
    """Of a small U-Net with dropout and attention on one thread, with label dropout and clipping."""
    torch.set_num_threads(1)
    return losses(list(train(task(store, images=50 * BATCH, label_dropout=0.2, weight_decay=0.01, clip_norm=0.5))))


def test_the_curve_is_the_committed_one(tmp_path: Path) -> None:
    stored: dict[str, list[float]] = json.loads(STORED.read_text())
    if platform() not in stored:
        raise AssertionError(
            f"no curve of this platform, '{platform()}', is committed, only of {'; '.join(stored)}: nothing "
            f"is shown. Record one on a commit whose curve is known to be right: python -m tests.training.test_golden"
        )
    found = curve(str(tmp_path))
    assert len(found) == 50
    differing = [step for step, (a, b) in enumerate(zip(found, stored[platform()], strict=True), 1) if a != b]
    assert not differing, f"another loss from step {differing[0]} on: {found[differing[0] - 1]!r}"


if __name__ == "__main__":
    curves = json.loads(STORED.read_text()) if STORED.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        curves[platform()] = curve(folder)
    STORED.write_text(json.dumps(curves, indent=1) + "\n")
    print(f"{STORED}: {platform()}, {curves[platform()][0]:.4f} to {curves[platform()][-1]:.4f}")
