"""Small real image folders, and shard sets made of them in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.reading import blocks
from pipeline.data.sets.manifest import Manifest
from tests.data.folders import write_images


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Manifest]:
    """made(count, size, ...) -> the manifest of a set of that many random images."""

    def make(
        count: int = 100, size: int = 8, channels: int = 3, classes: int = 3, name: str = "set", **config: Any
    ) -> Manifest:
        write_images(tmp_path / f"{name}-images", count, size, channels, classes)
        values: dict[str, Any] = {"image_size": size, "channels": channels, "samples_per_shard": 16} | config
        return shard_in_process(ShardConfig(str(tmp_path / f"{name}-images"), str(tmp_path / name), **values))

    return make


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    blocks.CACHE.clear()
    yield
    blocks.CACHE.clear()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """s3://NAME of a new, empty bucket; the environment points at the server."""
    import zlib

    import boto3

    from pipeline.storage import s3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3.client_of.cache_clear()
    bucket = f"bucket-{zlib.crc32(request.node.nodeid.encode()):08x}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}"
    s3.client_of.cache_clear()
