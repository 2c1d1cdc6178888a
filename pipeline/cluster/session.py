"""A Ray session: the cluster around this job, the one named, or one started on this machine for as long as the job
lasts.
"""

import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for this poll: 2 s by default
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a proxy that died is replaced after three of them: 30 s by default
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.cluster.gate:middlewares",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else a worker's lines come twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
LISTEN_S = 10.0
STARTS = 3
LATE = "timed out during startup"  # of what Ray says where its node is not there after 30 s
OPEN = (
    "warning: the Ray cluster at {address} asks for no token: whoever reaches its ports runs code there as its user "
    "(infra/cluster.sh starts one that asks)"
)
_made_tokens: set[str] = set()


def prepare_environment() -> None:
    """Settings that Ray reads when it is imported; call before anything that imports Ray.

    Ray runs in token mode. Where the caller has chosen neither a mode nor a token, a fresh token is kept in this
    process's environment (its children inherit it) and never written to a file.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    known = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if mode == "token" and not known and not (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        _made_tokens.add(os.environ["RAY_AUTH_TOKEN"])


def asks_for_no_token(environment: Mapping[str, str] = os.environ) -> bool:
    """Of the cluster that has just been joined: none was shown, or one made up here that it cannot know."""
    return environment.get("RAY_AUTH_MODE") != "token" or environment.get("RAY_AUTH_TOKEN") in _made_tokens


@contextmanager
def session(address: str | None = None, *, cpus: float | None = None) -> Iterator[None]:
    """Connect to Ray for the length of the block.

    address: a cluster to join; None joins the one this job was submitted to (RAY_ADDRESS), else starts one on this
    machine, which ends with the block. cpus: logical cores of a cluster started here; None takes the machine's. A
    session within a session is the outer one.

    Raises:
        ConnectionError: no Ray cluster answers at `address`, or none can be started here.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _must_listen(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            hint = "" if os.environ.get("RAY_AUTH_TOKEN") else " (or it asks for another token: set RAY_AUTH_TOKEN)"
            raise ConnectionError(f"no Ray cluster answers at {address}{hint}: {error}") from error
        if asks_for_no_token():
            print(OPEN.format(address=address), file=sys.stderr, flush=True)
    else:
        with _deaf_to_hangup():
            _start_here(None if cpus is None else max(1, int(cpus)))
    try:
        yield
    finally:
        ray.shutdown()


def _start_here(cpus: int | None) -> None:
    """A cluster on this machine. Ray gives itself 30 seconds, which a busy machine can exceed: it is asked again.

    Raises:
        ConnectionError: it was not there the last time either.
    """
    import ray

    for attempt in range(1, STARTS + 1):
        try:
            ray.init(
                address="local",  # never what an earlier `ray start` left behind
                num_cpus=cpus,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            if LATE not in str(error):
                raise
            if attempt == STARTS:
                raise ConnectionError(
                    f"Ray did not start on this machine within 30 s, {STARTS} times: the machine is busy, or short of "
                    f"memory or disk; run the same command again"
                ) from None


@contextmanager
def _deaf_to_hangup() -> Iterator[None]:
    """Processes started within the block never hear SIGHUP: a closed terminal sends it to every one, and Ray's must
    outlive this one's last checkpoint. They end with this process, which hears it at the block's end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def _must_listen(address: str) -> None:
    """Ray itself waits over a minute for an address where nothing is.

    Raises:
        ConnectionError: nothing listens there. An address without a port ("auto") is left to Ray.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTEN_S).close()
    except OSError as error:
        raise ConnectionError(f"nothing listens at {address}, where a Ray cluster should be: {error}") from error


def result(reference: Any) -> Any:
    """What a task returned; raises what it raised, without Ray's wrapping."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
