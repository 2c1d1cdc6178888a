"""Training through Ray Train: the same as without it, after a killed worker too; and what is refused beforehand."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import assembly
from pipeline.cluster.train import fit, preflight, with_full_paths
from pipeline.config import RunConfig, from_plain
from pipeline.data import storage
from pipeline.data.manifest import Manifest
from pipeline.training import checkpoint
from pipeline.training import events as say


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

NODE = {"CPU": 2.0, "memory": 1e9}


@pytest.mark.parametrize(
    ("cluster", "stream", "nodes", "fits"),
    [
        ({"workers": 2, "cpus_per_worker": 0.5}, {}, [NODE], True),
        ({"workers": 2, "cpus_per_worker": 1.0}, {}, [NODE], False),  # nothing is left for the readers
        ({"workers": 2, "cpus_per_worker": 1.0}, {"reader_cpus": 0.0}, [NODE], True),
        ({"workers": 2, "cpus_per_worker": 1.5}, {}, [NODE, NODE], True),
        ({"workers": 1, "cpus_per_worker": 3.0}, {}, [NODE, NODE], False),  # 4 CPUs, but no node has 3
        ({"workers": 1, "cpus_per_worker": 1.0, "gpus_per_worker": 1}, {}, [NODE], False),
        ({"workers": 1, "cpus_per_worker": 1.0, "gpus_per_worker": 1}, {}, [NODE, {"CPU": 4.0, "GPU": 1.0}], True),
        ({"workers": 1}, {}, [], False),
    ],
)
def test_preflight(
    tmp_path: Path, cluster: dict[str, Any], stream: dict[str, Any], nodes: list[dict[str, float]], fits: bool
) -> None:
    config = run_config(tmp_path, cluster=cluster, stream=stream)
    if fits:
        preflight(config, nodes)
        return
    with pytest.raises(ValueError, match=r"the cluster cannot hold this run: \d workers? of .* CPU .*its nodes have: "):
        preflight(config, nodes)


def test_preflight_names_workers_without_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cluster\.workers is 3, more than stream\.logical_shards, 2"):
        preflight(run_config(tmp_path, cluster={"workers": 3}), [NODE])


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_full_paths(run_config(Path("out"), "s3://bucket/set"))
    assert config.output == str(tmp_path / "out")
    assert config.stream.url == "s3://bucket/set"


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
    config = run_config(tmp_path / "ray", small_set.url)
    events: list[say.Event] = []
    finished = fit(config, events.append)
    assert finished == say.Finished(8, 128, "budget", f"{tmp_path}/ray/checkpoints/step-000000008")
    assert [event.step for event in events if isinstance(event, say.CheckpointSaved)] == [3, 6, 8]
    here = [e for e in assembly.train_here(run_config(tmp_path / "here", small_set.url)) if isinstance(e, say.Step)]
    there = [e for e in events if isinstance(e, say.Step)]
    for one, two in zip(here, there, strict=True):
        assert one.step == two.step
        assert abs(one.metrics["loss"] - two.metrics["loss"]) <= 1e-6 * one.metrics["loss"]
    before = digests(config, 8)
    again: list[say.Event] = []
    fit(config, again.append)
    assert again == [finished]
    assert digests(config, 8) == before
    other = run_config(tmp_path / "ray", small_set.url, stream={"batch_size": 32})
    with pytest.raises(ValueError, match=r"of another run: stream\.batch_size was 16, is 32"):
        fit(other, again.append)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "quick")
def test_a_killed_worker_changes_no_weight(tmp_path: Path, small_set: Manifest) -> None:
    whole, killed = run_config(tmp_path / "whole", small_set.url), run_config(tmp_path / "killed", small_set.url)
    fit(whole, lambda event: None)
    kills: list[int] = []
    starts: list[int] = []

    def kill(event: say.Event) -> None:
        if isinstance(event, say.Started):
            starts.append(event.step)
        if isinstance(event, say.CheckpointSaved) and event.step == 3 and not kills:
            workers = [
                p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
            ]
            assert len(workers) == 2
            kills.append(workers[-1].pid)
            workers[-1].kill()

    fit(killed, kill)
    assert len(kills) == 1
    assert starts[0] == 0
    assert len(starts) == 2
    assert starts[1] in (3, 6)
    assert digests(whole, 8) == digests(killed, 8)
