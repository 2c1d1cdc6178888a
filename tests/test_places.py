"""Paths of a run file under one root, and those that a submitted job would lose."""

import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import places
from pipeline.config import ServingConfig, ShardConfig, from_plain, load_config, to_plain
from tests.end_to_end.small_run import RUN_FILE, in_folder, job

SUBMITTED = {places.SUBMITTED: "{}"}


def test_all_follows_from_one_root() -> None:
    config = load_config(RUN_FILE, ["root=/shared/digits"])
    assert config.output == "/shared/digits/artifacts/digits/run"
    assert config.shard.url == config.stream.url == "/shared/digits/artifacts/digits/shards"
    assert config.shard.source == "/shared/digits/artifacts/digits/images"
    assert config.tracking.uri == "sqlite:////shared/digits/artifacts/mlflow.db"
    assert not places.private(to_plain(config))
    assert from_plain(places.under("/shared/digits", to_plain(config))) == config


def test_on_s3_the_tracking_server_is_asked_for() -> None:
    with pytest.raises(ValueError, match=re.escape("write tracking.uri=http://HOST:PORT")):
        load_config(RUN_FILE, ["root=s3://bucket/lab"])
    config = load_config(RUN_FILE, ["root=s3://bucket/lab", "tracking.uri=http://10.0.0.1:5000"])
    assert config.stream.url == "s3://bucket/lab/artifacts/digits/shards"
    assert config.tracking.uri == "http://10.0.0.1:5000"


def test_what_is_absolute_or_registered_stays() -> None:
    overrides = ["output=/elsewhere/run", "stream.url=s3://other/set", "init=models:/digits@champion"]
    config = load_config(RUN_FILE, [*overrides, "root=/shared"])
    assert (config.output, config.stream.url, config.init) == (
        "/elsewhere/run",
        "s3://other/set",
        "models:/digits@champion",
    )


@pytest.mark.parametrize("root", ["shared", "~/shared", "./shared", "../shared"])
def test_a_root_that_is_relative_itself(root: str) -> None:
    with pytest.raises(ValueError, match="root: must be an absolute path or s3://"):
        load_config(RUN_FILE, [f"root={root}"])


def test_a_home_is_another_one_on_each_node() -> None:
    with pytest.raises(ValueError, match="output: '~' stands for another folder"):
        load_config(RUN_FILE, ["root=/shared", "output=~/run"])


def test_every_key_that_holds_a_path_is_known() -> None:
    """A string key whose help speaks of a folder, file, prefix or URL is one of `PATHS`."""
    from pipeline.config import describe

    told = {
        line.split()[0] for line in describe().splitlines() if re.search(r"folder|file|prefix|s3://|models:/|URL", line)
    }
    not_places = {"root", "shard.class_field", "shard.tags_field", "shard.caption_field", "shard.image_field"}
    not_places |= {"stream.disk_cache_bytes", "shard.classes", "shard.kind", "cluster.address"}
    not_places |= {"serving.kept_models"}  # of each node by itself: a place that others see is not wanted
    assert told - not_places - set(places.PATHS) == set()


ROOTED = load_config(RUN_FILE, ["root=/shared"])


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from(places.PATHS), path=st.sampled_from(["a", "./a/b", "a b/c", "../a", "~/a", "~", "a.db"]))
def test_no_relative_path_goes_unseen(key: str, path: str) -> None:
    config = ROOTED
    value = f"sqlite:///{path}" if key == "tracking.uri" else path
    section, _, name = key.rpartition(".")
    wrapped = {"shard.mixture": {value: 1.0, "/b": 1.0}, "serving.more_models": (value,)}.get(key, value)
    if section:
        changed = replace(config, **{section: replace(getattr(config, section), **{name: wrapped})})
    else:
        changed = replace(config, **{name: wrapped})
    assert places.private(to_plain(changed)) == [f"{key}={value}"]
    with pytest.raises(ValueError, match=re.escape(f"{key}={value}")):
        places.refuse_private(to_plain(changed))


def test_defaults_are_looked_at_too() -> None:
    assert isinstance(ShardConfig.__doc__, str)
    assert ServingConfig().model is None
    config = from_plain({**to_plain(load_config(RUN_FILE, ["root=/s"])), "tracking": {"experiment": "x"}})
    assert places.private(to_plain(config)) == ["tracking.uri=sqlite:///artifacts/mlflow.db"]


OTHER_VERBS = ("shard", "evaluate", "register", "serve", "sample")


@pytest.mark.parametrize("verb", ["train", *(pytest.param(verb, marks=pytest.mark.slow) for verb in OTHER_VERBS)])
def test_a_submitted_job_with_a_relative_path_ends_at_once(verb: str, tmp_path: Path) -> None:
    more = ["--images", "4"] if verb == "sample" else []
    before = _seconds_of_children()
    done = job(verb, RUN_FILE, *in_folder(tmp_path), "output=run", *more, environment=SUBMITTED)
    assert _seconds_of_children() - before < 10
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: only this process would find output=run " in done.stderr
    assert "root=/folder/that/all/nodes/see" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_images_by_a_job(tmp_path: Path) -> None:
    done = job("quickstart", "--images-only", f"root={tmp_path}", environment=SUBMITTED)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "artifacts" / "digits" / "images").rglob("*.png"))) == 1797
