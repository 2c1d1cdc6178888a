"""Metrics of trainings, feeds and jobs, read from a Ray node's metrics port."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.train import fit
from pipeline.data.sets.manifest import Manifest
from pipeline.training import events as say
from tests.cluster.test_train import run_config
from tests.infra.test_monitoring import until_scraped

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own use of Ray Data
R = "ray_raydiffusion_"
NEEDS_A_GPU = {
    "training_gpu_busy_ratio",
    "training_gpu_memory_bytes",
    "training_mfu_ratio",
    "training_peak_memory_bytes",
}
NEEDS_DAMAGE = {"feed_damaged_shards", "feed_lost_images", "feed_repeated_requests", "training_guard"}
NEEDS_A_FAULT = {"training_restarts", "training_hangs", "training_checkpoint_failures"}


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_run_tells_is_counted(tmp_path: Path) -> None:
    from pipeline.cluster.monitoring import RunMetrics

    (tmp_path / "step").write_bytes(bytes(1000))
    started = say.Started(10, 640, 20, 1280, 64, 2, 1000, "fp32")
    told: list[say.Event] = [
        started,
        say.Step(11, 704, {"loss": 0.5, "grad_norm": 2.0, "loss_quarter_1": 0.25, "peak_memory_gib": 2.0, "mfu": 0.4}),
        say.Step(12, 768, {"loss": 0.4, "lost_images": 3.0}),
        say.Skipped(12, 768, "a spike", "spike"),
        say.RolledBack(10, 640, 12, "spike", "a spike", "x"),
        say.CheckpointSaved(12, 768, str(tmp_path), 0.1, 2.5),
        say.CheckpointFailed(13, 832, "x", "disk full"),
        say.Hung(13, 832, "stood still", "log"),
        started,
        say.System(13, 832, {"system/node-a/gpu_0_busy_percent": 50.0, "system/node-a/gpu_0_memory_gib": 1.0}),
    ]
    wanted = {"training_step", "training_gpu_busy_ratio", "training_guard", "tracking_backlog_entries"}
    with RunMetrics("counted") as metrics:
        for event in told:
            metrics.handle(event)
        metrics.backlog(7)
        found = until_scraped({R + name for name in wanted}, label='run="counted"')
    expected = {
        "training_running": 1,
        "training_step": 10,
        "training_loss": 0.4,
        "training_level_loss": 0.25,
        "training_gradient_norm": 2.0,
        "training_images_total": 128,
        "training_world_size": 2,
        "training_restarts_total": 1,
        "training_hangs_total": 1,
        "training_checkpoint_failures_total": 1,
        "training_checkpoint_bytes": 1000,
        "training_checkpoint_write_seconds": 2.5,
        "training_guard_total": 2,
        "training_peak_memory_bytes": 2 * 2**30,
        "training_gpu_busy_ratio": 0.5,
        "training_gpu_memory_bytes": 2**30,
        "feed_lost_images_total": 3,
        "tracking_backlog_entries": 7,
    }
    assert {name: found.get(R + name) for name in expected} == expected


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_real_run_and_a_job_export_every_name(
    tmp_path: Path, small_set: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.progress import bar
    from pipeline.cluster import monitoring

    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    assert "ray" in sys.modules
    told: list[Any] = []
    with bar("train", 128, "images") as live:

        def tell(event: say.Event) -> None:
            told.append(event)
            live.update(event.images)

        fit(run_config(tmp_path / "run", small_set.url), tell)
        elsewhere = NEEDS_A_GPU | NEEDS_DAMAGE | NEEDS_A_FAULT
        wanted = {name for name in monitoring.run_names() if name.removeprefix(R) not in elsewhere}
        found = until_scraped(wanted)
    assert found[R + "feed_images_total"] >= 128
    assert found[R + "feed_bytes_total"] >= 128 * 64
    assert found[R + "job_done_units"] == found[R + "job_wanted_units"] == 128
    saved = [event for event in told if isinstance(event, say.CheckpointSaved)]
    assert found[R + "training_checkpoint_bytes"] > 1000
    assert saved
