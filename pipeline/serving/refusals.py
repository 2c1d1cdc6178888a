"""Refusals: a request that gets no answer, as HTTP says it, in the one schema of errors."""

from collections.abc import Sequence
from typing import Any

from pipeline.serving.outcomes import DeadlineExceeded, EngineBusy, EngineClosed, NotFinite


class Refused(Exception):
    """A request that gets no answer, as HTTP says it: status, message, code, and the field that is wrong (or None)."""

    def __init__(
        self, message: str, status: int, code: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, status, code, param, retry_after_s)  # all of them: so it survives pickling
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The one error schema of every endpoint, that of the OpenAI API."""
        kinds = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": _text(self.message), "type": kind, "param": _text(self.param), "code": self.code}}


def _text(said: str | None) -> str | None:
    """What a request gave and its refusal repeats, as UTF-8 can carry it: JSON lets a lone surrogate in."""
    return None if said is None else said.encode("utf-8", "backslashreplace").decode()


class RequestError(Refused, ValueError):
    """A request that its sender can mend."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "invalid_value") -> None:
        super().__init__(message, status, code, param)

    def __reduce__(self) -> tuple[Any, ...]:
        return RequestError, (self.message, self.param, self.status, self.code)


def unknown_model(name: str | None, served: Sequence[str]) -> RequestError:
    """The refusal of a request for a model that is none of `served`, ids."""
    listed = ", ".join(f"'{each}'" for each in served)
    message = f"no model '{str(name)[:100]}' is served here; served: {listed}"
    return RequestError(message, "model", status=404, code="model_not_found")


def refused(error: Exception) -> Refused:
    """What a caller is told of an error: a ValueError is the caller's to mend, of our own defects it names the kind."""
    match error:
        case Refused():
            return error
        case EngineBusy():
            return Refused(str(error), 429, "queue_full", retry_after_s=error.retry_after_s)
        case EngineClosed():
            return Refused(str(error), 503, "not_available", retry_after_s=1.0)
        case DeadlineExceeded():
            return Refused(str(error), 504, "deadline_exceeded")
        case NotFinite():
            return Refused(str(error), 500, "not_finite")
        case ValueError():
            return Refused(str(error), 400, "invalid_value")
        case _:
            message = f"the server failed ({type(error).__name__}); its log has the trace id of this answer"
            return Refused(message, 500, "internal_error")
