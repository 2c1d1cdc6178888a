"""Near-copies: found where they are planted, not found where there are none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.memorisation import memorisation, nearest
from tests.evaluation.tiny import noise_images


@given(seed=st.integers(0, 1000), n=st.integers(1, 20), m=st.integers(1, 1500))
@settings(max_examples=20, deadline=None)
def test_nearest_is_brute_force(seed: int, n: int, m: int) -> None:
    images, known = noise_images(n, seed, (2, 3, 3)), noise_images(m, seed + 1, (2, 3, 3))
    found = nearest(images, known)
    squares = (images[:, None].double() - known[None].double()).flatten(2).square().mean(2)
    np.testing.assert_allclose(found.distance, squares.min(1).values.sqrt().numpy(), rtol=1e-12)


def test_a_copy_is_at_exactly_zero() -> None:
    known = noise_images(3000, 1)
    found = nearest(known[2500:2510], known)
    assert found.distance.tolist() == [0.0] * 10
    assert found.index.tolist() == list(range(2500, 2510))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        nearest(noise_images(2, 0), noise_images(2, 0, (3, 8, 8)))
    with pytest.raises(ValueError, match="shape"):
        nearest(noise_images(2, 0), noise_images(0, 0))


def test_fresh_images_are_no_near_copies_and_planted_ones_are() -> None:
    train, held_out, fresh = noise_images(500, 1), noise_images(200, 2), noise_images(100, 3)
    clean = memorisation(fresh, train, held_out, 0.01)
    assert clean.held_out_share.value == pytest.approx(0.01, abs=0.005)
    assert not clean.copies
    assert clean.median_ratio == pytest.approx(1, abs=0.03)
    copies = fresh.clone()
    copies[:30] = train[40:70]
    copies[:30, 0, 0, 0] ^= 1  # the last bit of a pixel
    planted = memorisation(copies, train, held_out, 0.01)
    assert planted.share.value == pytest.approx(0.3, abs=0.04)
    assert planted.share.low > clean.share.high
    assert planted.copies
    assert torch.equal(torch.from_numpy(planted.index[:30]), torch.arange(40, 70))
