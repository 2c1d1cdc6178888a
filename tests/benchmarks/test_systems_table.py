"""`python -m jobs.benchmark`: its table of benchmarks, and the comparison of systems at a small size."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.benchmark import __main__ as benchmark
from jobs.benchmark import systems
from pipeline.config import load_config
from pipeline.diffusion.likelihood.estimators import ESTIMATORS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of its libraries
ROOT = Path(__file__).parents[2]
NETWORK = "{name: unet, base_width: 8, multipliers: [1, 2], blocks: 1, attention_at: []}"


def small(folder: Path) -> list[str]:
    """Seconds a system."""
    return [
        f"shard.source={folder}/images",
        f"shard.url={folder}/shards",
        f"stream.url={folder}/shards",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        f"model.network={NETWORK}",
        "training.images=512",
        "training.evaluate_images=0",
        "training.sample_images=0",
        "evaluation.samples=20",
        "evaluation.images=20",
        "evaluation.resamples=5",
        "evaluation.features=pixels",
        "evaluation.sampling.steps=4",
        "evaluation.estimators={vlb: {levels: 4}, vlb_discrete: {terms: 4}, ddim_bound: {terms: 4}}",
        "evaluation.estimators.ode.tolerance=0.3",
    ]


def command(folder: Path, *arguments: str) -> int:
    places = ["--runs", f"{folder}/runs", "--results", f"{folder}/results"]
    return benchmark.main(["systems", *arguments, *places, *small(folder)])


def rows_of(folder: Path) -> list[str]:
    return (folder / "results" / "systems.md").read_text().splitlines()


def test_two_systems_are_trained_evaluated_and_tabled_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(tmp_path, "--only", "ddpm,edm", "--side-by-side", "1") == 0
    found = json.loads((tmp_path / "results" / "systems.json").read_text())
    assert found["images_seen"] == 512
    assert list(found["systems"]) == ["ddpm", "edm"]
    table = rows_of(tmp_path)
    for name, title in (("ddpm", "DDPM"), ("edm", "EDM")):
        metrics = found["systems"][name]["metrics"]
        line = next(line for line in table if line.startswith(f"| {title} |"))
        for estimator in ESTIMATORS:
            value, error = (metrics[f"held_out_bits_per_dim_{estimator}{end}"] for end in ("", "_standard_error"))
            assert 0 < error < value
            assert f"{value:.3f} ± {error:.3f}" in line
    capsys.readouterr()

    left: list[systems.System] = []
    monkeypatch.setattr(systems, "_one_by_one", left.extend)
    assert command(tmp_path, "--only", "edm", "--side-by-side", "1") == 0
    assert left == []  # it is there already
    assert rows_of(tmp_path)[2].startswith("| EDM | **")


@pytest.mark.slow
def test_side_by_side_finds_what_one_by_one_finds(tmp_path: Path) -> None:
    assert command(tmp_path / "a", "--only", "vdm,iddpm_vlb", "--side-by-side", "1") == 0
    assert command(tmp_path / "b", "--only", "vdm,iddpm_vlb", "--side-by-side", "2") == 0
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def test_an_empty_cell_says_why() -> None:
    (system,) = systems.load_systems(["ddpm"], [], None)
    config = replace(system.config, evaluation=replace(system.config.evaluation, estimators={"vlb": {}}))
    (first, *_) = systems.reasons([replace(system, config=config)])
    assert first == "DDPM: no 'vlb_discrete', which evaluation.estimators of its run file does not ask for"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "edn"], "did you mean 'edm'"),
        (["--side-by-side", "0"], "--side-by-side"),
        (["output=here"], "use --runs FOLDER"),
        (["model.siz=8"], "did you mean 'size'"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["systems", *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def test_systems_that_are_not_alike_are_refused() -> None:
    a, b = systems.load_systems(["ddpm", "edm"], [], None)
    systems.check_alike([a, b])

    def other(*overrides: str) -> list[systems.System]:
        file = str(ROOT / "jobs" / "configs" / "digits_edm.yaml")
        return [a, systems.System("edm", [], load_config(file, overrides))]

    for override, named in {
        "training.images=10": "training.images",
        "stream.batch_size=32": "stream.batch_size",
        "model.network.base_width=64": "model.network",
        "evaluation.samples=30": "evaluation.samples",
    }.items():
        with pytest.raises(ValueError, match=named):
            systems.check_alike(other(override))
    with pytest.raises(ValueError, match="networks of one size"):
        systems.check_alike(
            other("model.network.fourier_exponents=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]")
        )


def test_a_failed_job_is_named_and_stops_the_others(tmp_path: Path) -> None:
    heard: list[tuple[str, str]] = []
    workers = systems.Workers(1, lambda name, line: heard.append((name, line)))
    with pytest.raises(ValueError, match=r"ddpm: jobs\.train ended with 2: error: no run file at nothing\.yaml"):
        workers.job("ddpm", "train", str(tmp_path / "nothing.yaml").replace(f"{tmp_path}/", ""), "--local")
    assert heard[-1][1].startswith("error: ")
    with pytest.raises(KeyboardInterrupt):
        workers.job("edm", "train")


# --- the table of benchmarks ---------------------------------------------------------------------------------------


def test_benchmarks_are_listed_and_a_wrong_name_finds_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in benchmark.BENCHMARKS)
    assert benchmark.main(["sistems"]) == 2
    assert "did you mean 'systems'?" in capsys.readouterr().err


def test_nothing_is_imported_before_a_benchmark_is_chosen() -> None:
    def loaded(code: str) -> set[str]:
        code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        return set(done.stdout.split())

    at_start = loaded("")  # hooks of an editable installation
    ours = loaded("import jobs.benchmark.__main__ as b; b.main(['nothing'])")
    assert {"jobs", "pipeline"} <= ours
    assert ours - at_start - {"jobs", "pipeline"} <= set(sys.stdlib_module_names)
