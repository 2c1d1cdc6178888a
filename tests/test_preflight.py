"""Everything that keeps a run from starting is told at once, one line each, and nothing was done."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from jobs import cli, estimate
from pipeline import assembly, preflight
from pipeline.config import RunConfig, from_plain, to_plain
from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.sets.manifest import Manifest
from pipeline.training import checkpoint
from tests.cluster.test_train import run_config
from tests.data.folders import small_set, write_images
from tests.tracking.database import database

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of its libraries


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return small_set(tmp_path_factory.mktemp("set"), 40, held_out=0.1)


@pytest.fixture
def config(tmp_path: Path, data: Manifest) -> RunConfig:
    made = run_config(tmp_path / "run", data.url)
    return replace(made, tracking=replace(made.tracking, uri=database()))


def begin(config: RunConfig, data: Manifest, digest: str | None = None) -> None:
    """A checkpoint as a run with this file leaves it."""
    facts = {"identity": assembly.identity(config, data) | ({"data.digest": digest} if digest else {})}
    checkpoint.write(assembly.checkpoints(config), checkpoint.State(3, {}, facts))


class _Server(ThreadingHTTPServer):
    version = "3.17.2"


@pytest.fixture
def server() -> Iterator[Callable[[str], str]]:
    """Something that says it is an MLflow server of a version: version -> URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(server.version.encode())

        log_message: Callable[..., None] = lambda *args: None

    server = _Server(("127.0.0.1", 0), Handler)

    def started(version: str) -> str:
        server.version = version
        return f"http://127.0.0.1:{server.server_address[1]}"

    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield started
    server.shutdown()
    server.server_close()


def problems(config: RunConfig, *more: Callable[[], object]) -> list[str]:
    with pytest.raises(preflight.PreflightError) as refused:
        preflight.check(config, *more)
    assert all("\n" not in line for line in refused.value.problems)
    return list(refused.value.problems)


def test_a_run_that_can_start_leaves_nothing_behind(config: RunConfig, data: Manifest) -> None:
    assert preflight.check(config).digest == data.digest
    assert not [path for path in Path(config.output).rglob("*") if path.is_file()]


