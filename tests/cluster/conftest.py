"""One small Ray cluster for all cluster tests, and a small shard set."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster.session import QUIET
from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.sets.manifest import Manifest
from pipeline.serving.config import ServingConfig
from pipeline.serving.ports import free_port
from tests.cluster.endpoints import Registry, import_serve
from tests.data.folders import write_images

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": QUIET["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"],
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": QUIET["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"],
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # else a busy machine starves the workers
}


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray on two CPUs of this machine."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    import logging

    import ray

    root = str(Path(__file__).parents[2])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=150 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield
    ray.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


@pytest.fixture
def small_set(tmp_path: Path) -> Manifest:
    """100 grey 8x8 images in 3 classes, 10 a shard."""
    write_images(tmp_path / "images", 100, 8, 1)
    return shard_in_process(
        ShardConfig(str(tmp_path / "images"), str(tmp_path / "set"), image_size=8, channels=1, samples_per_shard=10)
    )


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    with warnings.catch_warnings():  # MLflow's own use of its libraries
        warnings.simplefilter("ignore")
        return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="session")
def serving_config(tmp_path_factory: pytest.TempPathFactory) -> ServingConfig:
    return ServingConfig(
        kept_models=str(tmp_path_factory.mktemp("kept")),
        model="models:/digits@champion",
        port=free_port("127.0.0.1"),
        watch_s=0.3,
        max_replicas=1,
        cpus_per_replica=0.5,
        max_steps=100_000,
        max_request_cost=10**9,
    )


@pytest.fixture(scope="session")
def endpoint(ray_cluster: None, registry: Registry, serving_config: ServingConfig) -> Iterator[str]:
    """One replica that serves the champion of `registry`."""
    serve = import_serve()
    yield serve.deploy(serving_config, registry.uri)
    serve.shutdown()
