"""What the endpoints take: bodies with their fields and limits, and the one schema of errors."""

import base64
import binascii
import difflib
import json
from collections.abc import Sequence
from email.message import Message
from email.parser import BytesParser
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.serving.config import ServingConfig

__all__ = [
    "EncodingRequest",
    "GenerationRequest",
    "LikelihoodOptions",
    "LikelihoodRequest",
    "Refused",
    "RequestError",
    "ServingConfig",
    "decode_base64",
    "parse_body",
    "parse_form",
    "unknown_model",
]


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
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


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


OptionValue = bool | int | float | str | None | list[float]
LARGEST_SEED = 2**53 - 1  # a JavaScript client can still name it exactly
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


B = TypeVar("B", bound=_Body)


class GenerationRequest(_Body):
    """`POST /v1/images/generations`: the OpenAI fields that mean something here, and ours."""

    model: str | None = Field(None, max_length=256, description="id of a served model; default: the first")
    prompt: str | None = Field(None, max_length=256, description="a class by name or number, for all images")
    n: int = Field(1, ge=1, description="images to make")
    size: str | None = Field(None, max_length=16, description="'auto' or the model's own WIDTHxHEIGHT")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    user: str | None = Field(None, max_length=256, description="accepted and ignored")
    stream: bool | None = Field(None, description="answer with server-sent events: previews of x_hat, then the images")
    partial_images: int | None = Field(None, ge=0, le=1000, description="previews in a stream; default: up to 16")
    labels: int | list[int] | None = Field(None, description="class of all images or of each; -1: no class")
    sampler: str | None = Field(None, max_length=64)
    steps: int | None = Field(None, ge=1, description="levels the sampler visits")
    grid: str | None = Field(None, max_length=64, description="grid of levels; default: the sampler's")
    guidance: float = Field(1.0, ge=0, le=100, description="guidance scale; 1: the model itself")
    image: str | None = Field(None, description="base64 of a jpg, png or webp of the model's size to start from")
    strength: float = Field(0.6, gt=0, le=1, description="with image: the share of the steps that is taken from it")
    seed: Seed | None = Field(None, description="the images depend on it alone; default: drawn and returned")
    eta: float | None = Field(None, ge=0, description="the sampler's option of this name")
    churn: float | None = Field(None, ge=0, description="the sampler's option of this name")
    options: dict[str, OptionValue] = Field(
        default_factory=dict, max_length=32, description="the sampler's other options"
    )


class LikelihoodOptions(_Body):
    """`POST /v1/likelihood` but for the images: the fields of its multipart form, which has the images as files."""

    model: str | None = Field(None, max_length=256, description="id of a served model; default: the first")
    labels: int | list[int] | None = Field(None, description="class of all images or of each; -1: no class")
    estimator: str = Field("vlb", max_length=64)
    seed: Seed | None = Field(None, description="the estimates depend on it alone; default: 0")
    resize: Literal["exact", "centre-crop", "squash"] = Field("exact", description="what to do with another size")
    options: dict[str, OptionValue] = Field(default_factory=dict, max_length=32, description="the estimator's options")


class EncodingRequest(_Body):
    """`POST /v1/encodings`: images to latents along the probability flow, or latents back to images."""

    model: str | None = Field(None, max_length=256, description="id of a served model; default: the first")
    images: list[str] | None = Field(None, min_length=1, description="base64 of each jpg, png or webp, or a data: URL")
    latents: list[str] | None = Field(
        None, min_length=1, description="base64 of each latent: float32 little-endian, channels x height x width"
    )
    labels: int | list[int] | None = Field(None, description="class of all images or of each; -1: no class")
    sampler: str = Field("heun", max_length=64, description="a deterministic one, the same both ways")
    steps: int = Field(50, ge=1, description="levels on the way")
    grid: str | None = Field(None, max_length=64, description="grid of levels; default: the sampler's")
    resize: Literal["exact", "centre-crop", "squash"] = Field("exact", description="what to do with another size")


class LikelihoodRequest(LikelihoodOptions):
    """`POST /v1/likelihood` as JSON."""

    images: list[str] = Field(min_length=1, description="base64 of each jpg, png or webp, or a data: URL")


def parse_body(body: type[B], data: Any) -> B:
    """A request of that kind from plain values.

    Raises:
        RequestError: an unknown field (with the nearest valid one), a missing one, or a wrong value.
    """
    try:
        return body.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    name = place[0] if place else None
    if first["type"] == "extra_forbidden" and name is not None:
        valid = list(body.model_fields)
        near = difflib.get_close_matches(name, valid, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        message = f"unknown field '{name[:64]}'{hint}; valid fields: {', '.join(valid)}"
        raise RequestError(message, name[:64], code="unknown_parameter")
    if first["type"] == "missing":
        raise RequestError(f"'{name}' is missing", name, code="missing_parameter")
    got = repr(first["input"])
    shown = got if len(got) <= 80 else got[:77] + "..."
    raise RequestError(f"{'.'.join(place[:2]) or 'body'}: {first['msg'].lower()}, got {shown}", name)


def decode_base64(encoded: Sequence[str], field: str = "images") -> list[bytes]:
    """The bytes of base64 strings or data: URLs, of the field of that name.

    Raises:
        RequestError: not base64; names which.
    """
    decoded: list[bytes] = []
    for index, text in enumerate(encoded):
        if text.startswith("data:"):
            text = text.partition(",")[2]
        try:
            decoded.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{field}[{index}]: not base64: {error}", field) from None
    return decoded


# --- multipart forms -----------------------------------------------------------------------------------------------


def parse_form(content_type: str, body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The fields of a multipart/form-data body (RFC 7578), and the files in its `images` parts, in order.

    `labels`, `seed` and `options` are read as JSON. The body is in memory already, its size limited by the caller.

    Raises:
        RequestError: no boundary, a malformed part, a field given twice, or a file under another name.
    """
    outer = _headers(b"Content-Type: " + content_type.encode("latin-1", "replace"))
    boundary = outer.get_param("boundary")
    if outer.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise RequestError("multipart/form-data without a boundary", code="malformed_body")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise RequestError("the multipart body is cut off: its last boundary is missing", code="malformed_body")
    fields: dict[str, Any] = {}
    files: list[bytes] = []
    for piece in pieces[1:-1]:
        head, found, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = _headers(head)
        name = headers.get_param("name", header="content-disposition")
        if not found or headers.get_content_disposition() != "form-data" or not isinstance(name, str):
            raise RequestError("a part of the multipart body has no name", code="malformed_body")
        if headers.get_filename() is not None or name == "images":
            if name != "images":
                raise RequestError(f"files go into 'images', got '{name[:64]}'", name[:64], code="unknown_parameter")
            files.append(content)
        elif name in fields:
            raise RequestError(f"'{name[:64]}' is given twice", name[:64])
        else:
            fields[name] = _form_value(name, content)
    return fields, files


def _headers(data: bytes) -> Message:
    return BytesParser().parsebytes(data + b"\r\n\r\n", headersonly=True)


def _form_value(name: str, content: bytes) -> Any:
    try:
        text = content.decode("utf-8")
        return json.loads(text) if name in ("labels", "seed", "options") else text
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f"'{name[:64]}' cannot be read: {error}", name[:64]) from None
