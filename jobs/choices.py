"""What a run file may choose by name (network, schedule, objective, sampler, estimator), for `--help`.

Every option with its default and meaning, read from the tables themselves.
"""

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

SECTIONS = {  # which job's help shows which tables
    "model": ("model.network", "model.schedule"),
    "objective": ("objective",),
    "evaluation": ("evaluation.sampling.sampler", "evaluation.estimators"),
    "serving": ("serving.sampler",),
}


def tables() -> dict[str, Mapping[str, Any]]:
    """By the key that chooses: name -> what takes the options."""
    from pipeline.backbones import BACKBONES
    from pipeline.diffusion.likelihood.estimators import ESTIMATORS
    from pipeline.diffusion.objectives.objective import OBJECTIVES
    from pipeline.diffusion.sampling.samplers import SAMPLERS
    from pipeline.diffusion.schedule import SCHEDULES

    return {
        "model.network": BACKBONES,
        "model.schedule": SCHEDULES,
        "objective": OBJECTIVES,
        "evaluation.sampling.sampler": SAMPLERS,
        "evaluation.estimators": ESTIMATORS,
        "serving.sampler": SAMPLERS,
    }


def describe(sections: typing.Sequence[str]) -> str:
    """The choices that belong to these sections of the run file."""
    known = tables()
    keys = [key for section, keys in SECTIONS.items() if section in sections for key in keys]
    return "\n".join(line for key in keys for line in _table(key, known[key]))


def options(entry: Any) -> list[inspect.Parameter]:
    """What a run file may give to one entry: a sampler, an estimator, or what is called with its options."""
    if hasattr(entry, "procedure"):
        return list(entry.options.values())
    return list(inspect.signature(entry).parameters.values())


def _table(key: str, table: Mapping[str, Any]) -> Iterator[str]:
    yield f"\nnames and options of {key}:"
    for name, entry in table.items():
        made = getattr(entry, "procedure", entry)
        yield f"\n  {name}:  {_first_sentence(made)}"
        hints = typing.get_type_hints(made, include_extras=True)
        for option in options(entry):
            meaning = _meaning(made, option.name, hints.get(option.name, option.annotation))
            default = "null" if option.default is None else option.default
            shown = "required" if default is option.empty else default
            yield f"    {option.name:<24} {meaning} [{shown}]"


def _first_sentence(made: Callable[..., Any]) -> str:
    paragraph = (inspect.getdoc(made) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def _meaning(made: Callable[..., Any], name: str, annotation: Any) -> str:
    """The text beside an annotated type, else what the docstring says of `name:`, else the type."""
    if typing.get_origin(annotation) is Annotated:
        return next((part for part in typing.get_args(annotation)[1:] if isinstance(part, str)), "")
    text = " ".join((inspect.getdoc(made) or "").split())
    if told := re.search(rf"\b{name}: ([^.;]+)", text):
        return told[1]
    return re.sub(r"\b[a-z_]+\.", "", inspect.formatannotation(annotation))
