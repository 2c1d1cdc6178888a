"""Sampling and likelihood endpoints of a registered model, behind Ray Serve.

On a cluster (ray job submit, or RAY_ADDRESS) the endpoint is deployed and stays after the job has ended: run again it
is updated, `--status` shows it, `--stop` ends it. Without one it runs here until Ctrl-C. The page is at /, the API's
documentation at /docs.
"""

import contextlib
import os
import signal
import threading

from jobs import cli
from pipeline.cluster.session import prepare_environment, session
from pipeline.config import RunConfig, load_config, with_champion


def run(config: RunConfig) -> str:
    """Deploy `config.serving`; the URL, ready to be asked. Needs a Ray session."""
    prepare_environment()
    from pipeline.cluster import serve

    config = with_champion(config)
    url = serve.deploy(config.serving, config.tracking.uri)
    cli.console.print(f"serving {config.serving.model} at {url}  (page: {url}/, API: {url}/docs)", soft_wrap=True)
    return url


def show() -> None:
    """What is served: each replica, its models and their load."""
    from rich.table import Column, Table

    from pipeline.cluster import serve

    told = ("process", "model", "version", "digest", "in progress", "waiting", "evaluations owed", "done")
    table = Table(*(Column(name, overflow="fold") for name in told))
    for replica in serve.status():
        for model in replica["models"]:
            load = model["load"]
            counts = (load["live"], load["waiting"], load["queued_cost"], load["finished"])
            facts = (replica["process"], model["id"], model["version"] or "-", model["digest"][:12], *counts)
            table.add_row(*map(str, facts))
    cli.console.print(table)


def _wait_for_the_end() -> None:
    """Until SIGINT, SIGTERM or the end of the terminal (`cli.main`); further ones do not disturb the shutdown."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with contextlib.suppress(KeyboardInterrupt):
        ended.wait()


def main() -> None:
    parser = cli.parser("serve", __doc__ or "", ["serving", "tracking", "cluster"])
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--status", action="store_true", help="show the endpoint's replicas and their load")
    asked.add_argument("--stop", action="store_true", help="end the endpoint of the cluster")
    args = parser.parse_intermixed_args()

    def job() -> None:
        config = load_config(args.run_file, args.overrides)
        here = not (config.cluster.address or os.environ.get("RAY_ADDRESS"))
        if here and (args.stop or args.status):
            raise ValueError("there is no cluster here (set RAY_ADDRESS); an endpoint without one ends with Ctrl-C")
        with session(config.cluster.address):
            from pipeline.cluster import serve

            if args.stop or args.status:
                serve.shutdown() if args.stop else show()
                return
            try:
                run(config)
                if here:
                    _wait_for_the_end()
            finally:
                if here:
                    serve.shutdown()

    cli.main(job)


if __name__ == "__main__":
    main()
