"""Train a diffusion model on a shard set with Ray Train, or in this process with --local. Run again, it goes on from
its newest checkpoint; so does --resume with nothing but the run's output or MLflow run.

Ctrl-C once saves a checkpoint and stops; so do SIGTERM and a closed terminal. The trained model (EMA weights and card)
is left at OUTPUT/model.
"""

import socket
from collections.abc import Callable

from jobs import cli
from jobs.grace import said_at_start
from jobs.progress import bar
from jobs.terminal import Terminal
from pipeline.cluster.session import prepare_environment, session
from pipeline.config import RunConfig, load_config
from pipeline.data.sets.manifest import Manifest
from pipeline.storage.lease import Lease, hold
from pipeline.training import events as say

Sink = Callable[[say.Event], None]


def run(config: RunConfig, *, local: bool = False) -> say.Finished:
    """Train to the end of the budget, or until asked to stop. Needs a Ray session unless `local`.

    Raises:
        preflight.PreflightError: lists everything that keeps the run from starting. lease.Held: another job holds its
            output.
    """
    prepare_environment()
    from pipeline import preflight, resume

    config = resume.with_full_paths(config)
    manifest = preflight.check(config, *_checks(config, local))
    for line in preflight.later(config, manifest):
        cli.console.print(f"  [yellow]warning:[/] {line}", soft_wrap=True)
    with hold(config.output, f"jobs.train of '{config.name}'", _say) as lease:
        return _run(config, manifest, lease, local)


def _run(config: RunConfig, manifest: Manifest, lease: Lease, local: bool) -> say.Finished:
    from pipeline import assembly, resume
    from pipeline.tracking.runs import open_run
    from pipeline.training.stopping import stop_on_signals

    resume.keep(config)
    tracked = open_run(config, manifest, _say)
    status = "FAILED"
    try:
        with stop_on_signals(), bar("train", config.training.images, "images") as live:
            terminal = Terminal(live)

            def sinks(event: say.Event) -> None:
                if not isinstance(event, say.Moved):
                    tracked.handle(event)
                terminal.handle(event)
                if isinstance(event, say.Started) and (note := said_at_start(config.output, event.parameters)):
                    cli.console.print(f"  warning: {note}", soft_wrap=True)

            finished = _train_here(config, sinks, lease) if local else _fit(config, sinks, lease, tracked.backlog)
        status = "FINISHED" if finished.complete else "KILLED"
    finally:
        tracked.close(status)
    lease.claim.check()
    if finished.complete:
        url = assembly.export(config, manifest, tracked.run_id)
        cli.console.print(f"  trained on {finished.images:,} images; model at {url}", soft_wrap=True)
    else:
        cli.console.print(
            f"  stopped after {finished.images:,} images; the same command goes on from {finished.checkpoint}",
            soft_wrap=True,
        )
    return finished


def _say(line: str) -> None:
    cli.console.print(f"  {line}", soft_wrap=True)


def _checks(config: RunConfig, local: bool) -> list[Callable[[], None]]:
    if not local:
        from pipeline.cluster.train import checks

        return checks(config)
    return [lambda: _has_gpu(config), lambda: _has_room(config)]


def _has_gpu(config: RunConfig) -> None:
    import torch

    if config.cluster.gpus_per_worker and not torch.cuda.is_available():
        raise ValueError(
            f"cluster.gpus_per_worker is {config.cluster.gpus_per_worker:g}, and this machine has no GPU: set it to 0 "
            f"to train on the CPU"
        )


def _has_room(config: RunConfig) -> None:
    from pipeline.assembly import has_room

    has_room(config, 1)


def _fit(config: RunConfig, sinks: Sink, lease: Lease, backlog: Callable[[], int]) -> say.Finished:
    from pipeline.cluster.train import fit

    return fit(config, sinks, lease, backlog)


def _train_here(config: RunConfig, sinks: Sink, lease: Lease) -> say.Finished:
    from pipeline.assembly import device_here, train_here
    from pipeline.tracking.machine import Machine
    from pipeline.training.stopping import stop_on_signals

    machine = Machine(socket.gethostname(), 0, device_here(config))
    done = 0

    def stops() -> bool:  # asked once a step, after its forward and backward pass have begun
        nonlocal done
        sinks(say.Moved(done, done * config.stream.batch_size))
        done += 1
        return stop() or lease.lost

    with stop_on_signals() as stop:
        for event in train_here(config, stops, lease.claim):
            sinks(event)
            if isinstance(event, say.Started | say.RolledBack):
                done = event.step
            if (sampled := machine.after(event)) is not None:
                sinks(sampled)
            if isinstance(event, say.Finished):
                return event
    raise RuntimeError("the training ended without saying so: this is a bug")


def _foretell(config: RunConfig) -> None:
    """What a dry run says of the shard set, where there is one. ValueError where the run would not start with it."""
    from pipeline import assembly, preflight, storage

    if not storage.exists(storage.join(config.stream.url, "manifest.json")):
        cli.console.print(f"  no shard set at {config.stream.url} yet: run jobs.shard, then look again", soft_wrap=True)
        return
    manifest = assembly.data(config)
    assembly.fits(config.model, manifest)
    preflight.looked_at(config, manifest)
    for line in preflight.later(config, manifest):
        cli.console.print(f"  [yellow]warning:[/] {line}", soft_wrap=True)


def main() -> None:
    sections = ["stream", "model", "objective", "training", "cluster", "tracking"]
    parser = cli.parser("train", __doc__ or "", sections, run_file_needed=False)
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with this output folder, URL or MLflow run, by the run file that it kept"
    )
    parser.add_argument("--local", action="store_true", help="one process, no Ray")
    parser.add_argument(
        "--dry-run", action="store_true", help="print memory, steps and expected hours of this machine, and stop"
    )
    args = parser.parse_intermixed_args()
    if args.run_file is None and args.resume is None:
        parser.error("give a run file, or --resume RUN")

    def job() -> int:
        config = _config(args.run_file, args.overrides, args.resume)
        if args.dry_run:
            from jobs.estimate import show

            show(config)
            _foretell(config)
            return 0
        if args.local:
            finished = run(config, local=True)
        else:
            with session(config.cluster.address):
                finished = run(config)
        return 0 if finished.complete else 130

    cli.main(job)


def _config(run_file: str | None, overrides: list[str], resume: str | None) -> RunConfig:
    if resume is None:
        assert run_file is not None
        return load_config(run_file, overrides)
    from pipeline.resume import resumed

    return resumed(resume, [*([run_file] if run_file else []), *overrides])  # the first override stands in its place


if __name__ == "__main__":
    main()
