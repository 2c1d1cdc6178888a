"""The run's model becomes version N of models:/NAME, its card holding lineage and measured quality, and an alias points
to it.

Refused where the evaluation misses what the run file demands of it (evaluation.min_agreement,
evaluation.max_frechet_ratio) or a gate of --gates, a file of lines such as `bits_per_dim_vlb: {at_most: 2.9}`: the
whole 95% interval must meet the bound. Measures: bits_per_dim_ESTIMATOR, frechet_distance, frechet_ratio,
class_agreement, near_copies.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from jobs import cli
from jobs.evaluate import stored, trained_model
from pipeline import interchange, storage
from pipeline import model as models
from pipeline.choose import choose
from pipeline.config import RunConfig, load_config
from pipeline.evaluation import gates
from pipeline.evaluation.measure import Evaluation, rows
from pipeline.tracking.registry import Version, register
from pipeline.trained import half

CHAMPION = "champion"


def run(
    config: RunConfig, found: Evaluation | None, alias: str | None = None, required: Sequence[gates.Gate] = ()
) -> Version:
    """Register the run's model. `found`: its evaluation, for the card; None registers it unmeasured. alias: None is
    `champion`, or no alias for a half-trained model.

    Raises:
        ValueError: the evaluation misses what the run file or a gate demands; names what.
    """
    model = trained_model(config)
    card = dict(model.card)
    metrics: dict[str, float] = {}
    if found is not None:
        table = rows(found, config.evaluation)
        missed = [f"{row.name} is {row.value}, {row.detail}" for row in table if row.ok is False]
        missed += gates.missed(required, found)
        if missed:
            raise ValueError(f"{config.registered_model} is not registered: {'; '.join(missed)}")
        card |= found.card()
        metrics = {f"evaluation/{name}": value for name, value in found.metrics().items()}
    url = storage.join(config.output, "registered")
    models.save(url, config.model, model.denoiser.state_dict(), card)
    if alias is None and half(model) is None:
        alias = CHAMPION
    tags = {"data": card["data"]["digest"], "code": card["version"], "run": card.get("name", config.name)}
    tags |= {} if half(model) is None else {"half_trained": f"{card['images_seen']} images"}
    version = register(
        url,
        config.registered_model,
        tracking_uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        run_id=card.get("mlflow_run", ""),
        alias=alias,
        tags=tags,
        metrics=metrics,
    )
    moved = f"alias {alias}" if alias else "no alias moved (name one with --alias)"
    cli.console.print(f"  {version.url}, {moved}, digest {version.digest[:12]}")
    return version


def load_gates(path: str) -> list[gates.Gate]:
    """Gates from a YAML file. ValueError where it is none; names the line."""
    import yaml

    try:
        return gates.from_plain(yaml.safe_load(Path(path).read_text(encoding="utf-8")), path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def export(config: RunConfig, form: str, folder: str) -> None:
    """Write the run's model in another library's form. ValueError where that cannot express it; names what."""
    choose(EXPORTS, form, "form to export to")(trained_model(config), folder)
    cli.console.print(f"  the model for {form} at {folder}")


EXPORTS: dict[str, Callable[[models.Model, str], None]] = {"diffusers": interchange.export}


def main() -> None:
    parser = cli.parser("register", __doc__ or "", ["evaluation", "tracking"])
    parser.add_argument(
        "--alias", help="alias that will point to the version [champion; none for a half-trained model]"
    )
    parser.add_argument(
        "--export",
        nargs=2,
        metavar=("diffusers", "DIR"),
        help="also write DIR, which DDPMPipeline.from_pretrained opens",
    )
    parser.add_argument("--gates", metavar="FILE", help="refuse a model whose evaluation does not pass these bounds")
    parser.add_argument("--unmeasured", action="store_true", help="register without an evaluation")
    args = parser.parse_intermixed_args()

    def job() -> None:
        config = load_config(args.run_file, args.overrides)
        required = load_gates(args.gates) if args.gates else []
        if required and args.unmeasured:
            raise ValueError("--gates needs an evaluation: leave out --unmeasured")
        found = None if args.unmeasured else _stored(config)
        if args.export:
            export(config, *args.export)
        run(config, found, args.alias, required)

    cli.main(job)


def _stored(config: RunConfig) -> Evaluation:
    found = stored(config)
    if found is None:
        raise ValueError(f"the model of {config.output} has no evaluation: run jobs.evaluate first, or --unmeasured")
    return found


if __name__ == "__main__":
    main()
