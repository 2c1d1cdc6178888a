"""What a user can mend is one line that names what and where, exit code 2, no traceback, and nothing left over."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.end_to_end.small_run import RUN_FILE, in_folder, job

CASES = {
    "misspelt key": (
        ["train", RUN_FILE, "training.learning_rat=1"],
        "unknown key 'learning_rat' in section 'training'",
    ),
    "missing file": (["train", "nothing.yaml"], "no run file at nothing.yaml"),
    "wrong type": (["shard", RUN_FILE, "shard.image_size=big"], "shard.image_size"),
    "no shard set": (["train", RUN_FILE, "--local"], "no finished shard set at"),
    "no model": (["register", RUN_FILE, "--unmeasured"], "has no model: no checkpoint there is committed; train first"),
    "unknown choice": (["train", RUN_FILE, "--dry-run", "model.schedule.name=cosin"], "did you mean 'cosine'"),
    "unknown option": (["train", RUN_FILE, "--dry-run", "model.schedule.q=1"], "has no option 'q'"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case: str, tmp_path: Path) -> None:
    (verb, run_file, *rest), message = CASES[case]
    overrides = in_folder(tmp_path) if run_file == RUN_FILE else []
    done = job(verb, run_file, *overrides, *rest)
    assert done.returncode == 2, done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: "), done.stderr
    assert message in lines[0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "mlflow" not in p.name]


def test_unreachable_tracking_server(tmp_path: Path) -> None:
    from pipeline.data.making.shards import ShardConfig, shard_in_process

    make_images(tmp_path / "images", 12)
    shard_in_process(
        ShardConfig(
            f"{tmp_path}/images", f"{tmp_path}/shards", image_size=8, channels=1, resize="exact", samples_per_shard=4
        )
    )
    done = job("train", RUN_FILE, *in_folder(tmp_path), "model.classes=2", "tracking.uri=http://127.0.0.1:9", "--local")
    assert done.returncode == 2, done.stderr
    assert "no MLflow server answers at http://127.0.0.1:9" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def make_images(folder: Path, count: int) -> None:
    import numpy as np

    from pipeline.data.formats.codecs import encode_png

    random = np.random.default_rng(0)
    for index in range(count):
        path = folder / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(random.integers(0, 256, (8, 8, 1), dtype=np.uint8)))


def test_unreadable_images_are_counted_and_listed_and_an_empty_folder_is_named(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (tmp_path / "images" / "0").mkdir(parents=True)
    done = job("shard", RUN_FILE, *in_folder(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"{tmp_path}/images" in done.stderr

    make_images(tmp_path / "images", 12)
    (tmp_path / "images" / "1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    (tmp_path / "images" / "1" / "notes.jpg").write_text("not an image either")
    done = job("shard", RUN_FILE, *in_folder(tmp_path), "shard.samples_per_shard=4")
    assert done.returncode == 0, done.stderr
    assert "2 rejected" in done.stdout
    listed = [pq.read_table(path) for path in (tmp_path / "shards").glob("manifest-*/rejects.parquet")]
    assert sorted(Path(source).name for source in listed[0]["source"].to_pylist()) == ["broken.png", "notes.jpg"]


def test_help_is_readable() -> None:
    verbs = ("shard", "train", "evaluate", "register", "serve", "sample", "benchmark", "quickstart")
    with ThreadPoolExecutor(2) as pool:
        asked = list(pool.map(lambda verb: job(verb, "--help"), verbs))
    for verb, done in zip(verbs, asked, strict=True):
        assert done.returncode == 0, done.stderr
        assert f"python -m jobs.{verb}" in done.stdout


def test_help_lists_what_can_be_chosen_by_name() -> None:
    """Every option of every network, schedule, objective, sampler and estimator, with its default."""
    from jobs import choices

    text = choices.describe(list(choices.SECTIONS))
    for key, table in choices.tables().items():
        assert f"names and options of {key}:" in text
        for name, made in table.items():
            part = text.split(f"names and options of {key}:")[1].split(f"\n  {name}:")[1].split("\n\n")[0]
            for option in choices.options(made):
                line = next(line for line in part.splitlines() if line.startswith(f"    {option.name} "))
                assert re.search(r"\S+ +\S.* \[.*\]$", line), line
