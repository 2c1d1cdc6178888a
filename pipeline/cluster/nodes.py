"""What infra/cluster.sh asks about nodes: is this one up, which others are there, do all have the same environment.

`python -m pipeline.cluster.nodes ports FIRST ROLE` exits 2 where a port is taken, naming it; `environment` prints this
node's; `list ADDRESS` prints the live nodes; `wait ADDRESS NODE AGENT_PORT SECONDS` returns once the node named NODE is
one of them and can run jobs: 1 where it never was, 3 where its environment is another than the head's. Any exits 4 for
a wrong token.
"""

import hashlib
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

LOCKS = Path(__file__).parents[2] / "infra"
LABEL = "raydiffusion.environment"  # the label of a Ray node that holds `environment()`
HEAD_PORTS = {"gcs": 0, "dashboard": 1, "autoscaler metrics": 8, "dashboard metrics": 9, "Ray client": 10}
PORTS = {
    "agent": 2,
    "agent's gRPC": 3,
    "runtime environments": 4,
    "object manager": 5,
    "node manager": 6,
    "metrics": 7,
}
LOOK_S = 0.5


@dataclass(frozen=True)
class Node:
    """A live node: its name and address, `environment()` as it was when it started ("" unknown), its resources."""

    name: str
    address: str
    head: bool
    environment: str
    cpus: float
    gpus: float


def environment() -> str:
    """What must be alike on all nodes, as one word: Python's minor version and a digest of the lock files."""
    locks = sorted(LOCKS.glob("requirements*.lock"))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in locks)).hexdigest()
    return f"python{'.'.join(platform.python_version_tuple()[:2])}-{digest[:16] if locks else 'no-lock-file'}"


def nodes(address: str) -> list[Node]:
    """The live nodes of the cluster whose head listens at `address` (HOST:PORT), the head first.

    Raises:
        ConnectionError: nothing listens there.
        PermissionError: it refuses the token.
    """
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions  # pyright: ignore[reportAttributeAccessIssue] # compiled
    from ray.exceptions import RaySystemError

    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"nothing listens at {address}: {error}") from error
    state = GlobalState()
    options = GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    state._initialize_global_state(options)
    try:
        table = state.node_table()
    except (RuntimeError, RaySystemError) as error:
        raise PermissionError(f"what listens at {address} refuses this token, or is no Ray head: {error}") from error
    found = [_node(row) for row in table if row["Alive"]]
    return sorted(found, key=lambda node: (not node.head, node.address))


def _node(row: Mapping[str, Any]) -> Node:
    resources: Mapping[str, float] = row["Resources"]
    return Node(
        row["NodeName"],
        row["NodeManagerAddress"],
        "node:__internal_head__" in resources,
        row.get("Labels", {}).get(LABEL, ""),
        resources.get("CPU", 0.0),
        resources.get("GPU", 0.0),
    )


def taken(first: int, head: bool) -> list[str]:
    """The ports of a node that something listens on already, as "26001 (dashboard)"."""
    wanted = {**PORTS, **(HEAD_PORTS if head else {})}
    return [f"{first + at} ({what})" for what, at in wanted.items() if not _free(first + at)]


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def wait(address: str, name: str, agent_port: int, seconds: float) -> Node:
    """The node called `name`, once it is alive and its agent answers (without it no job can be submitted).

    Raises:
        TimeoutError: it was not within `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            up = [node for node in nodes(address) if node.name == name]
            if up and _agent_answers(up[0].address, agent_port):
                return up[0]
            reason = "its agent does not answer" if up else "it is not among the nodes"
        except (ConnectionError, PermissionError) as error:
            reason = str(error)
        if time.monotonic() > end:
            raise TimeoutError(f"not healthy after {seconds:g} s: {reason}")
        time.sleep(LOOK_S)


def _agent_answers(host: str, port: int) -> bool:
    try:
        with urlopen(f"http://{host}:{port}/api/local_raylet_healthz", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def same_environment(mine: Node, others: Sequence[Node]) -> str | None:
    """Why `mine` must not join, or None."""
    head = next((node for node in others if node.head), mine)
    if head.environment == mine.environment:
        return None
    return (
        f"this node's environment is {mine.environment or 'unknown'}, the head's is {head.environment or 'unknown'} "
        f"(Python and infra/requirements*.lock): take the head's checkout and run infra/setup.sh"
    )


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["environment"]:
            print(environment())
        case ["ports", first, role]:
            busy = taken(int(first), role == "head")
            if busy:
                print(f"ports that something listens on already: {', '.join(busy)}", file=sys.stderr)
                return 2
        case ["list", address]:
            for node in nodes(address):
                what = "head" if node.head else "node"
                print(f"{what}  {node.address}  {node.cpus:g} CPU  {node.gpus:g} GPU  {node.environment or '?'}")
        case ["wait", address, name, agent_port, seconds]:
            mine = wait(address, name, int(agent_port), float(seconds))
            if (reason := same_environment(mine, nodes(address))) is not None:
                print(reason, file=sys.stderr)
                return 3
        case _:
            raise ValueError(f"{__name__}: expected ports, environment, list or wait, got {' '.join(arguments)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        sys.exit(4 if isinstance(problem, PermissionError) else 1)
