"""What a diffusers scheduler's configuration says of a model: time law, prediction, the levels it is asked at.

Every option is read, none assumed: weights under another table or spacing load without an error and give noise. Options
that change what is computed and that are not understood are refused by name. Nothing here imports diffusers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.choose import build, choose
from pipeline.diffusion.schedule import GAMMA_LIMIT, SCHEDULES, Schedule, Tabulated

PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}


@dataclass(frozen=True)
class Scheduler:
    """A scheduler read.

    schedule: name and options, as a run file has them. prediction: key of the model's prediction types. scaling: "vp"
    or "flow". clip: of x_hat while sampling, or None. ends_at: "data", the last move goes to s = 0; "first", it goes to
    the table's first level, as a scheduler with set_alpha_to_one false has it.
    indices: number of steps -> places in the table, descending, not all whole; of a flow: its times in (0, 1].
    """

    schedule: Mapping[str, Any]
    prediction: str
    scaling: str
    clip: float | None
    ends_at: str
    indices: Callable[[int], Tensor]

    def law(self) -> Schedule:
        return build(SCHEDULES, self.schedule, "schedule")

    def levels(self, steps: int) -> Tensor:
        """gamma that a sampler asks at, float64, strictly descending.

        Raises:
            ValueError: so many steps repeat a level or leave the table.
        """
        law, places = self.law(), self.indices(steps)
        if isinstance(law, Tabulated):
            table = law.table
            if not 0 <= float(places.min()) <= float(places.max()) <= len(table) - 1:
                raise ValueError(
                    f"{steps} steps ask at places {float(places.min()):g}..{float(places.max()):g} of a table of "
                    f"{len(table)}: use fewer steps, or the scheduler's own steps_offset is wrong"
                )
            low = places.floor().long().clamp(max=len(table) - 2)
            s = torch.exp(table / 2)  # between two places linear in s, as diffusers interpolates
            gammas = 2 * torch.log(torch.lerp(s[low], s[low + 1], places - low))
        else:
            gammas = (2 * torch.logit(places)).clamp(law.gamma_min, law.gamma_max)
        if not bool((gammas.diff() < 0).all()):
            raise ValueError(f"{steps} steps repeat a level of this scheduler: use fewer")
        return gammas


def read_scheduler(config: Mapping[str, Any]) -> Scheduler:
    """From scheduler_config.json.

    Raises:
        ValueError: a class, an option or a value that is not understood, named.
    """
    kind = choose(KINDS, str(config.get("_class_name")), "diffusers scheduler")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    full = kind.defaults | given
    for key, value in full.items():
        if key not in kind.read and key in CHANGES and value not in (CHANGES[key], None):
            raise ValueError(f"scheduler: {key} is {value!r}; only {CHANGES[key]!r} is understood")
    return kind.make(full)


def _table(given: Mapping[str, Any]) -> dict[str, Any]:
    steps, first, last = given["num_train_timesteps"], given["beta_start"], given["beta_end"]
    if given.get("trained_betas") is not None:
        raise ValueError("scheduler: trained_betas are given; a named beta_schedule is needed")
    tables: dict[str, dict[str, Any]] = {
        # ours are scaled by 1000 / steps
        "linear": {"name": "linear_beta", "beta_start": first * steps / 1000, "beta_end": last * steps / 1000},
        "scaled_linear": {"name": "scaled_linear", "beta_start": first, "beta_end": last},
        "squaredcos_cap_v2": {"name": "cosine"},
    }
    return choose(tables, given["beta_schedule"], "beta_schedule") | {"steps": steps}


def _tabulated(given: Mapping[str, Any], places: dict[str, Callable[[int, int], Tensor]]) -> Scheduler:
    spacing, offset = choose(places, given["timestep_spacing"], "timestep_spacing"), given["steps_offset"]
    total = given["num_train_timesteps"]
    shift = float(offset) if given["timestep_spacing"] == "leading" else 0.0
    return Scheduler(
        schedule=_table(given),
        prediction=choose(PREDICTIONS, given["prediction_type"], "prediction_type"),
        scaling="vp",
        clip=float(given["clip_sample_range"]) if given["clip_sample"] else None,
        ends_at="data" if given["set_alpha_to_one"] else "first",
        indices=lambda steps: spacing(total, steps) + shift,
    )


def _counted(total: int, steps: int) -> Tensor:
    """total, total - total / steps, ..., rounded, less 1."""
    return (total - torch.arange(steps, dtype=torch.float64) * (total / steps)).round() - 1


# (steps of the table, steps asked) -> places, descending, before the offset
WHOLE: dict[str, Callable[[int, int], Tensor]] = {  # DDPM, DDIM, PNDM
    "linspace": lambda total, steps: torch.linspace(total - 1, 0, steps, dtype=torch.float64).round(),
    "leading": lambda total, steps: torch.arange(steps, dtype=torch.float64).flip(0) * (total // steps),
    "trailing": _counted,
}
BETWEEN = WHOLE | {"linspace": lambda total, steps: torch.linspace(total - 1, 0, steps, dtype=torch.float64)}  # Euler
ONE_MORE = {  # DPM-Solver: a grid of one step more, of which the last is the end
    "linspace": lambda total, steps: torch.linspace(total - 1, 0, steps + 1, dtype=torch.float64).round()[:-1],
    "leading": lambda total, steps: torch.arange(1, steps + 1, dtype=torch.float64).flip(0) * (total // (steps + 1)),
    "trailing": _counted,
}


def _flow(given: Mapping[str, Any]) -> Scheduler:
    """Stable Diffusion 3's: times from the shifted table's ends, evenly, and shifted again."""
    shift, total = float(given["shift"]), given["num_train_timesteps"]

    def shifted(time: Tensor) -> Tensor:
        return shift * time / (1 + (shift - 1) * time)

    first, last = (float(shifted(torch.tensor(time, dtype=torch.float64))) for time in (1.0, 1 / total))
    return Scheduler(
        schedule={"name": "flow", "gamma_min": -GAMMA_LIMIT, "gamma_max": GAMMA_LIMIT},
        prediction="flow",
        scaling="flow",
        clip=None,
        ends_at="data",
        indices=lambda steps: shifted(torch.linspace(first, last, steps, dtype=torch.float64)),
    )


# options that change what is computed, with the one value that is understood where a kind does not read them
CHANGES: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": None,
    "sigma_min": None,
    "sigma_max": None,
    "timestep_type": "discrete",
}
TABLE_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
}


@dataclass(frozen=True)
class Kind:
    """defaults: diffusers' own of the class, of what is read. read: options whose every value is understood."""

    defaults: dict[str, Any]
    make: Callable[[Mapping[str, Any]], Scheduler]
    read: frozenset[str] = frozenset()


KINDS: dict[str, Kind] = {
    "DDPMScheduler": Kind(TABLE_DEFAULTS | {"clip_sample": True}, lambda given: _tabulated(given, WHOLE)),
    "DDIMScheduler": Kind(TABLE_DEFAULTS | {"clip_sample": True}, lambda given: _tabulated(given, WHOLE)),
    "PNDMScheduler": Kind(TABLE_DEFAULTS | {"set_alpha_to_one": False}, lambda given: _tabulated(given, WHOLE)),
    "EulerDiscreteScheduler": Kind(
        TABLE_DEFAULTS | {"timestep_spacing": "linspace"},
        lambda given: _tabulated({**given, "clip_sample": False, "set_alpha_to_one": True}, BETWEEN),
    ),
    "DPMSolverMultistepScheduler": Kind(
        TABLE_DEFAULTS | {"timestep_spacing": "linspace"},
        lambda given: _tabulated({**given, "clip_sample": False, "set_alpha_to_one": True}, ONE_MORE),
    ),
    "FlowMatchEulerDiscreteScheduler": Kind({"num_train_timesteps": 1000, "shift": 1.0}, _flow),
}
