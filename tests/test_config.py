"""The run file: complete, typed, strict, and its errors name what and where."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import describe, from_plain, load_config, to_plain, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "jobs" / "configs").glob("*.yaml"))
DIGITS = str(Path(__file__).parent.parent / "jobs" / "configs" / "digits.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_run_file_loads_and_round_trips(path: Path) -> None:
    config = load_config(str(path))
    assert from_plain(to_plain(config)) == config
    assert from_plain(yaml.safe_load(to_yaml(config))) == config


def test_overrides_are_typed() -> None:
    config = load_config(DIGITS, ["training.learning_rate=1e-3", "cluster.workers=1", "model.schedule.s=0.01"])
    assert config.training.learning_rate == 1e-3
    assert config.cluster.workers == 1


def test_another_choice_drops_the_options_of_the_old_one() -> None:
    wanted = {"name": "flow", "gamma_max": 12}
    assert load_config(DIGITS, ["model.schedule={name: flow, gamma_max: 12}"]).model.schedule == wanted
    one_by_one = ["model.schedule.gamma_max=12", "model.schedule.name=flow"]  # in any order
    assert load_config(DIGITS, one_by_one).model.schedule == wanted
    assert load_config(DIGITS, one_by_one[::-1]).model.schedule == wanted
    assert load_config(DIGITS, ["model={schedule: {name: flow, gamma_max: 12}}"]).model.schedule == wanted


def test_the_same_choice_keeps_its_other_options() -> None:
    for override in ("model.network={base_width: 48}", "model.network={name: unet, base_width: 48}"):
        network = load_config(DIGITS, [override]).model.network
        assert (network["base_width"], network["head_width"]) == (48, 16)


def test_a_table_of_names_is_replaced_and_a_section_changed() -> None:
    """Also within a section that is given as a mapping; a path into a table changes that one name."""

    def estimators(*overrides: str) -> dict[str, dict[str, object]]:
        return load_config(DIGITS, overrides).evaluation.estimators

    both = {"vlb": {"levels": 64}, "ode": {"tolerance": 3e-3}}
    assert estimators() == both
    assert estimators("evaluation.estimators={vlb: {levels: 8}}") == {"vlb": {"levels": 8}}
    assert estimators("evaluation={estimators: {vlb: {}}}") == {"vlb": {}}
    assert estimators("evaluation.estimators={}") == {}
    assert estimators("evaluation.estimators.vlb.levels=8") == {**both, "vlb": {"levels": 8}}
    assert estimators("evaluation.estimators.vlb={control: false}") == {**both, "vlb": {"control": False}}
    assert estimators("evaluation.estimators={ode: {}}", "evaluation.estimators.ode.probes=2") == {"ode": {"probes": 2}}
    config = load_config(DIGITS, ["shard.mixture={a: 1, b: 2}", "shard.mixture={c: 1}", "evaluation={samples: 50}"])
    assert config.shard.mixture == {"c": 1}
    assert (config.evaluation.samples, config.evaluation.min_agreement) == (50, 0.95)
    config = load_config(DIGITS, ["evaluation.sampling={options: {eta: 1.0}}", "evaluation.sampling.options={}"])
    assert (config.evaluation.sampling.options, config.evaluation.sampling.steps) == ({}, 20)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", r"unknown key 'learning_rat' in section 'training' \(did you mean 'learning_rate'"),
        ("trainig.images=1", r"unknown key 'trainig' at the top \(did you mean 'training'"),
        ("training.images=many", r"training\.images: .*integer.*got 'many'"),
        ("cluster.workers=0", r"cluster\.workers must be at least 1, got 0"),
        ("training=5", r"'training' is a section"),
        ("nonsense", r"'nonsense' is not an override"),
        ("training.images={", r"override 'training.images=\{' has no valid value"),
        ("training.images.most=1", r"training\.images: .*integer"),
        ("name=../etc", r"name must be letters"),
    ],
)
def test_bad_overrides_name_what_and_where(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(DIGITS, [override])


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run file"):
        load_config(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(str(broken))
    broken.write_text("- 1")
    with pytest.raises(ValueError, match="expected sections"):
        load_config(str(broken))


def test_help_has_every_key_with_its_meaning() -> None:
    text = describe()
    for line in text.splitlines():
        if line.startswith("  "):
            assert len(line.split("[")[0].split(None, 1)[1]) > 5, f"no meaning: {line}"
    for key in ("training.images", "stream.batch_size", "cluster.workers", "tracking.uri", "model.prediction"):
        assert key in text