def test_each_problem_is_named(config: RunConfig, data: Manifest, server: Callable[[str], str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "nothing can be written at" in problems(replace(config, output=str(file / "run")))[0]
    gone = replace(config, stream=replace(config.stream, url=str(tmp_path / "nothing")))
    assert str(tmp_path / "nothing") in problems(gone)[0]
    assert "model takes images" in problems(replace(config, model=replace(config.model, size=16)))[0]
    away = replace(config, tracking=replace(config.tracking, uri="http://127.0.0.1:1"))
    assert "no MLflow server answers at http://127.0.0.1:1" in problems(away)[0]
    uri = server("1.30.0")
    old = replace(config, tracking=replace(config.tracking, uri=uri))
    assert problems(old)[0].startswith(f"the MLflow server at {uri} says it is version '1.30.0', this is a client")
    begin(config, data)
    preflight.check(config)
    other = replace(config, objective={"name": "vlb"}, seed=5)
    assert "seed was 0, is 5" in problems(other)[0]
    assert "objective.name was 'simple', is 'vlb'" in problems(other)[0]


def test_an_export_that_cannot_be_is_refused_before_the_training(config: RunConfig) -> None:
    """Labels without label_dropout, norms of different groups: known from the run file."""
    wanted = replace(config, export="diffusers")
    assert "export: no diffusers pipeline of this model: DDPMPipeline passes no labels" in problems(wanted)[0]
    dropped = replace(wanted, training=replace(config.training, label_dropout=0.1))
    assert "norms have [2, 4, 6, 8] groups; UNet2DModel has one number: set norm_groups to 2" in problems(dropped)[0]
    settled = replace(dropped, model=replace(config.model, network={**config.model.network, "norm_groups": 2}))
    preflight.check(settled)
    with pytest.raises(ValueError, match=r"needs a local output; leave it out and use jobs\.register --export"):
        assembly.demands(replace(settled, output="s3://bucket/run"))
    with pytest.raises(ValueError, match="export must be diffusers or null, got 'onnx'"):
        replace(config, export="onnx")


@pytest.mark.parametrize(
    ("network", "groups"),
    [
        ({}, 32),
        ({"base_width": 32, "multipliers": [1, 2], "attention_at": [16], "heads": None, "head_width": 16}, 8),
        ({"base_width": 36, "multipliers": [2, 1, 3], "attention_at": []}, 9),
        ({"base_width": 8, "multipliers": [1, 2], "norm_group_width": 1, "attention_at": []}, 8),
        ({"base_width": 8, "multipliers": [1, 2], "norm_groups": 2, "attention_at": []}, 2),
    ],
)
def test_a_network_that_leaves_its_groups_open_is_exportable_where_that_is_demanded(
    network: dict[str, object], groups: int
) -> None:
    """And what a run file without the demand means is what it meant."""
    values = {
        "name": "x",
        "output": "x",
        "shard": {"source": "x", "url": "x", "image_size": 32},
        "stream": {"url": "x"},
        "model": {"size": 32, "channels": 3, "classes": 4, "network": {"name": "unet", **network}},
        "training": {"label_dropout": 0.1},
    }
    assert from_plain(values).model.network == {"name": "unet", **network}
    wanted = from_plain({**values, "export": "diffusers"})
    assert wanted.model.network["norm_groups"] == groups
    assembly.exportable(wanted)
    assert from_plain(to_plain(wanted)) == wanted


def test_the_dry_run_heeds_what_the_training_would_do(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpointed activations are fewer, the faster precision is looked for, times have a spread."""
    plain = estimate.estimate(config)
    training = replace(config.training, checkpoint_activations=True, precision="auto")
    less = estimate.estimate(replace(config, training=training))
    assert less.saved_bytes < 0.8 * plain.saved_bytes
    assert less.precision in ("fp32", "bf16")
    assert len(plain.shard_s) >= 2
    assert estimate._precisions("auto", torch.device("cpu"))[0] == "fp32"
    estimate.show(config)
    told = capsys.readouterr().out
    assert re.search(r"a step +\d+\.\d{3} s \(\d+\.\d{3} to \d+\.\d{3} in \d+ tries\) in fp32", told)
    assert "export to diffusers               not possible: " in told


def test_the_version_that_a_run_began_with_must_still_be_there(config: RunConfig, data: Manifest) -> None:
    begin(config, data, digest="a" * 64)
    assert "has no version aaaaaaaaaaaa" in problems(config)[0]


def test_a_set_that_grew_does_not_change_a_run(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40, 8, 1)
    how = ShardConfig(str(tmp_path / "images"), str(tmp_path / "set"), image_size=8, channels=1)
    first = shard_in_process(how)
    made = run_config(tmp_path / "run", first.url, training={"evaluate_images": 0, "sample_images": 0})
    config = replace(made, tracking=replace(made.tracking, uri=database()))
    events = list(assembly.train_here(replace(config, training=replace(config.training, images=64))))
    write_images(tmp_path / "images", 60, 8, 1, seed=1)
    grown = shard_in_process(how)
    assert grown.digest != first.digest
    assert preflight.check(config).digest == first.digest
    assert len(list(assembly.train_here(config))) > 1
    assert events[-1].images == 64
    assert assembly.began(config)["data.digest"] == first.digest
    fresh = replace(config, output=str(tmp_path / "fresh"))
    assert assembly.data(fresh).digest == grown.digest


def test_all_at_once(
    config: RunConfig,
    data: Manifest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six problems, six lines, exit code 2."""
    from pipeline.cluster import capacity

    begin(config, data)
    store = Path(config.output)
    wrong = replace(
        config,
        seed=7,
        model=replace(config.model, channels=3),
        cluster=replace(config.cluster, workers=3, gpus_per_worker=8.0),
        tracking=replace(config.tracking, uri="http://127.0.0.1:1"),
    )
    if os.geteuid() == 0:  # no mode keeps root from writing
        monkeypatch.setattr(preflight, "PROBE", "checkpoints")  # a folder stands there
    else:
        store.chmod(0o500)
    checks = [lambda: capacity.share(wrong), lambda: capacity.check(wrong, [{"CPU": 2.0}])]
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda: preflight.check(wrong, *checks) and None)
    store.chmod(0o700)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    wanted = [
        "model takes images",
        "seed was 0, is 7",
        "nothing can be written",
        "no MLflow server",
        "some workers would have nothing to do",
        "cannot hold this run: 3 workers of 0.5 CPU and 8 GPU",
    ]
    assert len(lines) == len(wanted)
    for line, part in zip(lines, wanted, strict=True):
        assert line.startswith("error: ")
        assert part in line


def test_what_will_fail_later_is_told_at_once(config: RunConfig, tmp_path: Path) -> None:
    """No held-out images, one of them, one class, a set smaller than a batch: warnings; the first keeps a run off."""

    def told(count: int, held_out: float, classes: int) -> tuple[list[str], RunConfig]:
        folder = tmp_path / f"{count}-{held_out}-{classes}"
        write_images(folder / "images", count, 8, 1)
        how = ShardConfig(str(folder / "images"), str(folder / "set"), image_size=8, channels=1, held_out=held_out)
        made = shard_in_process(how)
        now = replace(config, stream=replace(config.stream, url=made.url), model=replace(config.model, classes=classes))
        return preflight.later(now, made), now

    (lines, now) = told(3, 0.0, 0)
    assert "at least 2 held-out images, the set has 0" in lines[0]
    assert any("3 training images, a batch is" in line for line in lines)
    assert "no held-out images, which training.evaluate_images" in " ".join(
        problems(replace(now, training=replace(now.training, evaluate_images=8)))
    )
    lines, _ = told(200, 0.2, 1)
    assert lines == ["there is one class: labels tell the network nothing, and no class agreement is measured"]
