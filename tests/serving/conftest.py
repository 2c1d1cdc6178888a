"""A small model with random weights, saved and loaded as any other; its card has held-out scores."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.model import Model, load
from pipeline.serving.config import ServingConfig
from pipeline.serving.service import Identity, Service
from tests.serving.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("model") / "tiny")
    save_tiny(url)
    return url


@pytest.fixture(scope="session")
def tiny(tiny_url: str) -> Iterator[Model]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load(tiny_url)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def service(tiny: Model, tiny_url: str) -> Iterator[Service]:
    config = ServingConfig(model=tiny_url, max_images=16, max_steps=64, max_request_bytes=200_000, steps=4)
    made = Service(tiny, config, Identity("tiny", "7", tiny.digest, ("tiny@champion",)))
    yield made
    assert made.close(drain=False, timeout_s=20)


@pytest.fixture
def digits(tmp_path: Path) -> np.ndarray:
    """Three grey 8x8 images, uint8 (3, 8, 8, 1)."""
    return np.random.default_rng(5).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
