"""A training's events on a terminal: a bar with loss and held-out bits/dim, and lines for what one must know."""

from dataclasses import dataclass, field

from rich.markup import escape

from jobs import cli
from jobs.progress import Bar
from pipeline.training import events as say
from pipeline.training.stopping import leave_terminal


@dataclass
class Terminal:
    live: Bar
    notes: dict[str, str] = field(default_factory=dict)

    def handle(self, event: say.Event) -> None:
        """A terminal that is gone (closed, a broken pipe) must not end the training."""
        try:
            self._show(event)
        except OSError:
            leave_terminal()

    def _show(self, event: say.Event) -> None:
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
                _line(f"step {event.step} skipped: {escape(event.reason)}")
            case say.RolledBack():
                _line(f"[red]from step {event.from_step} back to {event.step}:[/] {escape(event.reason)}")
            case say.CheckpointFailed():
                what = "older checkpoints cannot be removed" if event.committed else f"{event.checkpoint} not saved"
                _line(f"[red]{what}:[/] {escape(event.reason)}; training goes on")
            case say.Hung():
                _line(f"[red]workers stood still, and start anew:[/] {escape(event.reason)}; stacks in {event.log}")
            case _:
                pass
        self.live.update(event.images, ", ".join(self.notes[key] for key in ("loss", "held_out") if key in self.notes))

    def _started(self, event: say.Started) -> None:
        self.live.total = event.total_images
        for line in event.rejected:
            _line(f"not used: {escape(line)}")
        start = f"going on from {event.checkpoint}" if event.checkpoint else "from the start"
        workers = "1 worker" if event.world_size == 1 else f"{event.world_size} workers"
        _line(f"{event.parameters:,} parameters, batch {event.batch_size}, {workers}, {start}")

    def _prepared(self, event: say.Prepared) -> None:
        tried = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in event.forward_backward_s.items())
        chosen = f"{event.precision} (forward and backward: {tried})" if tried else event.precision
        work, peak = event.flops_per_image / 1e9, event.peak_flops / 1e12
        _line(f"{chosen}; {work:.2f} GFLOP an image, matrix products at {peak:.2f} TFLOP/s")


def _line(text: str) -> None:
    cli.console.print(f"  {text}", soft_wrap=True)
