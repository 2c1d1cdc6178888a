"""What a model must measure up to before it is registered: bounds from a file, each met by a whole interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.choose import did_you_mean
from pipeline.evaluation.measure import Evaluation
from pipeline.evaluation.statistics import Estimate

NORMAL_95 = 1.959964  # two-sided, of a mean with its standard error


@dataclass(frozen=True)
class Gate:
    """A bound on a measure: at_most or at_least, or both."""

    measure: str
    at_most: float | None = None
    at_least: float | None = None

    def missed(self, found: Estimate) -> str | None:
        """Why not, one line; None where the whole interval meets the bounds."""
        interval = f"{found.value:.4g} ({found.low:.4g} to {found.high:.4g})"
        if self.at_most is not None and not found.high <= self.at_most:
            return f"gate {self.measure}: at most {self.at_most:g} demanded, found {interval}"
        if self.at_least is not None and not found.low >= self.at_least:
            return f"gate {self.measure}: at least {self.at_least:g} demanded, found {interval}"
        return None


def measures(found: Evaluation) -> dict[str, Estimate]:
    """What an evaluation found, by the names that gates have, each with its 95% interval."""
    known = {
        "frechet_distance": found.frechet.distance,
        "frechet_ratio": found.frechet.ratio,
        "near_copies": found.copies.share,
    }
    for name, scores in found.scores.items():
        half = NORMAL_95 * scores.standard_error
        known[f"bits_per_dim_{name}"] = Estimate(scores.mean, scores.mean - half, scores.mean + half)
    if found.agreement is not None:
        known["class_agreement"] = found.agreement.share
    return known


def from_plain(values: Any, source: str) -> list[Gate]:
    """Gates from a mapping such as {"frechet_ratio": {"at_most": 1.5}}; `source` names it in errors.

    Raises:
        ValueError: not of that form; names the gate.
    """
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{source}: expected lines such as 'frechet_ratio: {{at_most: 1.5}}', got {values!r}")
    return [_gate(source, str(name), bounds) for name, bounds in values.items()]


def _gate(source: str, name: str, bounds: Any) -> Gate:
    if not isinstance(bounds, Mapping) or not bounds or not set(bounds) <= {"at_most", "at_least"}:
        raise ValueError(f"{source}: {name} must have at_most or at_least, got {bounds!r}")
    for bound in bounds.values():
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise ValueError(f"{source}: {name}: a bound must be a number, got {bound!r}")
    return Gate(name, **bounds)


def missed(gates: Sequence[Gate], found: Evaluation) -> list[str]:
    """One line for each gate that an evaluation does not pass; empty where it passes all.

    Raises:
        ValueError: a gate on something that was not measured; names what was.
    """
    known = measures(found)
    for gate in gates:
        if gate.measure not in known:
            hint = did_you_mean(gate.measure, known)
            raise ValueError(f"gate '{gate.measure}' is not of what was measured{hint}: {', '.join(sorted(known))}")
    return [line for gate in gates if (line := gate.missed(known[gate.measure])) is not None]
