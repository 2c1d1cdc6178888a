"""The model's space: pixels become z and z pixels in one place; sampling and scoring need no OpenCV."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.diffusion.pixels import Pixels
from pipeline.diffusion.randomness import StepKey
from pipeline.diffusion.space import Space
from tests.serving.tiny import save_tiny

ROOT = Path(__file__).parent.parent
SPACE: Space = Pixels((3, 2, 4))


def test_pixels_are_their_own_space() -> None:
    pixels = torch.randint(0, 256, (5, 3, 2, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = SPACE.encode(pixels, StepKey(0, 0, 0, 1).normal("posterior"))
    assert torch.equal(z, SPACE.encode(pixels))
    assert torch.equal(SPACE.decode(z), pixels)
    assert SPACE.shape == SPACE.image_shape == z.shape[1:]
    assert SPACE.grid is not None
    assert torch.equal(SPACE.grid.index(z), pixels.long())


@pytest.mark.parametrize("pixels", [torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 4, 2, dtype=torch.uint8)])
def test_other_images_are_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=re.escape("images must be uint8 (1, 3, 2, 4), got")):
        SPACE.encode(pixels)


def test_a_draw_is_that_of_its_step_and_shard() -> None:
    like = torch.zeros(2, 3)
    draws = [StepKey(0, *place, 2).normal("posterior")(like) for place in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_pixels_are_converted_nowhere_else() -> None:
    used = {
        str(path.relative_to(ROOT))
        for folder in ("pipeline", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bto_(model|pixels)\(", path.read_text())
    }
    assert used == {"pipeline/diffusion/pixels.py"}


WITHOUT_OPENCV = """
import sys
sys.modules["cv2"] = None  # so that an import of it fails
import pipeline
model = pipeline.load(sys.argv[1])
images = model.sample(2, "ddim", steps=2)
assert model.bits_per_dim(images, "vlb", levels=2).bits_per_dim.isfinite().all()
"""


def test_sampling_and_scoring_need_no_opencv(tmp_path: Path) -> None:
    save_tiny(str(tmp_path / "tiny"))
    command = [sys.executable, "-c", WITHOUT_OPENCV, str(tmp_path / "tiny")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
