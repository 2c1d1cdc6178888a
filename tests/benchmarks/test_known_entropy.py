"""Known entropy: the benchmark's parts on a small case; the whole bar, trained, behind `slow`.

pytest -m slow -s tests/benchmarks/test_known_entropy.py
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.benchmark import known_entropy
from jobs.benchmark.known_entropy import BARS, BOUND, FLOW, Gap, Training, missed, score, train
from pipeline.diffusion.oracles.fields import FIELDS
from pipeline.model import build


def gap(value: float, error: float = 0.001) -> Gap:
    return Gap(100, 5.0 + value, 5.0, value, error, 64.0, 1.0)


def test_the_network_is_small_and_convolutional() -> None:
    torch.manual_seed(0)
    denoiser = build(known_entropy.MODEL)
    assert sum(p.numel() for p in denoiser.parameters()) <= 150_000
    assert (denoiser.schedule.gamma_min, denoiser.schedule.gamma_max) == (-13.3, 5.0)


def test_a_short_training_lowers_the_gap_and_repeats_to_the_bit() -> None:
    field = FIELDS["mat"]()
    how = Training(images=10 * known_entropy.BATCH, learning_rate=2e-3, warmup_images=0)
    torch.manual_seed(how.seed)
    untrained = build(known_entropy.MODEL)
    few = replace(BOUND, options={"levels": 16}, images=32, part=16)
    denoiser = train(field, how)
    before, after = score(field, untrained, few), score(field, denoiser, few)
    assert after.exact == before.exact
    assert after.gap < before.gap - 10 * after.standard_error
    assert after.gap > 0
    assert after.evaluations == 16
    assert score(field, denoiser, replace(few, part=32)).gap == pytest.approx(after.gap, abs=1e-5)
    again = train(field, how)
    for one, other in zip(denoiser.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FIELDS)
def test_the_near_exact_denoiser_has_no_gap(name: str) -> None:
    field = FIELDS[name]()
    bound = score(field, field, replace(BOUND, images=100))
    assert abs(bound.sigmas) < 3
    assert bound.standard_error < 0.02
    flow = score(field, field, replace(FLOW, options={"probes": 1, "tolerance": 1e-2}, images=24, part=24))
    assert abs(flow.sigmas) < 4
    assert flow.standard_error < 0.02


def test_what_is_missed_is_said() -> None:
    assert missed("mat", gap(0.02), gap(0.001), gap(0.001)) == []
    assert missed("mix", gap(0.04), gap(0.001), gap(0.001)) == []
    for trained, oracle, ode, words in (
        (gap(0.04), gap(0.0), gap(0.0), "gap +0.0400 is above 0.03"),
        (gap(-0.004), gap(0.0), gap(0.0), "4.0 standard errors below the truth"),
        (gap(0.01, 0.004), gap(0.0), gap(0.0), "standard error 0.0040 is above 0.003"),
        (gap(0.01), gap(0.0035), gap(0.0), "near-exact denoiser's gap is +3.5"),
        (gap(0.01), gap(0.0), gap(-0.0021), "-0.0021, is beyond 0.002"),
    ):
        (found,) = missed("mat", trained, oracle, ode)
        assert words in found


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(known_entropy, "BOUND", replace(BOUND, options={"levels": 4}, images=8))
    monkeypatch.setattr(known_entropy, "FLOW", replace(FLOW, options={"tolerance": 0.1}, images=4))
    output = tmp_path / "record.json"
    assert known_entropy.main(["mat", "--images", "256", "--output", str(output)]) == 0
    record = json.loads(output.read_text())["fields"]["mat"]
    assert record["training"]["images"] == 256
    for key in ("bound", "oracle_bound", "oracle_ode"):
        assert math.isfinite(record[key]["gap"])
        assert record[key]["standard_error"] > 0
    assert "gap " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"unknown field 'mut' .did you mean 'mat'"):
        known_entropy.main(["mut"])
    with pytest.raises(ValueError, match="at least one batch"):
        known_entropy.main(["mat", "--images", "5"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FIELDS)
def test_a_trained_models_bound_is_near_the_truth_and_never_below(name: str) -> None:
    found = known_entropy.run(name, Training(BARS[name].images))
    print(json.dumps(found, indent=1))
    assert found["missed"] == []
    assert found["parameters"] <= 150_000
