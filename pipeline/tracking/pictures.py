"""What a run shows in MLflow's UI as pictures: grids of samples, and losses against the noise level."""

import io
import math
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.evaluation.pictures import grid as tiled
from pipeline.training import events as say

COLOURS = {"held-out, EMA": "#2f7ed8", "held-out, raw": "#e07b39", "training objective": "#2ca58d"}


def grid(pixels: Tensor) -> Any:
    """Images uint8 (n, C, H, W) as one picture, array (height, width, C), small ones enlarged."""
    picture = tiled(pixels, math.ceil(math.sqrt(len(pixels)))).permute(1, 2, 0).numpy()
    scale = max(1, 256 // max(picture.shape[:2]))
    return picture.repeat(scale, 0).repeat(scale, 1)


def curve(event: say.Curve) -> Any:
    """Losses against gamma: two panels, because the objective's loss is in a unit of its own. uint8 (H, W, 3)."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(7.0, 5.6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _steps(above, event.edges, {"held-out, EMA": event.held_out, "held-out, raw": event.raw})
    _steps(below, event.edges, {"training objective": event.training})
    above.set_ylabel("mean (eps_hat - eps)²")
    below.set_ylabel("objective's loss")
    below.set_xlabel("gamma = log(noise / signal): little noise on the left")
    above.set_title(f"loss against noise level, {event.images:,} images", loc="left")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def _steps(axes: Any, edges: Any, series: dict[str, Any]) -> None:
    for name, values in series.items():
        if any(value is not None for value in values):
            heights = [math.nan if value is None else value for value in values]
            axes.stairs(heights, edges, label=name, color=COLOURS[name], baseline=None, linewidth=1.8)
    axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
