"""Ranges declared beside a type are checked, named in the error and shown by the help, whatever section they are in."""

import math
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from pipeline.config import ClusterConfig, describe
from pipeline.data.config import ShardConfig, StreamConfig
from pipeline.evaluation.config import EvaluationConfig
from pipeline.model import ModelConfig
from pipeline.ranges import Range, range_of
from pipeline.serving.config import ServingConfig
from pipeline.training.config import TrainingConfig

NEEDED: dict[type, dict[str, Any]] = {
    ShardConfig: {"source": "/images", "url": "/shards"},
    StreamConfig: {"url": "/shards"},
    ModelConfig: {"size": 8},
    **{key: dict[str, Any]() for key in (TrainingConfig, ClusterConfig, EvaluationConfig, ServingConfig)},
}


def declared(cls: Any) -> dict[str, Range]:
    hints = get_type_hints(cls, include_extras=True)
    found = {field.name: range_of(hints[field.name]) for field in fields(cls)}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


def outside(allowed: Range) -> list[float]:
    lowest, highest = allowed.ge, allowed.le
    beyond = [math.nan, allowed.gt, allowed.lt]
    beyond += [None if lowest is None else lowest - 1, None if highest is None else highest + 1]
    return [value for value in beyond if value is not None]


@pytest.mark.parametrize("cls", NEEDED)
def test_what_lies_outside_is_refused_by_name(cls: Any) -> None:
    ranges, needed = declared(cls), NEEDED[cls]
    assert ranges
    for name, allowed in ranges.items():
        hint = str(get_type_hints(cls)[name])
        for value in outside(allowed):
            given = (value, value) if "tuple" in hint and "int |" not in hint else value
            with pytest.raises(ValueError, match=f"{name} must (be|lie) ") as caught:
                cls(**{**needed, name: given})
            assert f"{allowed}" in str(caught.value)


def test_help_shows_the_ranges() -> None:
    lines = describe().splitlines()
    for cls in NEEDED:
        for name, allowed in declared(cls).items():
            assert any(f".{name} " in line and f" ({allowed}) [" in line for line in lines), (cls, name)


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (Range(ge=1), "at least 1"),
        (Range(ge=0), "0 or more"),
        (Range(gt=0), "positive"),
        (Range(gt=1), "above 1"),
        (Range(le=3), "at most 3"),
        (Range(lt=3), "below 3"),
        (Range(ge=0, lt=1), "in [0, 1)"),
        (Range(gt=0, le=1), "in (0, 1]"),
    ],
)
def test_a_range_in_words(allowed: Range, text: str) -> None:
    assert str(allowed) == text
    assert math.nan not in allowed
