"""The whole run with everything in a bucket: images, shards, checkpoints, model, evaluation."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from jobs.quickstart import write_digits
from tests.end_to_end.small_run import RUN_FILE, job, small

BUCKET = "lab"


@pytest.fixture
def store() -> Iterator[dict[str, str]]:
    """The environment that every node of a cluster would have."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


@pytest.mark.slow
def test_shard_train_evaluate_register_from_a_bucket(store: dict[str, str], tmp_path: Path) -> None:
    write_digits(tmp_path / "images")
    s3 = boto3.client(
        "s3",
        endpoint_url=store["AWS_ENDPOINT_URL"],
        aws_access_key_id=store["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=store["AWS_SECRET_ACCESS_KEY"],
        region_name=store["AWS_DEFAULT_REGION"],
    )
    s3.create_bucket(Bucket=BUCKET)
    for path in sorted((tmp_path / "images").rglob("*.png"))[::12]:
        s3.upload_file(str(path), BUCKET, f"images/{path.relative_to(tmp_path / 'images')}")
    overrides = [
        *small(tmp_path),
        f"shard.source=s3://{BUCKET}/images",
        f"shard.url=s3://{BUCKET}/shards",
        f"stream.url=s3://{BUCKET}/shards",
        f"output=s3://{BUCKET}/run",
    ]
    for verb in ("shard", "train", "evaluate", "register"):
        done = job(verb, RUN_FILE, *overrides, timeout=240, environment=store)
        assert done.returncode == 0, f"{verb}\n{done.stdout}{done.stderr}"
    keys = {item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET, Prefix="run/")["Contents"]}
    assert "run/model/digests.json" in keys
    assert any(key.endswith("commit.json") for key in keys)
    assert "models:/digits/1, alias champion" in done.stdout
    assert not (tmp_path / "run").exists()
