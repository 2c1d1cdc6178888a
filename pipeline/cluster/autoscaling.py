"""How many engine replicas there should be: by the work they owe, not by the number of requests."""

import math
from typing import Any


class ByOwedWork:
    """A policy of Ray Serve: replicas so that each owes at most `target_s` seconds of network evaluations.

    A request of 1000 steps for 64 images and one of 10 steps for one image differ by a factor of 6,400; their number
    says little. Each replica reports `owed_s` (see `Replica.record_autoscaling_stats`); while any request is in
    progress one replica is kept. Ray Serve applies min, max and the delays.
    """

    def __init__(self, target_s: float) -> None:
        self.target_s = target_s

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        reported = (ctx.aggregated_metrics or {}).get("owed_s", {})
        return replicas_for(sum(reported.values()), self.target_s, busy=ctx.total_num_requests > 0), {}


def replicas_for(owed_s: float, target_s: float, *, busy: bool) -> int:
    """owed_s: seconds that one replica would need for all that is owed."""
    return max(math.ceil(owed_s / target_s), 1 if busy else 0)
