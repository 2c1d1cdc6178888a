"""A gate is passed by a whole interval, and a refusal names it."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.evaluation import gates
from pipeline.evaluation.bits_per_dim import Scores
from pipeline.evaluation.measure import Evaluation
from pipeline.evaluation.memorisation import Memorisation
from pipeline.evaluation.quality import Agreement
from pipeline.evaluation.statistics import Compared, Estimate


def evaluation() -> Evaluation:
    """Bits/dim 3 with a standard error of 0.01, agreement 0.9 (0.85 to 0.94), ratio 1.4 (1.3 to 1.6)."""
    scores = Scores("vlb", tuple(3 + 0.1 * np.tile([1.0, -1.0], 50) * 0.99498744), (0.0,) * 100, {}, 16.0)
    nothing = np.zeros(0)
    return Evaluation(
        {"vlb": scores},
        Agreement(Estimate(0.9, 0.85, 0.94), (0.9,), Estimate(0.99, 0.98, 1.0)),
        Compared(Estimate(14.0, 13.0, 16.0), Estimate(10.0, 9.0, 11.0), Estimate(1.4, 1.3, 1.6)),
        "",
        Memorisation(
            1.0, Estimate(0.0, 0.0, 0.01), Estimate(0.0, 0.0, 0.01), 1.0, nothing, nothing, nothing.astype(int)
        ),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
        None,
    )


@pytest.mark.parametrize(
    ("given", "missed"),
    [
        ({"frechet_ratio": {"at_most": 1.6}}, None),
        ({"frechet_ratio": {"at_most": 1.5}}, "at most 1.5 demanded, found 1.4 (1.3 to 1.6)"),
        ({"class_agreement": {"at_least": 0.85}}, None),
        (
            {"class_agreement": {"at_least": 0.9}},
            "at least 0.9 demanded, found 0.9 (0.85 to 0.94)",
        ),
        ({"bits_per_dim_vlb": {"at_most": 3.02}}, None),
        (
            {"bits_per_dim_vlb": {"at_most": 3.019}},
            "at most 3.019 demanded, found 3 (2.98 to 3.02)",
        ),
        ({"frechet_distance": {"at_most": 17, "at_least": 12}, "near_copies": {"at_most": 0.01}}, None),
    ],
)
def test_the_whole_interval_must_pass(given: dict[str, Any], missed: str | None) -> None:
    found = gates.missed(gates.from_plain(given, "gates.yaml"), evaluation())
    assert found == ([] if missed is None else [f"gate {next(iter(given))}: {missed}"])


def test_every_missed_gate_is_named() -> None:
    both = gates.from_plain({"frechet_ratio": {"at_most": 1}, "class_agreement": {"at_least": 1}}, "gates.yaml")
    assert [line.split(":")[0] for line in gates.missed(both, evaluation())] == [
        "gate frechet_ratio",
        "gate class_agreement",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frechet_ratio": 1.5}, "frechet_ratio must have at_most or at_least, got 1.5"),
        ({"frechet_ratio": {"below": 1.5}}, "frechet_ratio must have at_most or at_least"),
        ({"frechet_ratio": {"at_most": "low"}}, "frechet_ratio: a bound must be a number, got 'low'"),
        ([], "expected lines such as"),
        (None, "expected lines such as"),
    ],
)
def test_a_bad_file_names_the_line(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"gates.yaml: {message}"):
        gates.from_plain(given, "gates.yaml")


def test_a_gate_on_nothing_measured_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"gate 'frechet_ration' .* \(did you mean 'frechet_ratio'"):
        gates.missed(gates.from_plain({"frechet_ration": {"at_most": 1}}, "gates.yaml"), evaluation())
