"""An image's value does not depend on what it is scored with."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.likelihood.estimate import Likelihood
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from tests.diffusion.likelihood_cases import estimate, grey_images, small_denoiser

# every estimator of the table with the options that draw, learn or adapt
CASES: list[tuple[str, dict[str, Any]]] = [
    ("vlb", {"levels": 8}),
    ("vlb", {"levels": 5, "decoder": "gaussian"}),
    ("vlb_discrete", {"steps": 12}),
    ("vlb_discrete", {"steps": 200, "terms": 6, "variance": "learned", "decoder": "gaussian"}),
    ("ddim_bound", {"steps": 100, "terms": 5, "eta": 0.8}),
    ("ode", {"tolerance": 1e-2}),
    ("ode", {"tolerance": 1e-2, "samples": 2, "probes": 2, "decoder": "gaussian"}),
    ("ode", {"tolerance": 1e-2, "trace": "fixed", "solver": "dopri5"}),
    ("ode", {"tolerance": 1e-2, "dequantisation": "uniform", "samples": 2, "importance": True}),
]
SIZES = (64, 7, 1)


def in_batches(name: str, options: dict[str, Any], size: int, count: int, chunk: int | None) -> list[Likelihood]:
    x = grey_images(count, 5, channels=3)  # 75 numbers an image: no multiple of a vector register
    denoiser = small_denoiser(3, learned_variance="learned" in options.values())
    results: list[Likelihood] = []
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        labels = Conditioning(torch.arange(count)[rows] % 11 - 1)
        seeds = [1000 + row for row in range(rows.start, rows.stop)]
        results.append(estimate(name, denoiser, x[rows], seeds=seeds, conditioning=labels, chunk=chunk, **options))
    return results


def joined(results: list[Likelihood]) -> dict[str, Tensor]:
    columns = [
        {
            "nats": r.nats,
            "evaluations": r.evaluations,
            **r.parts,
            **{f"error {k}": v for k, v in r.standard_errors.items()},
        }
        for r in results
    ]
    return {key: torch.cat([column[key] for column in columns]) for key in columns[0]}


def test_every_estimator_has_a_case() -> None:
    assert {name for name, _ in CASES} == set(ESTIMATORS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_bits_are_equal_in_batches_of_1_7_and_64(name: str, options: dict[str, Any]) -> None:
    """Under the policy of fixed call shapes: `drive(..., chunk=c)`."""
    whole = joined(in_batches(name, options, 64, 64, chunk=16))
    for size in (7, 1):
        count = 64 if size == 7 else 10
        parts = joined(in_batches(name, options, size, count, chunk=16))
        for key, values in parts.items():
            assert torch.equal(values.nan_to_num(-1), whole[key][:count].nan_to_num(-1)), (size, key)


@pytest.mark.parametrize(
    ("name", "side", "channels", "options"),
    [
        ("vlb", 1, 3, {"levels": 7}),
        ("vlb", 3, 1, {"levels": 7}),
        ("vlb", 5, 1, {"levels": 7}),
        ("vlb_discrete", 3, 3, {"steps": 30, "terms": 4}),
        ("ode", 3, 1, {"samples": 2, "tolerance": 0.3}),
    ],
)
def test_draws_do_not_depend_on_how_many_levels_are_asked_at_once(
    name: str, side: int, channels: int, options: dict[str, Any]
) -> None:
    """Images of 3, 9, 25 and 27 numbers, fewer than and no multiple of the 16 that torch draws at once.

    The bound asks as many levels at once as its rows hold, which depends on the number of images.
    """
    x, denoiser = grey_images(9, side, channels), small_denoiser(channels)
    labels = Conditioning(torch.arange(9))
    given = options if name == "ode" else {**options, "rows": 20}

    def scored(start: int, stop: int) -> Tensor:
        told, seeds = labels[torch.arange(start, stop)], range(start, stop)
        return estimate(name, denoiser, x[start:stop], seeds=seeds, conditioning=told, chunk=4, **given).nats

    whole = scored(0, 9)
    assert torch.equal(torch.cat([scored(0, 2), scored(2, 9)]), whole)
    assert torch.equal(torch.cat([scored(row, row + 1) for row in range(9)]), whole)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_values_agree_without_the_policy(name: str, options: dict[str, Any]) -> None:
    """Within ten times the solver's tolerance, nats a dimension."""
    whole = joined(in_batches(name, options, 14, 14, chunk=None))["nats"]
    parts = joined(in_batches(name, options, 3, 14, chunk=None))["nats"]
    assert float((whole - parts).abs().max()) / 75 < 10 * options.get("tolerance", 1e-6)


def test_seeds_make_the_draws() -> None:
    x = grey_images(2, 5, channels=3)
    labels = Conditioning(torch.tensor([1, 1]))
    for name in ESTIMATORS:
        options: dict[str, Any] = {"steps": 20} if name in ("vlb_discrete", "ddim_bound") else {}
        one, again, other = (
            estimate(name, small_denoiser(3), x, seeds=seeds, conditioning=labels, **options).nats
            for seeds in ((1, 2), (1, 2), (3, 2))
        )
        assert torch.equal(one, again)
        assert float(one[0]) != float(other[0])


def test_seeds_must_be_as_many_as_images() -> None:
    for name in ESTIMATORS:
        with pytest.raises(ValueError, match="2 images need as many noise seeds, got 3"):
            estimate(name, small_denoiser(), grey_images(2, 4), seeds=(1, 2, 3))
        with pytest.raises(ValueError, match="n at least 1"):
            estimate(name, small_denoiser(), grey_images(2, 4)[:0], seeds=())
