"""A tiny class-conditional model and three easy classes of images, for tests of evaluation."""

import torch
from torch import Tensor

from pipeline.diffusion.randomness import keyed_generator
from pipeline.evaluation.features import Labelled
from pipeline.model import Model, ModelConfig, build

CLASSES, SIZE = 3, 8
CONFIG = ModelConfig(
    size=SIZE,
    channels=1,
    classes=CLASSES,
    network={"name": "unet", "base_width": 8, "multipliers": (1,), "blocks": 1, "attention_at": (), "dropout": 0.0},
    schedule={"name": "linear_gamma", "gamma_min": -10.0, "gamma_max": 5.0},
    prediction="v",
    level="normalised_gamma",
)


def tiny_model(seed: int = 0) -> Model:
    """Untrained, but with no zero layer: its answers depend on image, level and label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = build(CONFIG)
        for parameter in denoiser.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return Model(CONFIG, denoiser)


def stripes(n: int, seed: int) -> Labelled:
    """Class c is bright in its own third of the rows, under noise: uint8 (n, 1, 8, 8)."""
    generator = keyed_generator("stripes", seed)
    labels = torch.arange(n) % CLASSES
    images = torch.randint(0, 90, (n, 1, SIZE, SIZE), generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, :, 3 * label : 3 * label + 2] += 150
    return Labelled(images.byte(), labels)


def noise_images(n: int, seed: int, shape: tuple[int, ...] = (1, SIZE, SIZE)) -> Tensor:
    return torch.randint(0, 256, (n, *shape), generator=keyed_generator("noise-images", seed)).byte()
