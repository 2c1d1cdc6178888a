"""jobs.register: what is refused, and a model for another library on the way."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs import register
from pipeline.config import RunConfig, to_yaml
from pipeline.model import ModelConfig, build, save
from pipeline.tracking.client import connect
from tests.cluster.test_train import run_config
from tests.evaluation.test_gates import evaluation
from tests.test_interchange import CONFIG
from tests.tracking.database import database

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own use of its libraries
]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run that was trained, its experiment there."""
    made = run_config(tmp_path / "run", "data")
    model: ModelConfig = CONFIG
    card = {"images_seen": 640, "data": {"digest": "d" * 64}, "version": "0", "class_names": []}
    save(f"{made.output}/model", model, build(model).state_dict(), card)
    return replace(made, model=model, tracking=replace(made.tracking, uri=database()))


def test_a_missed_gate_refuses_and_a_passed_one_registers(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text("bits_per_dim_vlb: {at_most: 2.9}\nclass_agreement: {at_least: 0.8}\n")
    with pytest.raises(ValueError, match=r"small is not registered: gate bits_per_dim_vlb: at most 2\.9 demanded"):
        register.run(config, evaluation(), required=register.load_gates(str(file)))
    assert not connect(config.tracking.uri).search_registered_models("name = 'small'")
    file.write_text("bits_per_dim_vlb: {at_most: 3.1}\n")
    version = register.run(config, evaluation(), "challenger", register.load_gates(str(file)))
    found = connect(config.tracking.uri).get_model_version_by_alias("small", "challenger")
    assert int(found.version) == version.version == 1


def test_export_for_diffusers_through_the_job(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    (tmp_path / "run.yaml").write_text(to_yaml(config))
    arguments = [str(tmp_path / "run.yaml"), "--unmeasured", "--export", "diffusers", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["register", *arguments])
    with pytest.raises(SystemExit) as ended:
        register.main()
    assert ended.value.code == 0, capsys.readouterr()
    pipe = DDPMPipeline.from_pretrained(str(tmp_path / "out"))
    state = build(config.model).state_dict()
    ours = sum(t.numel() for t in state.values() if t.is_floating_point())
    theirs = sum(p.numel() for p in pipe.unet.parameters())
    assert 0 < theirs <= ours
    assert all(torch.isfinite(p).all() for p in pipe.unet.parameters())


def test_gates_need_an_evaluation(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    (tmp_path / "gates.yaml").write_text("frechet_ratio: {at_most: 2}\n")
    gate = ["--gates", str(tmp_path / "gates.yaml")]
    monkeypatch.setattr(sys, "argv", ["register", str(tmp_path / "run.yaml"), "--unmeasured", *gate])
    with pytest.raises(SystemExit) as ended:
        register.main()
    assert ended.value.code == 2
    assert "--gates needs an evaluation" in capsys.readouterr().err
