"""Ray Serve: HTTP ingresses and engine replicas, autoscaled on owed work.

A replica is ready once its model is verified, warmed up and self-tested. A request whose replica dies is asked again
with the same seed, so it comes to the same bytes.
"""

import logging
import os
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, serve
from ray.exceptions import RayActorError
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError

import pipeline
from pipeline.cluster import autoscaling, monitoring
from pipeline.cluster.fleet import ATTEMPTS, Fleet, cause_in
from pipeline.cluster.replica import Pinned, Replica, pin
from pipeline.serving import logs
from pipeline.serving.config import ServingConfig, refuse_strangers
from pipeline.serving.ports import free_port, is_free
from pipeline.web.app import make_app

log = logging.getLogger("raydiffusion.serving")

APPLICATION = "raydiffusion"
ONGOING_REQUESTS = 512  # that may be with a replica; its engine has the real budget, in cost
READY_TIMEOUT_S = 180.0
SHUTDOWN_TIMEOUT_S = 60.0
HEALTH_CHECK_S = 2.0  # between looks at a replica: what died is replaced after at most this and its start
AUTOSCALING_WINDOW_S = 15.0


@serve.ingress()
class Ingress:
    """The HTTP side. It holds no model: it reads, checks, asks a replica and answers."""

    def __init__(self, config: Mapping[str, Any], engines: Any, models: list[Pinned], tracking_uri: str | None) -> None:
        self.config, self.engines = ServingConfig(**config), engines
        self.models, self.tracking_uri = models, tracking_uri

    def __serve_build_asgi_app__(self) -> Any:
        logs.to_stderr()
        check_reach(self.config)
        metrics = monitoring.IngressMetrics()
        fleet = Fleet(self.engines, self.config, self.models, self.tracking_uri, metrics)
        return make_app(fleet, self.config, metrics)


def check_reach(config: ServingConfig) -> None:
    """Refuses an endpoint without keys where Ray Serve's proxies, however they were started, hear other machines.

    Raises:
        ValueError: says where it listens.
    """
    if config.key_hashes:
        return
    if RAY_SERVE_ENABLE_HA_PROXY:
        raise ValueError(
            "HAProxy stands in front (RAY_SERVE_ENABLE_HA_PROXY) and hides who asks: set serving.key_hashes"
        )
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None and client.http_config.host is not None:
        refuse_strangers(client.http_config.host, "http_options.host of the running Ray Serve")


# --- deploying -------------------------------------------------------------------------------------------------------


def application(config: ServingConfig, tracking_uri: str | None = None, root: str = "") -> serve.Application:
    """The Serve application of a configuration, to run or to name in a declarative deployment. root: the folder that
    relative paths count from, '' for the current one.

    Raises:
        ValueError, FileNotFoundError: a model or a registry that is not there.
    """
    root = root or os.getcwd()
    tracking_uri = None if tracking_uri is None else _absolute(tracking_uri, root, "sqlite:///")
    models = [pin(source, tracking_uri) for source in _sources(config, root)]
    plain = asdict(config)
    deployment: Any = serve.deployment
    cloudpickle.register_pickle_by_value(autoscaling)  # Serve's controller need not be able to import this package
    policy = AutoscalingPolicy(
        policy_function=autoscaling.ByOwedWork, policy_kwargs={"target_s": config.work_per_replica_s}
    )
    engines = deployment(
        Replica,
        name="engine",
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        max_ongoing_requests=ONGOING_REQUESTS,
        max_queued_requests=config.max_queued_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            policy=policy,
            look_back_period_s=AUTOSCALING_WINDOW_S,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
        ),
        graceful_shutdown_timeout_s=config.deadline_s,
        health_check_period_s=HEALTH_CHECK_S,
        max_constructor_retry_count=2,
    ).bind(plain, models, tracking_uri)
    ingress = deployment(
        Ingress,
        name="ingress",
        num_replicas=config.ingress_replicas,
        ray_actor_options={"num_cpus": config.cpus_ingress},
        max_ongoing_requests=2 * config.max_queued_requests,
        graceful_shutdown_timeout_s=config.deadline_s,
        health_check_period_s=HEALTH_CHECK_S,
        max_constructor_retry_count=2,
    )
    return ingress.bind(plain, engines, models, tracking_uri)


def build(args: dict[str, Any]) -> serve.Application:
    """The application as `serve deploy` builds it from `args` of a Serve config file: `run_file`, a path,
    and `overrides`, a list of key=value as on the command line.
    """
    from pipeline.config import load_config, with_champion

    if not isinstance(args.get("run_file"), str):
        raise ValueError("args of the Serve config file need run_file: the path of a run file")
    root, path = _run_file(args["run_file"])
    config = with_champion(load_config(path, args.get("overrides", [])))
    check_reach(config.serving)
    return application(config.serving, config.tracking.uri, root)


