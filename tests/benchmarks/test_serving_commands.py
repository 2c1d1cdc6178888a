"""`jobs.benchmark serve` against a real endpoint, and `jobs.benchmark engine`, both with the smallest work."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.benchmark import engine, serve
from pipeline.model import load
from pipeline.serving.config import ServingConfig
from pipeline.serving.ports import free_port
from tests.faults.endpoint import Endpoint, serving
from tests.serving.tiny import save_tiny


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    url = str(tmp_path_factory.mktemp("model") / "tiny")
    save_tiny(url)
    with serving(load(url), ServingConfig(model="tiny", max_steps=100, deadline_s=30)) as made:
        yield made


def test_an_endpoint_is_measured(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    before = endpoint.service.engine.load()
    few = ["--seconds", "1", "--live", "4", "--steps", "3-6", "--loads", "0.5,1"]
    assert serve.main([endpoint.url, *few, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    after = endpoint.service.engine.load()
    assert record["models"] == ["tiny"]
    assert record["capacity"]["rows_per_s"] > 0
    assert [each["share"] for each in record["loads"]] == [0.5, 1.0]
    accepted = sum(each["accepted"] for each in record["loads"])
    assert accepted > 0
    assert accepted < after.finished - before.finished  # the capacity's requests come on top
    for each in record["loads"]:
        assert each["refused"] == each["late"] == each["failed"] == 0
        assert each["accepted"] == 0 or 0 < each["p50_s"] <= each["p95_s"] <= each["p99_s"]
    assert "deployments of this size" in serve.sizing(record, None)
    assert "measure smaller ones" in serve.sizing(record, 1e-9)


def test_what_cannot_be_measured_is_told(endpoint: Endpoint) -> None:
    with pytest.raises(ValueError, match="no endpoint answers at"):
        serve.main([f"http://127.0.0.1:{free_port('127.0.0.1')}", "--seconds", "1"])
    with pytest.raises(ValueError, match=r"no request was answered.*HTTP \[404\]"):
        serve.main([endpoint.url, "--seconds", "0.2", "--model", "another"])
    for wrong, text in (("--steps=9-3", "1 <= A <= B"), ("--loads=0", "must be positive"), ("--live=0", "--live")):
        with pytest.raises(ValueError, match=text):
            serve.main([endpoint.url, wrong])


def test_quantiles_and_rows_count_what_they_say() -> None:
    assert serve.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert math.isnan(serve.quantile([], 0.5))
    answers = [serve.Answered(200, 0.5, 10), serve.Answered(429, 0.1, 0), serve.Answered(504, 9.0, 0)]
    found = serve.row(0.5, 3.0, 1.0, [*answers, serve.Answered(0, 1.0, 0)])
    assert (found.accepted, found.refused, found.late, found.failed) == (1, 1, 1, 1)
    assert (found.rows_per_s, found.p99_s, found.refused_p99_s) == (10.0, 0.5, 0.1)
    traffic = serve.Traffic(("ddim", "heun"), (10, 50), 2)
    assert traffic.body(3) == traffic.body(3)
    assert {traffic.body(index)["sampler"] for index in range(20)} == {"ddim", "heun"}


def test_the_engine_is_measured_beside_a_bare_loop(tmp_path: Path) -> None:
    threads, path = torch.get_num_threads(), tmp_path / "engine.json"
    few = ["--network", "tiny", "--live", "1,3", "--steps", "3", "--rounds", "2", "--batches", "1", "--json", str(path)]
    assert engine.main(few) == 0
    torch.set_num_threads(threads)
    record = json.loads(path.read_text())
    assert [row["live"] for row in record["rows"]] == [1, 3]
    assert all(row["engine_rows_per_s"] > 0 and row["loop_rows_per_s"] > 0 for row in record["rows"])
    assert record["memory"]["weights_bytes_each"] > 100_000
    with pytest.raises(ValueError, match="--path graph needs"):
        engine.main(["--path", "graph"])
    with pytest.raises(ValueError, match="unknown network 'small'"):
        engine.main(["--network", "small"])
