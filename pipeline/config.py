"""The run file: one complete, typed, strict YAML file for a whole run, and `a.b=c` overrides on the command line.

Each section is a dataclass that lives beside its owner. An unknown key is an error that names the valid ones; the help
of a key is the text beside its type.
"""

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from pipeline import places
from pipeline.choose import did_you_mean
from pipeline.data.making.shards import ShardConfig
from pipeline.data.reading.stream import StreamConfig
from pipeline.evaluation import EvaluationConfig
from pipeline.interchange import evened
from pipeline.model import ModelConfig
from pipeline.ranges import Range, check, range_of
from pipeline.serving.config import ServingConfig
from pipeline.training.config import TrainingConfig


@dataclass(frozen=True)
class ClusterConfig:
    """What a run asks of Ray."""

    address: Annotated[
        str | None, "Ray cluster to join; null: the one around this job (RAY_ADDRESS), else start one here"
    ] = None
    workers: Annotated[
        int | tuple[int, int],
        "training processes (DDP ranks); [min, max]: as many of them as the nodes hold",
        Range(ge=1),
    ] = 1
    resize_s: Annotated[
        float, "seconds between two looks whether [min, max] workers can become more", Range(ge=0.1)
    ] = 60.0
    cpus_per_worker: Annotated[float, "CPU cores a training process asks for", Range(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, "GPUs a training process asks for; 0 trains on CPU with gloo", Range(ge=0)] = 0.0
    max_failures: Annotated[int, "restarts from the newest checkpoint before a run is given up; -1 for no limit"] = 3
    hang_factor: Annotated[
        float, "workers are restarted where a step takes this many times the median step", Range(ge=1)
    ] = 20.0
    hang_floor_s: Annotated[float, "but never before so many seconds without a step; 0: never", Range(ge=0)] = 300.0

    def __post_init__(self) -> None:
        check(self, "cluster")
        if self.fewest_workers > self.most_workers:
            raise ValueError(f"cluster.workers must be a number or [min, max], got {self.workers}")

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs and models are recorded. Credentials come from the environment (MLFLOW_TRACKING_USERNAME, ...), never
    from here.
    """

    uri: Annotated[str, "MLflow server (http://...) or database (sqlite:///path.db)"] = "sqlite:///artifacts/mlflow.db"
    experiment: Annotated[str, "MLflow experiment"] = "raydiffusion"
    model: Annotated[str | None, "name in the model registry; null: the run's name"] = None


@dataclass(frozen=True)
class RunConfig:
    """A whole run: shard, train, evaluate, register, serve."""

    name: Annotated[str, "name of the run; starting it again continues it"]
    output: Annotated[str, "where checkpoints, models and reports go: a folder or s3://bucket/prefix"]
    shard: ShardConfig
    stream: StreamConfig
    model: ModelConfig
    root: Annotated[
        str | None,
        "folder that all nodes see, or s3://bucket/prefix: relative paths of this file lie there; null: here",
    ] = None
    seed: Annotated[int, "keys the order of samples and every random draw"] = 0
    init: Annotated[
        str | None, "start from these weights: models:/NAME@alias, a model directory or a diffusers folder; null: fresh"
    ] = None
    export: Annotated[
        str | None,
        "diffusers: the end of the training leaves OUTPUT/diffusers too, and where a U-Net's norm_groups is not given "
        "it is what fits there; null: nothing",
    ] = None
    objective: Annotated[dict[str, Any], "training objective: name and its options"] = field(
        default_factory=lambda: {"name": "simple"}
    )
    training: TrainingConfig = field(default_factory=TrainingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name[0] in "-.":
            raise ValueError(f"name must be letters, digits, '-', '_' and '.', got '{self.name}'")
        if self.export not in (None, "diffusers"):
            raise ValueError(f"export must be diffusers or null, got '{self.export}'")

    @property
    def registered_model(self) -> str:
        return self.tracking.model or self.name


Section = Mapping[str, Any]


def _bare(annotation: Any) -> Any:
    """A type without its Annotated help and without `| None`."""
    if typing.get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        if len(inner) == 1:
            return inner[0]
    return annotation


def _check_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for the first key that `cls` has not, with the valid ones and the nearest match."""
    hints = get_type_hints(cls)
    valid = [f.name for f in fields(cls)]
    for key, value in values.items():
        if key not in valid:
            hint = did_you_mean(key, valid)
            place = f"in section '{where}'" if where else "at the top"
            raise ValueError(f"unknown key '{key}' {place}{hint}; valid keys: {', '.join(valid)}")
        section = hints[key]
        if is_dataclass(section):
            path = f"{where}.{key}" if where else key
            if not isinstance(value, Mapping):
                raise ValueError(f"'{path}' is a section with keys of its own, got {value!r}")
            _check_keys(typing.cast(type, section), typing.cast(Section, value), path)


def from_plain(values: Mapping[str, Any], source: str = "run configuration") -> RunConfig:
    """A RunConfig from nested plain values.

    Raises:
        ValueError: unknown key, missing key, or a value of the wrong type or range; names the key and `source`.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        _check_keys(RunConfig, values, "")
        config = TypeAdapter(RunConfig).validate_python(dict(values))
        if config.export is None:
            return config
        return replace(config, model=replace(config.model, network=evened(config.model.network)))
    except ValidationError as error:
        problems: list[str] = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            got = (
                "" if problem["type"] in ("missing", "value_error", "dataclass_type") else f", got {problem['input']!r}"
            )
            problems.append(f"{key}: {message}{got}" if key else message)
        raise ValueError(f"{source}: " + "; ".join(problems)) from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply overrides such as `training.learning_rate=1e-3`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an override that is not `key=value`, anything `from_plain` refuses, or, in a submitted
            job, a path that only this process would find.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no run file at {path}; complete ones are in jobs/configs/")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    config = parse(text, overrides, path)
    if places.in_submitted_job():
        places.refuse_private(to_plain(config))
    return config


def parse(text: str, overrides: Sequence[str], source: str) -> RunConfig:
    """`load_config` of a run file's text; `source` names it in errors."""
    import yaml

    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected sections (name, output, shard, ...), got {type(values).__name__}")
    for path, value in sorted(map(_override, overrides), key=lambda item: item[0][-1] != "name"):  # a new choice first
        values = _laid(values, path, value, RunConfig)
    config = from_plain(typing.cast(Section, values), source)
    return config if config.root is None else from_plain(places.under(config.root, to_plain(config)), source)


def _override(text: str) -> tuple[list[str], Any]:
    """`section.key=value` as its path and its typed value."""
    import yaml
    from omegaconf import OmegaConf

    key, equals, value = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ValueError(f"'{text}' is not an override; write section.key=value, for example training.images=100000")
    try:
        typed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    except yaml.YAMLError as error:
        raise ValueError(f"override '{text}' has no valid value: {' '.join(str(error).split())}") from None
    return key.split("."), typed["value"]


def _laid(old: Any, path: Sequence[str], value: Any, kind: Any) -> Any:
    """`value` laid at `path` below `old`, whose type is `kind`.

    A mapping laid on a section changes its keys. One laid on a choice (a mapping with a name) changes its options, or
    starts afresh where the name is another: they were the other's. Any other mapping is a table of names: replaced.
    """
    before: dict[str, Any] = dict(typing.cast(Section, old)) if isinstance(old, Mapping) else {}
    if path:
        key, *rest = path
        if path == ["name"] and not is_dataclass(kind) and before.get("name", value) != value:
            before = {}
        child = _bare(get_type_hints(kind).get(key)) if is_dataclass(kind) else None
        before[key] = _laid(before.get(key), rest, value, child)
        return before
    if isinstance(value, Mapping):
        given = typing.cast(Section, value)
        if is_dataclass(kind):
            for key, item in given.items():
                before = _laid(before, [str(key)], item, kind)
            return before
        if "name" in before and given.get("name", before["name"]) == before["name"]:
            return {**before, **given}
    return typing.cast(Any, value)


def with_champion(config: RunConfig) -> RunConfig:
    """The same run, its endpoint serving the champion where no model is named."""
    if config.serving.model is not None:
        return config
    return replace(config, serving=replace(config.serving, model=f"models:/{config.registered_model}@champion"))


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Nested plain values; `from_plain` takes them back."""
    return asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The complete run file, every default written out."""
    import json

    import yaml

    return yaml.safe_dump(json.loads(json.dumps(to_plain(config))), sort_keys=False, width=120)


def _default(item: "Field[Any]") -> str:
    if item.default is not MISSING:
        return "null" if item.default is None else str(item.default)
    if item.default_factory is not MISSING:
        return str(item.default_factory())
    return "required"


def describe(sections: Sequence[str] | None = None) -> str:
    """The keys of the run file with type, default and meaning; `sections` limits it to those a job reads."""
    return "\n".join(_describe(RunConfig, "", None if sections is None else set(sections)))


def _describe(cls: type, prefix: str, sections: set[str] | None) -> Iterator[str]:
    hints = get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        bare = _bare(hints[item.name])
        if is_dataclass(bare):
            if not prefix and sections is not None and item.name not in sections:
                continue
            yield f"\n{prefix}{item.name}:  {(bare.__doc__ or '').strip().splitlines()[0]}"
            yield from _describe(bare, f"{prefix}{item.name}.", None)  # pyright: ignore[reportArgumentType]
            continue
        meta = get_args(hints[item.name])[1:] if typing.get_origin(hints[item.name]) is Annotated else ()
        text = next((m for m in meta if isinstance(m, str)), "")
        allowed = f" ({found})" if (found := range_of(hints[item.name])) else ""
        yield f"  {prefix}{item.name:<{max(1, 30 - len(prefix))}} {text}{allowed} [{_default(item)}]"
