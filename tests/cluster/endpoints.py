"""An endpoint for the tests of serving: a registry with three versions of one model, and how Serve is imported."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.model import build, save
from tests.serving.tiny import CONFIG, save_tiny

GENERATE, SCORE = "/v1/images/generations", "/v1/likelihood"


def import_serve() -> Any:
    with warnings.catch_warnings():  # Ray's own modules still use deprecated pydantic
        warnings.simplefilter("ignore", DeprecationWarning)
        from pipeline.cluster import serve
    return serve


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Registry:
    """Three versions of `digits`: two that work, and one whose network answers NaN."""

    def __init__(self, folder: Path) -> None:
        from pipeline.tracking import client, registry

        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = client.connect(self.uri)
        self.client.create_experiment("digits", artifact_location=str(folder / "artifacts"))
        for seed in (0, 1):
            save_tiny(str(folder / str(seed)), seed)
        broken = {name: torch.full_like(value, torch.nan) for name, value in build(CONFIG).state_dict().items()}
        save(str(folder / "2"), CONFIG, broken, {})
        for number in range(3):
            url = str(folder / str(number))
            registry.register(url, "digits", tracking_uri=self.uri, experiment="digits", alias=f"number{number + 1}")
        self.point(1)

    def point(self, version: int) -> None:
        self.client.set_registered_model_alias("digits", "champion", str(version))
