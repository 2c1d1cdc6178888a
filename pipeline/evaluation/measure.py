"""The whole evaluation of a model: likelihood, sample quality, near-copies; its numbers, its table and its file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from pipeline import storage
from pipeline.conditioner import Conditioner
from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.evaluation.bits_per_dim import Scores, score
from pipeline.evaluation.config import EvaluationConfig, unmeasurable
from pipeline.evaluation.features import Labelled, features_of, judgeable
from pipeline.evaluation.memorisation import Memorisation, memorisation
from pipeline.evaluation.quality import Agreement, class_agreement, frechet_to_held_out
from pipeline.evaluation.statistics import Compared, Estimate
from pipeline.evaluation.work import Worker, finish, sample_work
from pipeline.model import Scoring

FILES = ("evaluation.json", "evaluation.safetensors")

Progress = Callable[[str, int, int], None]  # (what, images done, images in all)


@dataclass(frozen=True)
class Evaluation:
    """What was found. samples: uint8 (n, C, H, W); asked: (n,) the class of each, None for a model without classes.

    scores: by estimator. agreement: None where there are fewer than two
    classes. frechet: to held-out images, in `features`.
    """

    scores: dict[str, Scores]
    agreement: Agreement | None
    frechet: Compared
    features: str
    copies: Memorisation
    samples: Tensor
    asked: Tensor | None

    def metrics(self) -> dict[str, float]:
        """Flat numbers, for a tracker."""
        found: dict[str, float] = {}
        for name, scores in self.scores.items():
            found[f"held_out_bits_per_dim_{name}"] = scores.mean
            found[f"held_out_bits_per_dim_{name}_standard_error"] = scores.standard_error
        if self.agreement is not None:
            found["class_agreement"] = self.agreement.share.value
            found["class_agreement_of_held_out"] = self.agreement.judge.value
        found["frechet_distance"] = self.frechet.distance.value
        found["frechet_floor"] = self.frechet.floor.value
        found["frechet_ratio"] = self.frechet.ratio.value
        found["near_copies"] = self.copies.share.value
        found["near_copies_of_held_out"] = self.copies.held_out_share.value
        return found

    def card(self) -> dict[str, Any]:
        """What a model's card says of it: the metrics, and the held-out scores that a new image is compared with."""
        scores = {name: [round(v, 5) for v in found.bits_per_dim] for name, found in self.scores.items()}
        return {"metrics": self.metrics(), "held_out_bits_per_dim": scores}


@dataclass(frozen=True)
class Row:
    """A line of the result table. ok: whether it meets what was demanded; None where nothing was."""

    name: str
    value: str
    detail: str
    ok: bool | None = None


