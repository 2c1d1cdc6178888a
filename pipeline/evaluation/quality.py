"""Sample quality: does a sample show the class that was asked for, and are samples distributed like held-out images?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.features import Features, Labelled
from pipeline.evaluation.statistics import Compared, Estimate, frechet_compared, wilson

JUDGE_IMAGES = 5_000  # a support vector machine's time grows with the square of them


@dataclass(frozen=True)
class Agreement:
    """share: of the samples that the judge gives the class they were asked for; by_class: the same for each class.

    judge: share of held-out images that the judge gives their own class: what a perfect model would reach.
    """

    share: Estimate
    by_class: tuple[float, ...]
    judge: Estimate


def _pixels(images: Tensor) -> Any:
    return images.flatten(1).numpy().astype(np.float64) / 255


def _thinned(train: Labelled) -> tuple[Tensor, Tensor]:
    """At most JUDGE_IMAGES of them, evenly over the set."""
    if train.labels is None:
        raise ValueError("class agreement needs classes; this set has none")
    count = min(len(train.images), JUDGE_IMAGES)
    rows = torch.arange(count) * len(train.images) // count
    return train.images[rows], train.labels[rows]


def class_agreement(samples: Tensor, asked: Tensor, train: Labelled, held_out: Labelled) -> Agreement:
    """By a support vector machine (RBF kernel, C = 10) trained on the pixels of real training images.

    samples: uint8 (n, C, H, W); asked: (n,) the class each was asked for.
    """
    from sklearn.svm import SVC

    images, labels = _thinned(train)
    judge = SVC(C=10.0, gamma="scale").fit(_pixels(images), labels.numpy())
    right = torch.from_numpy(judge.predict(_pixels(samples))) == asked
    known = torch.from_numpy(judge.predict(_pixels(held_out.images))) == held_out.labels
    by_class = tuple(float(right[asked == c].double().mean()) for c in asked.unique().tolist())
    return Agreement(wilson(int(right.sum()), len(right)), by_class, wilson(int(known.sum()), len(known)))


def frechet_to_held_out(
    samples: Tensor, train: Tensor, held_out: Tensor, features: Features, resamples: int, seed: int
) -> Compared:
    """Distance of samples to held-out images, and as the floor that of training images to held-out images.

    A ratio of 1 is as close to the held-out images as the training images are. All images uint8 (., C, H, W).
    """
    ours, floor, theirs = (features.extract(images) for images in (samples, train, held_out))
    return frechet_compared(ours, floor, theirs, resamples, seed)
