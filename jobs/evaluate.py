"""Measure a trained model: held-out bits/dim with standard errors, Fréchet distance, class agreement, near-copies of
training images.

The result goes to OUTPUT/evaluation, to the MLflow run of the training, and to the terminal. An evaluation of the same
model, data and settings that is already there is shown, not repeated.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from jobs import cli
from jobs.progress import phases
from pipeline import storage, trained
from pipeline.cluster.session import prepare_environment, session
from pipeline.config import RunConfig, load_config
from pipeline.data.reading.stream import held_out, train_images
from pipeline.data.sets.manifest import load as load_manifest
from pipeline.evaluation.features import Labelled
from pipeline.evaluation.measure import Evaluation, Row, evaluate, load, passed, rows, save
from pipeline.evaluation.work import Worker, here
from pipeline.model import Model


def model_url(config: RunConfig) -> str:
    """Where a run leaves its trained model."""
    return storage.join(config.output, "model")


def trained_model(config: RunConfig, device: str = "cpu") -> Model:
    """The run's model; says where it is a half-trained one. ValueError: there is none yet."""
    model = trained.load(config.output, device)
    if (line := trained.half(model)) is not None:
        cli.console.print(f"  {line}", soft_wrap=True)
    return model


def show(table: list[Row]) -> None:
    """The result table on the terminal: what and how much on a line, the rest below it."""
    marks = {None: " ", True: "[green]✓[/]", False: "[red]✗[/]"}
    for row in table:
        cli.console.print(f"{marks[row.ok]} {row.name:<48}[bold]{row.value}[/]", soft_wrap=True)
        if row.detail:
            cli.console.print(f"    [dim]{row.detail}[/]", soft_wrap=True)


def _place(config: RunConfig) -> str:
    return storage.join(config.output, "evaluation")


def _key(config: RunConfig, model: Model) -> dict[str, Any]:
    """The facts that an evaluation belongs to."""
    data = model.card["data"]["digest"]
    return {"model": model.digest, "data": data, "evaluation": asdict(config.evaluation)}


def stored(config: RunConfig) -> Evaluation | None:
    """The evaluation of the run's model, as it is now, with these settings; None where there is none."""
    return load(_place(config), _key(config, trained.load(config.output)))


def run(config: RunConfig, model: Model | None = None, *, local: bool = False) -> Evaluation:
    """Evaluate the run's model. Needs a Ray session unless `local`."""
    prepare_environment()
    model = model or trained_model(config)
    found = load(_place(config), _key(config, model))
    if found is None:
        found = _measure(config, model, local)
        save(_place(config), found, _key(config, model))
        _track(config, model, found)
    show(rows(found, config.evaluation))
    return found


def _worker(config: RunConfig, model: Model, local: bool) -> Worker:
    if local:
        if config.cluster.gpus_per_worker > 0:
            model.denoiser.to("cuda")
        return here(model)
    from pipeline.cluster.batch import ray_worker

    return ray_worker(model, 1.0, config.cluster.gpus_per_worker)


def _measure(config: RunConfig, model: Model, local: bool) -> Evaluation:
    manifest = load_manifest(config.stream.url, model.card["data"]["digest"])
    held, train = held_out(manifest), train_images(manifest, config.evaluation.judge_images)
    with phases("images") as progress:
        return evaluate(
            _worker(config, model, local),
            model.conditioner,
            Labelled(train.images, train.labels, train.tags),
            Labelled(held.images, held.labels, held.tags),
            config.evaluation,
            progress,
        )


def _track(config: RunConfig, model: Model, found: Evaluation) -> None:
    from pipeline.tracking.results import log_results

    run_id = model.card.get("mlflow_run")
    if run_id:
        log_results(config.tracking.uri, run_id, found.metrics(), int(model.card["images_seen"]), found.samples)


def main() -> None:
    parser = cli.parser("evaluate", __doc__ or "", ["stream", "model", "evaluation", "cluster", "tracking"])
    parser.add_argument("--model", help="another model than the run's: models:/NAME@alias or a model directory")
    parser.add_argument("--json", action="store_true", help="print the metrics as one line of JSON as well")
    parser.add_argument("--local", action="store_true", help="one process, no Ray")
    args = parser.parse_intermixed_args()

    def job() -> int:
        import pipeline

        config = load_config(args.run_file, args.overrides)
        model = pipeline.load(args.model, tracking_uri=config.tracking.uri) if args.model else None
        with nullcontext() if args.local else session(config.cluster.address):
            found = run(config, model, local=args.local)
        if args.json:
            print(json.dumps(found.metrics()))
        return 0 if passed(rows(found, config.evaluation)) else 1

    cli.main(job)


if __name__ == "__main__":
    main()
