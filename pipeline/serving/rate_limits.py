"""What a key may spend: a token bucket in cost units (images x network evaluations x pixels)."""

import time
from collections.abc import Callable

from pipeline.serving.refusals import Refused, RequestError

MINUTE_S = 60.0


class RateLimits:
    """`quota` cost units a minute for each key, with up to a minute's worth at once; 0: no limit.

    The bucket may go below zero, by one request of a minute's worth: what a request costs is charged when it is
    admitted, and one that costs more than a minute gives is never admitted. ingresses: how many share the quota, each
    with a bucket of its own.
    """

    def __init__(self, quota: float, ingresses: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.quota, self.per_minute, self._clock = quota, quota / ingresses, clock
        self._left: dict[str, tuple[float, float]] = {}  # key: what it had left, and when

    def charge(self, key: str, cost: float) -> None:
        """Take `cost` from the key's bucket.

        Raises:
            Refused: it is empty; says when it will not be. RequestError: more than a minute's quota.
        """
        if not self.quota:
            return
        if cost > self.quota:
            raise RequestError(
                f"this request costs {cost:.0f} units (images x network evaluations x pixels), more than the "
                f"{self.quota:.0f} that this key has in a minute; ask for less at a time",
                code="request_too_large",
            )
        now = self._clock()
        left, then = self._left.get(key, (self.per_minute, now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / MINUTE_S)
        if left <= 0:
            wait_s = max(1.0, (1 - left) * MINUTE_S / self.per_minute)
            raise Refused(
                f"this key has spent its quota of {self.quota:.0f} cost units a minute "
                "(images x network evaluations x pixels)",
                429,
                "quota_exceeded",
                retry_after_s=wait_s,
            )
        self._left[key] = (left - cost, now)