def evaluate(
    worker: Worker,
    conditioner: Conditioner,
    train: Labelled,
    held_out: Labelled,
    config: EvaluationConfig,
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Measure the model that `worker` runs, which is told what `conditioner` says, against real images.

    Raises:
        ValueError: what the model, an estimator or a measure refuses.
    """
    classes = len(conditioner.names) if conditioner.condition == "labels" else 0
    if problems := unmeasurable(config, classes if train.labels is not None else 0, len(held_out.images)):
        raise ValueError("; ".join(problems))
    count = len(held_out.images) if config.images == 0 else min(config.images, len(held_out.images))
    known = conditioner.nothing(count)
    if conditioner.kind.of(held_out) is not None:
        known = conditioner.of(held_out)[:count]
    scores: dict[str, Scores] = {}
    for name, options in config.estimators.items():
        scores[name] = score(
            worker,
            held_out.images[:count],
            known,
            Scoring(name, dict(options)),
            part=config.part,
            seed=config.seed,
            chunk=config.chunk,
            progress=lambda done, name=name: progress(f"bits/dim by {name}", done, count),
        )
    work = sample_work(
        config.samples, conditioner.in_turn(range(config.samples)), config.sampling, config.part, config.seed
    )
    made = finish(worker, work, lambda done: progress("samples", done, config.samples))
    samples = torch.cat([images for images in made if isinstance(images, Tensor)])
    asked = torch.arange(config.samples) % classes if classes else None
    progress("judging", 0, config.samples)
    found = judge(samples, asked, scores, classes, train, held_out, config)
    progress("judging", config.samples, config.samples)
    return found


def judge(
    samples: Tensor,
    asked: Tensor | None,
    scores: dict[str, Scores],
    classes: int,
    train: Labelled,
    held_out: Labelled,
    config: EvaluationConfig,
) -> Evaluation:
    """The part of an evaluation that needs no model."""
    train = Labelled(
        train.images[: config.judge_images], None if train.labels is None else train.labels[: config.judge_images]
    )
    features = features_of(config.features, train, held_out, classes, config.seed)
    judged = asked is not None and held_out.labels is not None and judgeable(train.labels)
    return Evaluation(
        scores,
        class_agreement(samples, asked, train, held_out) if judged and asked is not None else None,
        frechet_to_held_out(samples, train.images, held_out.images, features, config.resamples, config.seed),
        features.about,
        memorisation(samples, train.images, held_out.images, config.near_copy_share),
        samples,
        asked,
    )


# --- the table --------------------------------------------------------------------------------------------------------


def title_of(estimator: str) -> str:
    """As reports name it; a stored evaluation may be by one that there is no more."""
    return ESTIMATORS[estimator].title if estimator in ESTIMATORS else estimator


def _percent(share: Estimate) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _interval(found: Estimate) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def rows(found: Evaluation, config: EvaluationConfig) -> list[Row]:
    """The result table, what was demanded beside what was found."""
    table: list[Row] = []
    for name, scores in found.scores.items():
        detail = (
            f"{len(scores.bits_per_dim)} images, {scores.evaluations:.0f} evaluations each; "
            f"of the error, the estimator's noise is {scores.estimator_error:.4f}"
        )
        value = f"{scores.mean:.3f} ± {scores.standard_error:.3f}"
        table.append(Row(f"Held-out bits/dim, {title_of(name)}", value, detail))
    bar, agreement = config.min_agreement, found.agreement
    if agreement is not None:
        demanded = "" if bar is None else f"at least {bar:.0%} demanded; "
        detail = f"{demanded}the judge itself is right on {agreement.judge.value:.1%} of held-out images"
        ok = None if bar is None else agreement.share.value >= bar
        table.append(Row("Samples of the asked class", _percent(agreement.share), detail, ok))
    elif bar is not None:
        detail = f"at least {bar:.0%} demanded, with fewer than two classes to tell apart"
        table.append(Row("Samples of the asked class", "not measured", detail, False))
    frechet, bar = found.frechet, config.max_frechet_ratio
    table += [
        Row(
            "Fréchet distance, samples to held-out",
            _interval(frechet.distance),
            found.features,
        ),
        Row(
            "Fréchet distance, training to held-out (floor)",
            _interval(frechet.floor),
            "what finite sets of real images are apart",
        ),
        Row(
            "Fréchet distance in floors",
            _interval(frechet.ratio),
            "" if bar is None else f"at most {bar:g} demanded",
            None if bar is None else frechet.ratio.value <= bar,
        ),
    ]
    copies = found.copies
    table.append(
        Row(
            "Near-copies of training images",
            _percent(copies.share),
            f"held-out images: {copies.held_out_share.value:.1%}, more by chance with p = {copies.p_value:.2g}; "
            f"nearer than {copies.threshold:.1f} grey levels, rms",
            not copies.copies,
        )
    )
    return table


def passed(table: list[Row]) -> bool:
    """Whether nothing that was demanded is missed."""
    return all(row.ok is not False for row in table)


# --- the file ---------------------------------------------------------------------------------------------------------


def save(url: str, found: Evaluation, key: Mapping[str, Any]) -> None:
    """Write an evaluation under `url`. key: JSON facts it belongs to (digests of model and data, configuration)."""
    tensors = {
        "samples": found.samples.contiguous(),
        "distances": torch.from_numpy(found.copies.distances),
        "held_out_distances": torch.from_numpy(found.copies.held_out_distances),
        "index": torch.from_numpy(found.copies.index),
    }
    if found.asked is not None:
        tensors["asked"] = found.asked
    copies = found.copies
    values = {
        "key": key,
        "scores": {name: asdict(scores) for name, scores in found.scores.items()},
        "agreement": None if found.agreement is None else asdict(found.agreement),
        "frechet": asdict(found.frechet),
        "features": found.features,
        "copies": {
            "threshold": copies.threshold,
            "share": asdict(copies.share),
            "held_out_share": asdict(copies.held_out_share),
            "p_value": copies.p_value,
        },
        "metrics": found.metrics(),
    }
    storage.write_bytes(storage.join(url, FILES[1]), safetensors.torch.save(tensors))
    storage.write_bytes(storage.join(url, FILES[0]), json.dumps(values, indent=1).encode())


def load(url: str, key: Mapping[str, Any]) -> Evaluation | None:
    """An evaluation of exactly these facts written before, or None."""
    name = storage.join(url, FILES[0])
    if not storage.exists(name):
        return None
    values = json.loads(storage.read_bytes(name))
    if values["key"] != json.loads(json.dumps(key)):
        return None
    tensors = safetensors.torch.load(storage.read_bytes(storage.join(url, FILES[1])))
    agreement, frechet, copies = values["agreement"], values["frechet"], values["copies"]
    return Evaluation(
        {
            estimator: Scores(
                **{
                    **scores,
                    "bits_per_dim": tuple(scores["bits_per_dim"]),
                    "estimator_errors": tuple(scores["estimator_errors"]),
                }
            )
            for estimator, scores in values["scores"].items()
        },
        None
        if agreement is None
        else Agreement(Estimate(**agreement["share"]), tuple(agreement["by_class"]), Estimate(**agreement["judge"])),
        Compared(**{name: Estimate(**value) for name, value in frechet.items()}),
        values["features"],
        Memorisation(
            copies["threshold"],
            Estimate(**copies["share"]),
            Estimate(**copies["held_out_share"]),
            copies["p_value"],
            np.asarray(tensors["distances"].numpy(), dtype=np.float64),
            np.asarray(tensors["held_out_distances"].numpy(), dtype=np.float64),
            np.asarray(tensors["index"].numpy(), dtype=np.int64),
        ),
        tensors["samples"],
        tensors.get("asked"),
    )