def _run_file(given: str) -> tuple[str, str]:
    """The folder that relative paths of a declarative deployment count from, and the run file: the folder where Ray was
    started if it has the file, else the checkout of this package."""
    roots = [os.getcwd(), str(Path(pipeline.__file__).parents[1])]
    for root in roots:
        if os.path.isfile(path := os.path.join(root, given)):
            return root, path
    raise FileNotFoundError(
        f"no run file {given} on this node: looked from {' and from '.join(roots)}; give args.run_file as an absolute "
        "path that every node has"
    )


def _sources(config: ServingConfig, root: str) -> list[str]:
    """URLs of the served models, the default one first; local paths from the root: replicas have another folder."""
    if config.model is None:
        raise ValueError("serving.model names no model: give models:/NAME@alias or a model directory")
    named = (config.model, *config.more_models)
    return [each if each.startswith("models:/") else _absolute(each, root) for each in named]


def deploy(config: ServingConfig, tracking_uri: str | None = None) -> str:
    """Serve `config.model` on the Ray cluster this process is connected to; returns the URL once a replica is ready, or
    with no `min_replicas` the ingress.

    Raises:
        ValueError: no such model, a failed self-test, or a port that is taken.
    """
    if not ray.is_initialized():
        raise ValueError("deploy needs a Ray session: call it within pipeline.cluster.session.session()")
    made = application(config, tracking_uri)
    running = APPLICATION in serve.status().applications if _serve_runs() else False
    port = config.port if config.port else free_port(config.host)
    if not running and not is_free(config.host, port):
        raise ValueError(f"serving.port {port} on {config.host} is taken: choose another, or 0 for any")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what is going on, the caller says
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    location = "HeadOnly" if not config.key_hashes else "EveryNode"
    _start(location, {"host": config.host, "port": port}, quiet)
    check_reach(config)
    try:
        serve.run(made, name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise ValueError(f"the endpoint did not start: {cause(error)}") from error
    shown = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{shown}:{port}"
    _wait_until_answers(f"{url}/{'readyz' if config.min_replicas else 'healthz'}")
    return url


def _start(location: str, http_options: dict[str, Any], logging_config: dict[str, Any]) -> None:
    """Start Ray Serve. On a busy machine its controller replaces a proxy that is slow to start, and `serve.start` takes
    that for a failure; asked again it finds the controller that is there. The new proxy is waited for at the end."""
    for attempt in range(ATTEMPTS):
        try:
            serve.start(location, http_options=http_options, logging_config=logging_config)
            return
        except RayActorError as error:
            if attempt + 1 == ATTEMPTS:
                raise ValueError(f"the HTTP proxy of Ray Serve does not start: {error}") from error
            log.warning("Ray Serve replaced a proxy that was slow to start")


def status(timeout_s: float = 30.0) -> list[dict[str, Any]]:
    """Of each replica that lives: its process, and the models it holds with their engines' load.

    Raises:
        ValueError: nothing is served, or not yet.
    """
    if not _serve_runs() or APPLICATION not in serve.status().applications:
        raise ValueError("nothing is served on this cluster: start it with jobs.serve")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    handle: Any = serve.get_deployment_handle("engine", APPLICATION)
    try:
        answers = handle.broadcast("status").results(timeout_s=timeout_s, return_exceptions=True)
    except DeploymentUnavailableError:
        raise ValueError("the endpoint has no replica that is ready: `serve status` tells how far it is") from None
    for answer in answers:
        if isinstance(answer, Exception) and not isinstance(answer, RayActorError):
            raise answer
    return [answer for answer in answers if not isinstance(answer, Exception)]


def shutdown() -> None:
    """End the endpoint and Ray Serve, all its replicas and proxies.

    `serve.shutdown` waits within a call of the controller, which the controller's end breaks off: Ray then says in the
    terminal that a task has failed and will be retried. So the call is asked not to wait, and the controller is looked
    for until it is gone.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    client.shutdown_cached_handles()
    ray.get(client._controller.graceful_shutdown.remote(wait=False))
    end = time.monotonic() + SHUTDOWN_TIMEOUT_S
    while _controller_lives() and time.monotonic() < end:
        time.sleep(0.1)
    serve.shutdown()  # forgets it in this process; where it still lives, waits once more and says so


def _controller_lives() -> bool:
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _absolute(url: str, root: str, prefix: str = "") -> str:
    """A local path, also one in an sqlite: URL, from the root: replicas have another working directory."""
    if not url.startswith(prefix) or "://" in url.removeprefix(prefix):
        return url
    return prefix + os.path.abspath(os.path.join(root, url.removeprefix(prefix)))


def _serve_runs() -> bool:
    from ray.serve.exceptions import RayServeException

    try:
        serve.status()
    except RayServeException:
        return False
    return True


def cause(error: RuntimeError) -> str:
    """Why a deployment failed: the last line of the replica's traceback, which Serve keeps in its status."""
    application = serve.status().applications.get(APPLICATION)
    messages = [d.message for d in application.deployments.values()] if application else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return next(filter(None, map(cause_in, messages)), (lines or [str(error)])[-1])


def _wait_until_answers(url: str) -> None:
    end = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(f"{url} does not answer: {error}") from error
            time.sleep(0.1)
