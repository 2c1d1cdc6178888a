"""Where the Frechet distance is taken: features of a classifier made here of the training images, or of their pixels.

A network trained on photographs (Inception) would need a download and says little about scans of digits or cells; a
classifier of the very classes that the model is asked for sees what matters to them. It is made anew from the training
images and a seed whenever it is needed, the same every time, and is itself measured on held-out images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.diffusion.pixels import Pixels
from pipeline.diffusion.randomness import key_seed, keyed_generator
from pipeline.evaluation.statistics import Floats

WIDTH = 64  # features, and components of pixels at most
BATCH = 64
EPOCHS = 15
STEPS = (300, 2000)  # at least and at most, whatever the number of images
ROWS_AT_ONCE = 1024
PCA_IMAGES = 5_000


@dataclass(frozen=True)
class Labelled:
    """Real images of a split: uint8 (n, C, H, W), and their classes (n,) int64 and tags (n, K), None where the set has
    none."""

    images: Tensor
    labels: Tensor | None
    tags: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """extract: uint8 (n, C, H, W) -> float64 (n, d). about: what they are, for the report.

    accuracy: share of held-out images that the classifier they come from gives their class; None without one.
    """

    extract: Callable[[Tensor], Floats]
    about: str
    accuracy: float | None = None


class Classifier(nn.Module):
    """Convolutions down to 4x4 or below, a hidden layer of `WIDTH` (the features, after its SiLU), and the classes."""

    def __init__(self, channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, stride=1 if max(size) <= 16 else 2, padding=1), nn.SiLU()]
        (height, across), width = size if max(size) <= 16 else _halved(size), 32
        while max(height, across) > 4:
            layers += [nn.Conv2d(width, 64, 3, stride=2, padding=1), nn.SiLU()]
            (height, across), width = _halved((height, across)), 64
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * across, WIDTH), nn.SiLU())
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, C, H, W) in model space -> logits (n, classes)."""
        return self.head(self.body(x))


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    """What a convolution of stride 2 leaves of (height, width)."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def train_classifier(train: Labelled, classes: int, seed: int) -> Classifier:
    """A classifier of the training images; the same weights for the same images, seed and thread count."""
    if train.labels is None or not judgeable(train.labels):
        raise ValueError(
            f"evaluation.features 'classifier' needs at least two classes; the training images have "
            f"{0 if train.labels is None else 1}: use pixels or auto"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed("classifier", seed))
        net = Classifier(train.images.shape[1], (train.images.shape[2], train.images.shape[3]), classes)
    x, labels, n = _values(train.images), train.labels, len(train.images)
    parameters = list(net.parameters())
    steps = min(max(EPOCHS * n // BATCH, STEPS[0]), STEPS[1])
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    law = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = keyed_generator("classifier-order", seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(n, (BATCH,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), labels[rows]).backward()
            optimizer.step()
            law.step()
    return net.eval().requires_grad_(False)


def _values(images: Tensor) -> Tensor:
    """uint8 (n, C, H, W) -> what the classifier sees."""
    return Pixels((images.shape[1], images.shape[2], images.shape[3])).encode(images)


def classifier_features(train: Labelled, held_out: Labelled, classes: int, seed: int) -> Features:
    """The classifier's last hidden layer."""
    net = train_classifier(train, classes, seed)

    @torch.no_grad()
    def extract(images: Tensor) -> Floats:
        parts = [net.body(_values(rows)) for rows in images.split(ROWS_AT_ONCE)]
        return torch.cat(parts).double().numpy()

    @torch.no_grad()
    def right() -> float:
        found = torch.cat([net(_values(rows)).argmax(1) for rows in held_out.images.split(ROWS_AT_ONCE)])
        return float((found == held_out.labels).double().mean())

    return Features(extract, f"last hidden layer ({WIDTH} units) of a classifier of the training images", right())


def pixel_features(train: Labelled, seed: int = 0) -> Features:
    """Principal components of the training images' pixels (grey levels / 255), at most `WIDTH`; of `PCA_IMAGES` of
    them, evenly over the set, by the randomised method where images are large: 64x64 colour has 12,288 dimensions.
    """
    from sklearn.decomposition import PCA

    count = min(len(train.images), PCA_IMAGES)
    chosen = train.images[torch.arange(count) * len(train.images) // count]
    components = min(WIDTH, count, chosen[0].numel())
    pca = PCA(components, random_state=key_seed("pixels", seed) % 2**32).fit(_grey_levels(chosen))

    def extract(images: Tensor) -> Floats:
        return np.concatenate([pca.transform(_grey_levels(rows)) for rows in images.split(ROWS_AT_ONCE)])

    return Features(extract, f"first {components} principal components of the training images' pixels")


def _grey_levels(images: Tensor) -> Floats:
    """uint8 (n, C, H, W) -> (n, C H W), 0..1."""
    return images.flatten(1).double().numpy() / 255


def judgeable(labels: Tensor | None) -> bool:
    """Whether there are classes to tell apart: at least two among the images."""
    return labels is not None and len(labels.unique()) > 1


def features_of(kind: str, train: Labelled, held_out: Labelled, classes: int, seed: int) -> Features:
    """kind: 'classifier', 'pixels', or 'auto': a classifier where there are at least two classes.

    Raises:
        ValueError: a classifier of a set of fewer than two classes.
    """
    if kind == "classifier" or (kind == "auto" and classes > 1 and judgeable(train.labels)):
        return classifier_features(train, held_out, classes, seed)
    return pixel_features(train, seed)
