"""What an evaluation measures and by how much it is judged."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pipeline.choose import choose
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.model import SCORED_TOGETHER, Sampling
from pipeline.ranges import Range, check


@dataclass(frozen=True)
class EvaluationConfig:
    """How a trained model is measured."""

    samples: Annotated[int, "images sampled and judged, classes in equal numbers, without guidance", Range(ge=2)] = 1000
    sampling: Sampling = field(default_factory=Sampling)
    estimators: Annotated[dict[str, dict[str, Any]], "likelihood estimators by name, each with its options"] = field(
        default_factory=lambda: {"vlb": {}, "ode": {}}
    )
    images: Annotated[int, "held-out images that are scored, the first ones; 0: all", Range(ge=0)] = 0
    judge_images: Annotated[int, "training images, at most, that samples are judged by", Range(ge=2)] = 20_000
    part: Annotated[int, "images of one piece of work", Range(ge=2)] = 125
    chunk: Annotated[
        int,
        "rows of every network call of a score, which does not depend on what else is scored: more is faster on a GPU",
        Range(ge=1),
    ] = SCORED_TOGETHER
    features: Annotated[str, "where the Frechet distance is taken: auto, classifier, pixels"] = "auto"
    near_copy_share: Annotated[
        float, "share of held-out images counted as near-copies: sets the distance", Range(gt=0, lt=1)
    ] = 0.01
    resamples: Annotated[int, "bootstrap resamples of the Frechet distance", Range(ge=2)] = 200
    min_agreement: Annotated[
        float | None, "share of samples with the asked class that is demanded; null: none", Range(ge=0, le=1)
    ] = None
    max_frechet_ratio: Annotated[float | None, "Frechet distance demanded, in floors; null: none", Range(gt=0)] = None
    seed: Annotated[int, "keys samples, scores, judges and resamples"] = 0

    def __post_init__(self) -> None:
        check(self, "evaluation")
        if self.images == 1:
            raise ValueError("evaluation.images must be 0 (all) or at least 2, got 1")
        if self.features not in ("auto", "classifier", "pixels"):
            raise ValueError(f"evaluation.features must be auto, classifier or pixels, got '{self.features}'")


def unmeasurable(config: EvaluationConfig, classes: int, held_out: int) -> list[str]:
    """What of an evaluation cannot be done with a set of so many classes (0: none) and held-out images, a line each.

    Raises:
        ValueError: no such estimator or sampler.
    """
    for name in config.estimators:
        choose(ESTIMATORS, name, "evaluation.estimators: estimator")
    choose(SAMPLERS, config.sampling.sampler, "evaluation.sampling.sampler: sampler")
    problems: list[str] = []
    if held_out < 2:
        problems.append(
            f"an evaluation needs at least 2 held-out images, the set has {held_out}: shard it with a larger "
            f"shard.held_out"
        )
    if classes < 2:
        have = "one class" if classes else "no classes"
        if config.min_agreement is not None:
            problems.append(
                f"evaluation.min_agreement demands {config.min_agreement:g}, and with {have} there is nothing to tell "
                f"apart: set it to null"
            )
        if config.features == "classifier":
            problems.append(f"evaluation.features 'classifier' needs at least two classes, there is {have}: use auto")
    return problems
