"""Sampling and likelihood endpoints of a registered model, behind Ray Serve.

On a cluster (ray job submit, or RAY_ADDRESS) the endpoint is deployed and stays after the job has ended; `--stop` ends
it. Without one it runs here until Ctrl-C. The page is at /, the API's documentation at /docs.
"""

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


def _wait_for_the_end() -> None:
    """Until SIGINT or SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


def main() -> None:
    parser = cli.parser("serve", __doc__ or "", ["serving", "tracking", "cluster"])
    parser.add_argument("--stop", action="store_true", help="end the endpoint of the cluster")
    args = parser.parse_intermixed_args()

    def job() -> None:
        config = load_config(args.run_file, args.overrides)
        here = not (config.cluster.address or os.environ.get("RAY_ADDRESS"))
        with session(config.cluster.address):
            from pipeline.cluster import serve

            if args.stop:
                if here:
                    raise ValueError(
                        "--stop: there is no cluster here (set RAY_ADDRESS); an endpoint without one ends with Ctrl-C"
                    )
                serve.shutdown()
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
