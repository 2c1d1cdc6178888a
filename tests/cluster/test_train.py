"""Training through Ray Train: the same as without it, after a killed worker too."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import assembly, storage
from pipeline.cluster.train import fit
from pipeline.config import RunConfig, from_plain
from pipeline.data.sets.manifest import Manifest
from pipeline.training import checkpoint
from pipeline.training import events as say
from tests.cluster.killed_training import train_workers


def run_config(output: Path, data: str = "data", **over: Any) -> RunConfig:
    """A run of 8 steps of 16 images on two half-CPU workers."""
    values: dict[str, Any] = {
        "name": "small",
        "output": str(output),
        "shard": {"source": "x", "url": data, "image_size": 8},
        "stream": {"url": data, "batch_size": 16, "logical_shards": 2, "readers": 1, "reader_cpus": 0.25},
        "model": {
            "size": 8,
            "channels": 1,
            "classes": 3,
            "network": {"name": "unet", "base_width": 8, "multipliers": [1, 2], "blocks": 1, "attention_at": [4]},
        },
        "training": {
            "images": 128,
            "warmup_images": 0,
            "log_every_images": 16,
            "checkpoint_every_images": 48,
            "evaluate_images": 10,
            "evaluate_levels": 2,
            "evaluate_every_images": 0,
            "sample_images": 4,
            "sample_every_images": 0,
        },
        "cluster": {"workers": 2, "cpus_per_worker": 0.5, "max_failures": 2},
    }
    for section, change in over.items():
        values[section] = {**values[section], **change} if isinstance(change, dict) else change
    return from_plain(values)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own use of Ray Data


def test_identity_is_flat_json(tmp_path: Path, small_set: Manifest) -> None:
    facts = assembly.identity(run_config(tmp_path), small_set)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["data.digest"] == small_set.digest
    assert facts["model.network.base_width"] == 8
    assert facts["stream.batch_size"] == 16
    assert "stream.readers" not in facts


def test_data_that_does_not_fit_the_model_is_refused(tmp_path: Path, small_set: Manifest) -> None:
    with pytest.raises(ValueError, match=r"model takes images of .* \(3, 8, 8\), the shard set at .* has \(1, 8, 8\)"):
        list(assembly.train_here(run_config(tmp_path / "a", small_set.url, model={"channels": 3})))
    with pytest.raises(ValueError, match=r"model\.classes is 7, the shard set at .* has 3 classes"):
        list(assembly.train_here(run_config(tmp_path / "a", small_set.url, model={"classes": 7})))


def test_training_without_ray_says_everything(tmp_path: Path, small_set: Manifest) -> None:
    events = list(assembly.train_here(run_config(tmp_path, small_set.url)))
    kinds = [type(event) for event in events]
    assert kinds[0] is say.Started
    assert kinds[-1] is say.Finished
    evaluated = [event for event in events if isinstance(event, say.Evaluated)]
    assert evaluated[0].metrics["held_out/images"] == 10
    assert 0 < evaluated[0].metrics["held_out/bits_per_dim"] < 40
    samples = [event for event in events if isinstance(event, say.Samples)]
    assert samples[0].pixels.shape == (4, 1, 8, 8)


def digests(config: RunConfig, step: int) -> dict[str, str]:
    url = f"{checkpoint.folder(assembly.checkpoints(config), step)}/commit.json"
    record: dict[str, Any] = json.loads(storage.read_bytes(url))
    return {name: file["sha256"] for name, file in record["files"].items() if name.endswith(".safetensors")}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


@pytest.mark.usefixtures("ray_cluster", "quick")
def test_ray_trains_as_the_loop_does_and_goes_on(tmp_path: Path, small_set: Manifest) -> None:
    """One of its two workers is killed on the way."""
    longer = {"images": 640}  # 40 steps, a checkpoint every 3
    config = run_config(tmp_path / "ray", small_set.url, training=longer)
    events: list[say.Event] = []
    killed: list[int] = []  # the step that had been saved then

    def watch(event: say.Event) -> None:
        events.append(event)
        if isinstance(event, say.CheckpointSaved) and not killed:
            workers = train_workers()
            assert len(workers) == 2
            workers[1].kill()
            killed.append(event.step)

    finished = fit(config, watch)
    assert finished == say.Finished(40, 640, "budget", f"{tmp_path}/ray/checkpoints/step-000000040")
    starts = [event.step for event in events if isinstance(event, say.Started)]
    assert starts[0] == 0
    assert starts[1:] in [[step] for step in range(3, 40, 3)]
    alone = assembly.train_here(run_config(tmp_path / "here", small_set.url, training=longer))
    here = {event.step: event for event in alone if isinstance(event, say.Step)}
    there = [event for event in events if isinstance(event, say.Step)]
    untold = range(killed[0] + 1, starts[1] + 1)  # where the killed one was rank 0: what it said after that save
    assert {event.step for event in there} | set(untold) == set(here)
    for event in there:
        loss = here[event.step].metrics["loss"]
        assert abs(event.metrics["loss"] - loss) <= 1e-6 * loss
    before = digests(config, 40)
    again: list[say.Event] = []
    fit(config, again.append)
    assert again == [finished]
    assert digests(config, 40) == before
    other = run_config(tmp_path / "ray", small_set.url, training=longer, stream={"batch_size": 32})
    with pytest.raises(ValueError, match=r"of another run: stream\.batch_size was 16, is 32"):
        fit(other, again.append)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "quick")
def test_sigterm_to_a_worker_saves_at_once_and_changes_no_weight(tmp_path: Path, small_set: Manifest) -> None:
    """As where a node is preempted: the notice comes to one worker, and later its end."""
    rare = {"images": 640, "checkpoint_every_images": 0, "log_every_images": 16}
    whole = run_config(tmp_path / "whole", small_set.url, training=rare)
    noticed = run_config(tmp_path / "noticed", small_set.url, training=rare)
    fit(whole, lambda event: None)
    events: list[say.Event] = []

    def notify(event: say.Event) -> None:
        events.append(event)
        saved = [event for event in events if isinstance(event, say.CheckpointSaved)]
        if isinstance(event, say.Step) and event.step >= 10 and not saved and not hit:
            hit.append(train_workers()[1])
            hit[0].terminate()
        if isinstance(event, say.CheckpointSaved) and len(saved) == 1:
            assert hit[0].is_running()
            hit[0].kill()

    hit: list[psutil.Process] = []
    fit(noticed, notify)
    saves = [event.step for event in events if isinstance(event, say.CheckpointSaved)]
    starts = [event.step for event in events if isinstance(event, say.Started)]
    assert starts == [0, saves[0]]
    assert 10 < saves[0] < 40
    assert saves[-1] == 40
    assert digests(whole, 40) == digests(noticed, 40)
