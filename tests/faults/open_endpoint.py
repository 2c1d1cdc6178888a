"""Ray Serve on an address of choice, as an operator may have started it, and this endpoint on it. Driven by
test_serving_strangers: prints why it is not deployed, then deploys past that refusal and prints the port; a line of
input deploys it with a key."""

import hashlib
import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any


def main(model: str, listening: str, key: str) -> None:
    import ray
    from ray import serve as ray_serve

    from pipeline.cluster import serve
    from pipeline.serving.config import ServingConfig
    from pipeline.serving.ports import free_port

    root = str(Path(__file__).parents[2])
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=150 << 20,
        log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": root}},
    )  # fmt: skip
    config = ServingConfig(model=model, port=free_port("0.0.0.0"), cpus_per_replica=0.5, max_replicas=1)
    ray_serve.start("HeadOnly", http_options={"host": listening, "port": config.port})
    try:
        try:
            ray_serve.run(serve.application(config), name=serve.APPLICATION, route_prefix="/")
            told = "deployed"
        except RuntimeError:
            told = serve.cause(RuntimeError("no cause"))
        print(f"told: {told}", flush=True)
        if told != "deployed":
            ray_serve.run(past_the_refusal(config), name=serve.APPLICATION, route_prefix="/")
        print(f"told: {config.port}", flush=True)
        if sys.stdin.readline():
            keyed = replace(config, key_hashes=(hashlib.sha256(key.encode()).hexdigest(),))
            ray_serve.run(serve.application(keyed), name=serve.APPLICATION, route_prefix="/")
            print("told: deployed", flush=True)
            sys.stdin.readline()
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def past_the_refusal(config: Any) -> Any:
    """The application with an ingress that does not look where it listens: what a request meets then."""
    from ray import serve as ray_serve

    from pipeline.cluster import monitoring, serve
    from pipeline.cluster.fleet import Fleet
    from pipeline.cluster.replica import Replica, pin
    from pipeline.web.app import make_app

    plain, models = asdict(config), [pin(config.model, None)]

    @ray_serve.ingress()
    class Open:
        def __init__(self, engines: Any) -> None:
            self.engines = engines

        def __serve_build_asgi_app__(self) -> Any:
            metrics = monitoring.IngressMetrics()
            return make_app(Fleet(self.engines, serve.ServingConfig(**plain), models, None, metrics), config, metrics)

    deployment: Any = ray_serve.deployment
    engines = deployment(Replica, name="engine", ray_actor_options={"num_cpus": 0.5}).bind(plain, models, None)
    return deployment(Open, name="ingress", ray_actor_options={"num_cpus": 0.1}).bind(engines)


if __name__ == "__main__":
    main(*sys.argv[1:])
