"""Train a diffusion model on a shard set with Ray Train, or in this process with --local. Run again, it goes on from
its newest checkpoint.

Ctrl-C once saves a checkpoint and stops. The trained model (EMA weights and card) is left at OUTPUT/model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from jobs import cli
from jobs.progress import Bar, bar
from pipeline.cluster.session import prepare_environment, session
from pipeline.config import RunConfig, load_config
from pipeline.training import events as say


@dataclass
class Terminal:
    """The loop's events on a terminal: a bar with loss and held-out bits/dim, and lines for what one must know."""

    live: Bar
    notes: dict[str, str] = field(default_factory=dict)

    def handle(self, event: say.Event) -> None:
        match event:
            case say.Started():
                self._started(event)
            case say.Prepared():
                self._prepared(event)
            case say.Step():
                self.notes["loss"] = f"loss {event.metrics['loss']:.4f}"
            case say.Evaluated():
                value, error = event.metrics["held_out/bits_per_dim"], event.metrics["held_out/standard_error"]
                self.notes["held_out"] = f"held-out {value:.3f} ± {error:.3f} bits/dim"
            case say.Skipped():
                cli.console.print(f"  step {event.step} skipped: {event.reason}")
            case say.CheckpointFailed():
                cli.console.print(f"  [red]checkpoint {event.checkpoint} failed:[/] {event.reason}; training goes on")
            case _:
                pass
        self.live.update(event.images, ", ".join(self.notes.values()))

    def _started(self, event: say.Started) -> None:
        self.live.total = event.total_images
        for line in event.rejected:
            cli.console.print(f"  not used: {line}")
        start = f"going on from {event.checkpoint}" if event.checkpoint else "from the start"
        cli.console.print(
            f"  {event.parameters:,} parameters, batch {event.batch_size}, {event.world_size} workers, {start}"
        )

    def _prepared(self, event: say.Prepared) -> None:
        tried = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in event.forward_backward_s.items())
        chosen = f"{event.precision} (forward and backward: {tried})" if tried else event.precision
        work, peak = event.flops_per_image / 1e9, event.peak_flops / 1e12
        cli.console.print(f"  {chosen}; {work:.2f} GFLOP an image, matrix products at {peak:.2f} TFLOP/s")


def run(config: RunConfig, *, local: bool = False) -> say.Finished:
    """Train to the end of the budget, or until asked to stop. Needs a Ray session unless `local`."""
    prepare_environment()
    from pipeline import assembly
    from pipeline.data.manifest import load as load_manifest
    from pipeline.tracking.runs import open_run

    manifest = load_manifest(config.stream.url)
    assembly.fits(config.model, manifest)
    tracked = open_run(config, manifest, lambda line: cli.console.print(f"  {line}"))
    status = "FAILED"
    try:
        with bar("train", config.training.images, "images") as live:
            terminal = Terminal(live)

            def sinks(event: say.Event) -> None:
                tracked.handle(event)
                terminal.handle(event)

            finished = _train_here(config, sinks) if local else _fit(config, sinks)
        status = "FINISHED" if finished.reason == "budget" else "KILLED"
    finally:
        tracked.close(status)
    if finished.reason == "budget":
        url = assembly.export(config, manifest, tracked.run_id)
        cli.console.print(f"  trained on {finished.images:,} images; model at {url}")
    else:
        cli.console.print(
            f"  stopped after {finished.images:,} images; the same command goes on from {finished.checkpoint}"
        )
    return finished


def _fit(config: RunConfig, sinks: Callable[[say.Event], None]) -> say.Finished:
    from pipeline.cluster.train import fit

    return fit(config, sinks)


def _train_here(config: RunConfig, sinks: Callable[[say.Event], None]) -> say.Finished:
    from pipeline.assembly import train_here
    from pipeline.training.stopping import stop_on_signals

    with stop_on_signals() as stop:
        for event in train_here(config, stop):
            sinks(event)
            if isinstance(event, say.Finished):
                return event
    raise RuntimeError("the training ended without saying so: this is a bug")


def main() -> None:
    parser = cli.parser("train", __doc__ or "", ["stream", "model", "objective", "training", "cluster", "tracking"])
    parser.add_argument("--local", action="store_true", help="one process, no Ray")
    parser.add_argument(
        "--dry-run", action="store_true", help="print memory, steps and expected hours of this machine, and stop"
    )
    args = parser.parse_intermixed_args()

    def job() -> int:
        config = load_config(args.run_file, args.overrides)
        if args.dry_run:
            from jobs.estimate import show

            show(config)
            return 0
        if args.local:
            finished = run(config, local=True)
        else:
            with session(config.cluster.address):
                finished = run(config)
        return 0 if finished.reason == "budget" else 130

    cli.main(job)


if __name__ == "__main__":
    main()
