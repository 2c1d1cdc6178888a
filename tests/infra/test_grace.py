"""Whether a checkpoint fits in the time that `ray job stop` gives, by a real write."""

import os
from pathlib import Path

from jobs import grace


def test_a_small_checkpoint_fits_and_a_huge_one_is_named(tmp_path: Path) -> None:
    assert grace.warning(str(tmp_path), 1_000, {}) is None
    said = grace.warning(str(tmp_path), 10**13, {grace.VARIABLE: "120"}) or ""
    assert "`ray job stop` kills after 120 s" in said
    assert f"{grace.VARIABLE}=" in said
    assert "kills after 3 s" in (grace.warning(str(tmp_path), 10**13, {}) or "")
    assert os.listdir(tmp_path) == []


def test_only_a_submitted_job_is_told(tmp_path: Path) -> None:
    assert grace.said_at_start(str(tmp_path / "no" / "such" / "place"), 10**13) is None
