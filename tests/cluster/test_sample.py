"""`jobs.sample`: the same set byte for byte from one process, from Ray tasks, and from a run that was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.sample import run
from pipeline.config import RunConfig, load_config
from pipeline.data.making import generated
from pipeline.data.reading.stream import train_images
from pipeline.data.sets.manifest import TRAIN, samples
from pipeline.model import Model, load
from pipeline.serving import offline
from pipeline.serving.offline import generated_set, sampled
from tests.end_to_end.small_run import ROOT, RUN_FILE
from tests.serving.tiny import save_tiny

IMAGES = 70
HOW = ["evaluation.sampling={sampler: ancestral, steps: 4}", "serving.chunk=8"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("sample") / "tiny")
    save_tiny(url)
    return url


@pytest.fixture(scope="module")
def model(url: str) -> Model:
    return load(url)


@pytest.fixture
def config() -> RunConfig:
    return load_config(str(ROOT / RUN_FILE), HOW)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "MOST_SAMPLES", 16)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".lease" not in path.parts
    }


def test_ray_tasks_and_one_process_make_the_same_bytes(
    ray_cluster: None, config: RunConfig, model: Model, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(config, model, url=f"{tmp_path}/here", images=IMAGES, seed=3, local=True)
    torch.set_num_threads(threads)
    found = run(config, model, url=f"{tmp_path}/tasks", images=IMAGES, seed=3)
    here, tasks = contents(tmp_path / "here"), contents(tmp_path / "tasks")
    assert here == tasks
    assert len([name for name in here if name.endswith(".tar")]) == 5

    made = found.card["generated"]
    assert made == {
        "model": model.digest,
        "seed": 3,
        "labels": list(range(10)),
        "sampling": {
            "sampler": "ancestral", "steps": 4, "grid": None, "integer_steps": False, "indices": None,
            "guidance": 1.0, "options": {}
        },
        "chunk": 8,
        "images": IMAGES,
        "samples_per_shard": 16,
    }  # fmt: skip
    assert found.class_names == tuple(map(str, range(10)))
    assert found.split(TRAIN).total == IMAGES
    assert samples(found)["label"].to_pylist() == [index % 10 for index in range(IMAGES)]
    assert {row["train"] for row in found.card["per_class"].values()} == {7}


def test_an_image_follows_from_model_seed_and_index_alone(config: RunConfig, model: Model, tmp_path: Path) -> None:
    found = run(config, model, url=f"{tmp_path}/set", images=40, seed=5, local=True)
    read = train_images(found, 40).images
    expected = model.sample(40, config.evaluation.sampling, labels=[index % 10 for index in range(40)], seed=5)
    assert int((read.int() - expected.int()).abs().max()) <= 1  # a network call on 40 rows rounds otherwise
    more = run(config, model, url=f"{tmp_path}/more", images=70, seed=5, local=True)
    assert torch.equal(train_images(more, 70).images[:40], read)
    other = run(config, model, url=f"{tmp_path}/other", images=40, seed=6, local=True)
    assert not torch.equal(train_images(other, 40).images, read)


def test_labels_are_the_given_ones_in_turn(config: RunConfig, model: Model, tmp_path: Path) -> None:
    found = run(config, model, url=f"{tmp_path}/set", images=9, asked={"labels": [7, 2]}, local=True)
    assert samples(found)["label"].to_pylist() == [7, 2, 7, 2, 7, 2, 7, 2, 7]
    bare = run(config, model, url=f"{tmp_path}/bare", images=3, asked={"labels": [-1]}, local=True)
    assert not bare.labelled
    for labels, text in (([10], "labels must lie in 0..9"), ([1, -1], "does not go with others")):
        with pytest.raises(ValueError, match=text):
            run(config, model, url=f"{tmp_path}/no", images=3, asked={"labels": labels}, local=True)


def test_a_finished_set_is_verified_mended_and_never_replaced(config: RunConfig, model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    found = run(config, model, url=str(folder), images=IMAGES, local=True)
    before = contents(folder)
    first, second, *_ = sorted(folder.glob("shards/*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("shards/*.tar") if path != second}
    assert run(config, model, url=str(folder), images=IMAGES, local=True).digest == found.digest
    assert contents(folder) == before
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())
    with pytest.raises(ValueError, match=r"already holds another set.*seed: 0 there, 1 asked"):
        run(config, model, url=str(folder), images=IMAGES, seed=1, local=True)


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    config: RunConfig, model: Model, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # shards as large as in the other process
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(config, model, url=f"{tmp_path}/once", images=1100, local=True)
    torch.set_num_threads(threads)
    to = ["--model", url, "--to", f"{tmp_path}/killed", "--images", "1100", "--local"]
    command = [sys.executable, "-m", "jobs.sample", RUN_FILE, *HOW, *to]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not list(killed.glob("building-*/*.parquet")):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in killed.glob("shards/*.tar")}
    records = len(list(killed.glob("building-*/*.parquet")))
    assert 1 <= records < 3, "the injection came too late"
    assert not (killed / "manifest.json").exists()
    again = subprocess.run(command, cwd=ROOT, env=environment, timeout=120, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert contents(killed) == contents(tmp_path / "once")
    kept = [path for path, at in there.items() if path.stat().st_mtime_ns == at]
    assert len(kept) >= records, "a finished shard was made again"


def test_the_engine_makes_what_the_set_holds_and_refuses_what_is_not_finite(
    config: RunConfig, model: Model, tmp_path: Path
) -> None:
    how = config.evaluation.sampling
    made, work = generated_set(f"{tmp_path}/set", model, 20, 0, None, how, 8)
    assert [piece.images for piece in work] == [16, 4]
    done = work[1].run(model)
    assert generated.finished(made) == {1: done}
    broken = load(str(tmp_path / "broken")) if save_tiny(str(tmp_path / "broken")) else model
    with torch.no_grad():
        next(broken.denoiser.parameters()).fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="not finite"):
        sampled(broken, [1], model.asked(1, labels=[0]), how, 8)
    assert sampled(model, [1, 2], model.asked(2, labels=[0, 1]), how, 8).dtype == np.uint8
