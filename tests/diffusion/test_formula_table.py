"""Every setting in the table "from formula to option" exists, and is what a run file takes."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline.diffusion
from pipeline.choose import build
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.objectives.objective import OBJECTIVES, WEIGHTS
from pipeline.diffusion.parameterization import PREDICTIONS
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.evaluation.config import EvaluationConfig
from pipeline.model import Model, ModelConfig, Sampling
from pipeline.model import build as build_model

TABLE = (Path(inspect.getfile(pipeline.diffusion)).parent / "README.md").read_text(encoding="utf-8")
SETTINGS = [yaml.safe_load(text) for text in re.findall(r"`((?:model|objective|sampling|estimators): \{.*?\})`", TABLE)]
TINY: dict[str, Any] = {"name": "unet", "base_width": 32, "multipliers": [1], "blocks": 1, "attention_at": []}


def of(section: str) -> list[dict[str, Any]]:
    return [setting[section] for setting in SETTINGS if section in setting]


def model(**asked: Any) -> Model:
    config = ModelConfig(**{"size": 8, "channels": 1, "network": TINY, **asked})
    return Model(config, build_model(config))


def test_every_line_has_a_setting() -> None:
    lines = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| Equation")]
    assert len(lines) > 50
    for line in lines:
        assert re.search(r"`(model|objective|sampling|estimators): \{", line), line


@pytest.mark.parametrize("asked", of("model"), ids=str)
def test_models_of_the_table_are_built(asked: dict[str, Any]) -> None:
    model(**asked)


@pytest.mark.parametrize("asked", of("objective"), ids=str)
def test_objectives_of_the_table_are_built(asked: dict[str, Any]) -> None:
    build(OBJECTIVES, asked, "objective")


@pytest.mark.parametrize("asked", of("sampling"), ids=str)
def test_samplings_of_the_table_start(asked: dict[str, Any]) -> None:
    """By the model that each is for: a table of steps, or the SDE's own law; a wide one where 1,000 levels are few."""
    sde = asked.get("options", {}).get("sde")
    law = {"name": sde} if sde else {"name": "linear_beta"}
    variance = asked.get("options", {}).get("variance") == "learned"
    made = model(schedule=law, scaling=sde or "vp", learned_variance=variance)
    next(made.sampling([0], how=Sampling(**asked)))


@pytest.mark.parametrize("asked", of("estimators"), ids=str)
def test_estimators_of_the_table_have_the_options(asked: dict[str, Any]) -> None:
    for name, options in asked.items():
        assert set(options) <= set(ESTIMATORS[name].options)


def test_the_table_names_everything_there_is() -> None:
    assert {asked["schedule"]["name"] for asked in of("model") if "schedule" in asked} == set(SCHEDULES)
    assert {asked.get("prediction") for asked in of("model")} == {*PREDICTIONS, "mean", None}
    assert {asked["name"] for asked in of("objective")} == set(OBJECTIVES)
    assert {asked["sampler"] for asked in of("sampling")} == set(SAMPLERS)
    assert {name for asked in of("estimators") for name in asked} == set(ESTIMATORS)
    assert {"formula", "table"} <= {asked.get("weight") for asked in of("objective")} - {None} <= set(WEIGHTS)
    assert {"sampling", "estimators"} <= {field.name for field in fields(EvaluationConfig)}
