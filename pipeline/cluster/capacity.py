"""What a run asks of a cluster's nodes, and whether they could ever give it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ray
from ray._private.state import state

if TYPE_CHECKING:
    from pipeline.config import RunConfig

Resources = Mapping[str, float]


def bundle(config: "RunConfig") -> dict[str, float]:
    """What one worker reserves.

    Where the number of workers is [min, max], its readers' cores are part of it: Ray adds workers until the nodes are
    full, and readers that ask for cores of their own would find none.
    """
    cluster, stream = config.cluster, config.stream
    readers = 0.0 if isinstance(cluster.workers, int) else stream.readers * stream.reader_cpus
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return {"CPU": cluster.cpus_per_worker + readers} | gpus


def alive_nodes() -> list[Resources]:
    """The resources of each node that is up."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def most_resources() -> Resources | None:
    """What an autoscaler may bring the whole cluster to; None where there is no autoscaler."""
    return state.get_max_resources_from_cluster_config() or None


def share(config: "RunConfig") -> None:
    """Raises ValueError where some workers would have no part of the batch."""
    most, shards = config.cluster.most_workers, config.stream.logical_shards
    if most > shards:
        raise ValueError(
            f"cluster.workers is {most}, more than stream.logical_shards, {shards}: some workers would have nothing to "
            f"do"
        )


def check(config: "RunConfig", nodes: Sequence[Resources], most: Resources | None = None) -> None:
    """Refuses a run whose workers and readers could never run together, in place of waiting for ever.

    Raises:
        ValueError: what was asked and what the cluster has.
    """
    cluster, stream = config.cluster, config.stream
    workers = cluster.fewest_workers
    readers = workers * stream.readers if isinstance(cluster.workers, int) else 0
    wanted = [bundle(config)] * workers + [{"CPU": stream.reader_cpus}] * readers
    if _fit(wanted, nodes) or (most is not None and _fit([_sum(wanted)], [most])):
        return
    has = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes) or "no node"
    grown = f", its autoscaler may reach {most.get('CPU', 0):g} CPU, {most.get('GPU', 0):g} GPU" if most else ""
    raise ValueError(
        f"the cluster cannot hold this run: {workers} workers of {cluster.cpus_per_worker:g} CPU and "
        f"{cluster.gpus_per_worker:g} GPU and {workers * stream.readers} readers of {stream.reader_cpus:g} CPU were "
        f"asked for (cluster.*, stream.readers, stream.reader_cpus); its nodes have: {has}{grown}"
    )


def _fit(wanted: Sequence[Resources], nodes: Sequence[Resources]) -> bool:
    free = [dict(node) for node in nodes]
    for ask in wanted:
        node = next((n for n in free if all(n.get(k, 0.0) + 1e-9 >= v for k, v in ask.items())), None)
        if node is None:
            return False
        for name, value in ask.items():
            node[name] = node.get(name, 0.0) - value
    return True


def _sum(wanted: Sequence[Resources]) -> dict[str, float]:
    return {name: sum(ask.get(name, 0.0) for ask in wanted) for name in {name for ask in wanted for name in ask}}
