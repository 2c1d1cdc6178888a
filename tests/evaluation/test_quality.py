"""Class agreement and Frechet distance on images whose classes and differences are known."""

import numpy as np
import pytest
import torch

from pipeline.evaluation.features import Features, Labelled, classifier_features, features_of, pixel_features
from pipeline.evaluation.quality import class_agreement, frechet_to_held_out
from tests.evaluation.tiny import CLASSES, noise_images, stripes

TRAIN, HELD_OUT = stripes(300, 1), stripes(120, 2)


@pytest.fixture(scope="module")
def features() -> Features:
    return classifier_features(TRAIN, HELD_OUT, CLASSES, 0)


def test_agreement_counts_the_asked_class() -> None:
    samples = stripes(90, 3)
    assert samples.labels is not None
    right = class_agreement(samples.images, samples.labels, TRAIN, HELD_OUT)
    assert right.share.value == right.judge.value == 1.0
    assert right.by_class == (1.0, 1.0, 1.0)
    asked = samples.labels.clone()
    asked[:9] = (asked[:9] + 1) % CLASSES
    wrong = class_agreement(samples.images, asked, TRAIN, HELD_OUT)
    assert wrong.share.value == pytest.approx(0.9)
    assert sum(wrong.by_class) / CLASSES == pytest.approx(0.9, abs=0.01)


def test_agreement_needs_classes() -> None:
    samples = stripes(9, 3)
    assert samples.labels is not None
    with pytest.raises(ValueError, match="needs classes"):
        class_agreement(samples.images, samples.labels, Labelled(TRAIN.images, None), HELD_OUT)


def test_features_are_the_same_every_time_and_leave_the_global_stream_alone(features: Features) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = classifier_features(TRAIN, HELD_OUT, CLASSES, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert features.accuracy == again.accuracy == 1.0
    np.testing.assert_allclose(features.extract(HELD_OUT.images), again.extract(HELD_OUT.images), atol=1e-3)
    assert features.extract(HELD_OUT.images).shape == (120, 64)


@pytest.mark.parametrize("kind", ["classifier", "pixels"])
def test_distance_tells_real_from_noise_and_from_a_missing_class(kind: str, features: Features) -> None:
    used = features if kind == "classifier" else pixel_features(TRAIN)

    def ratio(samples: torch.Tensor) -> float:
        return frechet_to_held_out(samples, TRAIN.images, HELD_OUT.images, used, 10, 0).ratio.value

    real = stripes(300, 4)
    assert real.labels is not None
    same = ratio(real.images)
    assert same < 2
    assert ratio(real.images[real.labels != 0]) > 5 * same
    assert ratio(noise_images(300, 5)) > 10 * same


def test_a_set_without_classes_is_measured_by_its_pixels() -> None:
    train, held_out = Labelled(TRAIN.images, None), Labelled(HELD_OUT.images, None)
    auto = features_of("auto", train, held_out, 0, 0)
    assert "pixels" in auto.about
    assert auto.accuracy is None
    with pytest.raises(ValueError, match="at least two classes"):
        features_of("classifier", train, held_out, 0, 0)
