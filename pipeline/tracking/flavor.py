"""`mlflow.pyfunc.load_model("models:/NAME@champion").predict(...)`: sampling and scoring through MLflow's generic
interface.

The MLmodel file names this module; MLflow imports it and calls `_load_pyfunc` with the model directory.
"""

from typing import Any

import numpy as np
import torch

from pipeline.model import Model, load


class Flavor:
    """What `predict` runs on.

    predict({"n": 16, "labels": [...], "seed": 0}) -> uint8 images (n, H, W, C);
    predict({"images": uint8 (n, H, W, C), "labels": [...], "seed": 0}) -> float64 bits/dim (n,). A model that is told
    tags takes "tags" in place of "labels".
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        if not isinstance(model_input, dict):
            raise ValueError(
                "predict takes a dict: {'n': 16, 'labels': ..., 'seed': 0} to sample, or {'images': ...} to score"
            )
        request = {**model_input, **(params or {})}
        unknown = set(request) - {"n", "labels", "tags", "seed", "images"}
        if unknown:
            raise ValueError(f"predict: unknown keys {sorted(unknown)}; valid: images, labels, n, seed, tags")
        seed, labels, tags = int(request.get("seed", 0)), request.get("labels"), request.get("tags")
        if "images" in request:
            pixels = torch.from_numpy(np.ascontiguousarray(request["images"])).permute(0, 3, 1, 2)
            return self.model.bits_per_dim(pixels, seed=seed, labels=labels, tags=tags).bits_per_dim.numpy()
        made = self.model.sample(int(request.get("n", 1)), seed=seed, labels=labels, tags=tags)
        return made.permute(0, 2, 3, 1).numpy()


def _load_pyfunc(path: str, **_: Any) -> Flavor:  # pyright: ignore[reportUnusedFunction]
    return Flavor(load(path))
