"""What a number in a request may be: no more than the mathematics can bear in float32."""

import math
import sys
from typing import Any

LARGEST = sys.float_info.max
ANY = (-1e6, 1e6)  # of an option that has no line of its own
COUNT = (0, 10**9)  # of whole numbers: the price says what is too many
LARGEST_LATENT = 1e3  # in standard deviations of the prior
RANGES = {
    "eta": (0.0, 10.0),
    "lam": (0.0, 10.0),
    "sigma_1": (0.0, 1.0),
    "churn": (0.0, LARGEST),  # clamped to what the levels allow
    "churn_min": (0.0, LARGEST),  # of the noise levels to raise: compared, nothing more
    "churn_max": (0.0, LARGEST),
    "churn_noise": (0.0, 10.0),
    "clip": (1e-3, 1e3),
    "snr": (1e-6, 1.0),
    "step_size": (1e-9, 10.0),
    "tolerance": (1e-5, 1.0),  # a float32 network's own noise: no step size gets below it
    "data_std": (1e-3, 1e3),
}


def out_of_range(name: str, value: Any, whole: bool) -> str | None:
    """What a number, or each of a list, may be where this one is something else, else None. whole: the option takes
    whole numbers only."""
    if isinstance(value, list):
        return next((allowed for each in value if (allowed := out_of_range(name, each, whole))), None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    least, most = COUNT if whole else RANGES.get(name, ANY)
    if least <= value <= most and math.isfinite(value):  # the first sends away integers that are no float
        return None
    return f"at least {least:g}" if most == LARGEST else f"between {least:g} and {most:g}"
