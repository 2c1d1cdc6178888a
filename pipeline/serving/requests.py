"""What the endpoints take: bodies with their fields and limits, and the one schema of errors."""

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.choose import did_you_mean
from pipeline.serving.refusals import RequestError

OptionValue = bool | int | float | str | None | list[float]
LARGEST_SEED = 2**53 - 1  # a JavaScript client can still name it exactly
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Tag = Annotated[str, Field(max_length=256)] | int
Tags = Annotated[list[Tag] | list[list[Tag]], Field(max_length=4096)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # the configured limits say what is too many


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    model: str | None = Field(None, max_length=256, description="id of a served model; default: the first")


Asked = TypeVar("Asked", bound=Body)


class GenerationRequest(Body):
    """`POST /v1/images/generations`: the OpenAI fields that mean something here, and ours."""

    prompt: str | None = Field(None, max_length=256, description="a class by name or number, for all images")
    n: Count = Field(1, description="images to make")
    size: str | None = Field(None, max_length=16, description="'auto' or the model's own WIDTHxHEIGHT")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: str | None = Field(None, max_length=16, description="'auto'; steps and sampler decide")
    user: str | None = Field(None, max_length=256, description="accepted and ignored")
    stream: bool | None = Field(None, description="answer with server-sent events: previews of x_hat, then the images")
    partial_images: int | None = Field(None, ge=0, le=1000, description="previews in a stream; default: up to 16")
    labels: int | list[int] | None = Field(None, description="class of all images or of each; -1: no class")
    tags: Tags | None = Field(None, description="of a model that is told tags: those of all images, or a list of each")
    sampler: str | None = Field(None, max_length=64)
    steps: Count | None = Field(None, description="levels the sampler visits")
    grid: str | None = Field(None, max_length=64, description="grid of levels; default: the sampler's")
    integer_steps: bool = Field(False, description="ask at steps of the schedule's table alone, the nearest ones")
    guidance: float = Field(1.0, ge=0, le=100, description="guidance scale; 1: the model itself")
    image: str | None = Field(None, description="base64 of a jpg, png or webp of the model's size to start from")
    resize: Literal["exact", "centre-crop", "squash"] = Field(
        "exact", description="what to do with an image of another size"
    )
    strength: float = Field(0.6, gt=0, le=1, description="with image: the share of the steps that is taken from it")
    seed: Seed | None = Field(None, description="the images depend on it alone; default: drawn and returned")
    eta: float | None = Field(None, ge=0, description="the sampler's option of this name")
    churn: float | None = Field(None, ge=0, description="the sampler's option of this name")
    options: dict[str, OptionValue] = Field(
        default_factory=dict, max_length=32, description="the sampler's other options"
    )


class LikelihoodOptions(Body):
    """`POST /v1/likelihood` but for the images: the fields of its multipart form, which has the images as files."""

    tags: Tags | None = Field(None, description="of a model that is told tags: those of all images, or a list of each")
    labels: int | list[int] | None = Field(
        None, description="class of all images or of each; without, no percentile is told: held-out images had theirs"
    )
    estimator: str = Field("vlb", max_length=64)
    seed: Seed | None = Field(None, description="the estimates depend on it alone; default: 0")
    resize: Literal["exact", "centre-crop", "squash"] = Field("exact", description="what to do with another size")
    options: dict[str, OptionValue] = Field(default_factory=dict, max_length=32, description="the estimator's options")


class EncodingRequest(Body):
    """`POST /v1/encodings`: images to latents along the probability flow, or latents back to images."""

    images: list[str] | None = Field(None, min_length=1, description="base64 of each jpg, png or webp, or a data: URL")
    latents: list[str] | None = Field(
        None, min_length=1, description="base64 of each latent: float32 little-endian, channels x height x width"
    )
    labels: int | list[int] | None = Field(None, description="class of all images or of each; -1: no class")
    tags: Tags | None = Field(None, description="of a model that is told tags: those of all images, or a list of each")
    sampler: str = Field("heun", max_length=64, description="a deterministic one, the same both ways")
    steps: Count = Field(50, description="levels on the way")
    grid: str | None = Field(None, max_length=64, description="grid of levels; default: the sampler's")
    resize: Literal["exact", "centre-crop", "squash"] = Field("exact", description="what to do with another size")


class LikelihoodRequest(LikelihoodOptions):
    """`POST /v1/likelihood` as JSON."""

    images: list[str] = Field(min_length=1, description="base64 of each jpg, png or webp, or a data: URL")


class ScoringRequest(LikelihoodOptions):
    """What both forms of `POST /v1/likelihood` come to: the images as files."""

    files: tuple[bytes, ...]

    @classmethod
    def of(cls, asked: LikelihoodOptions, files: Sequence[bytes]) -> "ScoringRequest":
        """Of fields that were checked when they were read."""
        fields = {name: getattr(asked, name) for name in LikelihoodOptions.model_fields}
        return cls.model_construct(**fields, files=tuple(files))


Call = GenerationRequest | ScoringRequest | EncodingRequest  # what a route hands on: read and checked, once


def parse_body(body: type[Asked], data: Any) -> Asked:
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
        hint = did_you_mean(name, valid)
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
