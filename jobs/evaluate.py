"""Measure a trained model: held-out bits/dim with standard errors, Fréchet distance, class agreement, near-copies of training images.

The result goes to OUTPUT/evaluation, to the MLflow run of the training, and to the terminal. An evaluation of the same model, data and
settings that is already there is shown, not repeated.
"""

import json
from dataclasses import asdict

from rich.table import Table

from jobs import cli
from jobs.progress import bar
from pipeline.cluster.session import prepare_environment, session
from pipeline.config import RunConfig, load_config
from pipeline.data import storage
from pipeline.data.manifest import load as load_manifest
from pipeline.data.stream import held_out, train_images
from pipeline.evaluation.features import Labelled
from pipeline.evaluation.measure import Evaluation, Row, evaluate, load, passed, rows, save
from pipeline.model import Model
from pipeline.model import load as load_model


def model_url(config: RunConfig) -> str:
    """Where a run leaves its trained model."""
    return storage.join(config.output, "model")


def show(table: list[Row]) -> None:
    """The result table on the terminal."""
    marks = {None: "", True: "[green]✓[/]", False: "[red]✗[/]"}
    shown = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    for row in table:
        shown.add_row(marks[row.ok], row.name, f"[bold]{row.value}[/]", f"[dim]{row.detail}[/]")
    cli.console.print(shown)


def run(config: RunConfig, model: Model | None = None) -> Evaluation:
    """Evaluate the run's model. Needs a Ray session."""
    prepare_environment()
    from pipeline.cluster.batch import ray_worker

    model = model or load_model(model_url(config))
    manifest = load_manifest(config.stream.url, model.card["data"]["digest"])
    url = storage.join(config.output, "evaluation")
    key = {"model": model.digest, "data": manifest.digest, "evaluation": asdict(config.evaluation)}
    found = load(url, key)
    if found is None:
        held, train = held_out(manifest), train_images(manifest, config.evaluation.judge_images)
        with bar("evaluate", 1, "images") as live:

            def progress(what: str, done: int, total: int) -> None:
                live.show(what, done, total)

            worker = ray_worker(model, config.cluster.cpus_per_worker, config.cluster.gpus_per_worker)
            found = evaluate(
                worker,
                config.model.classes,
                Labelled(train.images, train.labels),
                Labelled(held.images, held.labels),
                config.evaluation,
                progress,
            )
        save(url, found, key)
        _track(config, model, found)
    show(rows(found, config.evaluation))
    return found


def _track(config: RunConfig, model: Model, found: Evaluation) -> None:
    from pipeline.tracking.runs import log_evaluation

    run_id = model.card.get("mlflow_run")
    if run_id:
        log_evaluation(config.tracking.uri, run_id, found.metrics(), int(model.card["images_seen"]))


def main() -> None:
    parser = cli.parser("evaluate", __doc__ or "", ["stream", "model", "evaluation", "cluster", "tracking"])
    parser.add_argument("--model", help="another model than the run's: models:/NAME@alias or a model directory")
    parser.add_argument("--json", action="store_true", help="print the metrics as one line of JSON as well")
    args = parser.parse_args()

    def job() -> int:
        import pipeline

        config = load_config(args.run_file, args.overrides)
        model = pipeline.load(args.model, tracking_uri=config.tracking.uri) if args.model else None
        with session(config.cluster.address):
            found = run(config, model)
        if args.json:
            print(json.dumps(found.metrics()))
        return 0 if passed(rows(found, config.evaluation)) else 1

    cli.main(job)


if __name__ == "__main__":
    main()
