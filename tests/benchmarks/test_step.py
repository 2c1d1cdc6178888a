"""The step benchmark runs, finds two networks that are the same, and keeps its record; a small case of its bars."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.benchmark import step

RESULTS = Path(__file__).parent / "results"


@pytest.mark.slow
def test_a_comparison_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "found.json"
    options = ["--model", "tiny_unet", "--batch", "2", "--rounds", "3", "--contestants", "ours,diffusers"]
    assert step.main([*options, "--json", str(record)]) == 0
    found = json.loads(record.read_text())
    ours, theirs = found["contestants"]["ours"], found["contestants"]["diffusers"]
    assert ours["parameters"] == theirs["parameters"]
    assert ours["flops_per_image"] == pytest.approx(theirs["flops_per_image"], rel=0.02)
    assert len(ours["rounds_s"]) == len(theirs["rounds_s"]) == 3
    assert ours["versions"]["torch"] == found["machine"]["torch"]
    assert theirs["ours_is_times_as_fast"] > 1, "small steps are all overhead: nowhere is the lead as large"
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--contestants", "nobody"]])
def test_what_cannot_be_measured_is_refused(wrong: list[str]) -> None:
    options = ["--model", "tiny_unet", "--batch", "1", "--contestants", "conv3x3_kept_nhwc"]
    with pytest.raises(ValueError, match=r"at least 1|ended with exit code"):
        step.main([*options, *wrong])


BARE = """
import sys
absent = 'ray mlflow boto3 pyarrow cv2 PIL pydantic omegaconf rich sklearn diffusers accelerate scipy webdataset'
sys.modules.update(dict.fromkeys(absent.split()))
from jobs.benchmark import step
sys.exit(step.main(['--worker', 'ours', '--model', 'tiny_unet', '--batch', '2']))
"""


def test_it_needs_torch_and_little_else() -> None:
    run = subprocess.run(
        [sys.executable, "-c", BARE], cwd=step.ROOT, input="go\ncount\n", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    said, took, counted = (json.loads(line) for line in run.stdout.splitlines())
    assert said["parameters"] > 0
    assert took["wall_s"] > 0
    assert counted["flops_per_image"] > 1e6


def test_the_record_in_the_tree_is_of_equal_networks() -> None:
    found = json.loads((RESULTS / "step_cpu.json").read_text())
    rows = found["contestants"]
    assert found["model"] == "base32"
    assert found["rounds"] >= 9
    assert rows["ours"]["parameters"] == rows["diffusers"]["parameters"]
    for peer in ("diffusers", "lucidrains"):
        assert rows["ours"]["flops_per_image"] == pytest.approx(rows[peer]["flops_per_image"], rel=0.02)
    assert rows["diffusers"]["ours_is_times_as_fast"] >= step.BARS["diffusers"]
    assert rows["lucidrains"]["ours_is_times_as_fast"] >= step.BARS["lucidrains"]
