"""From a request to a plan: checked against the model and priced (images x network evaluations x pixels) before
anything is allocated for it. The plan builds the procedure."""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import torch
from pydantic import BaseModel
from torch import Tensor

from pipeline.choose import choose, did_you_mean
from pipeline.conditioner import KINDS, ConditionError
from pipeline.data.formats import codecs, fit, headers
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.likelihood.estimators import ESTIMATORS, Estimator, Likelihood
from pipeline.diffusion.procedure import Procedure
from pipeline.diffusion.randomness import key_seed
from pipeline.diffusion.sampling.encode import ENCODERS
from pipeline.diffusion.sampling.grids import GRIDS
from pipeline.diffusion.sampling.samplers import SAMPLERS, Sampler
from pipeline.model import Model, Sampling, Scoring
from pipeline.serving.config import ServingConfig
from pipeline.serving.ranges import LARGEST_LATENT, out_of_range
from pipeline.serving.refusals import RequestError
from pipeline.serving.requests import EncodingRequest, GenerationRequest, LikelihoodOptions, OptionValue, decode_base64
from pipeline.size import shown, sides

PLAIN = (bool, int, float, str, type(None))
NUMBERS = Sequence[float]
LONGEST_LIST = 4096  # numbers
NOT_ASKED = ("gammas", "rows")  # options that are not a request's to set
LONGEST_NAME = 64


@dataclass(frozen=True)
class GenerationPlan:
    """What a generation request comes to. evaluations: expected network evaluations; cost: row evaluations."""

    n: int
    conditioning: Conditioning
    seed: int
    how: Sampling
    evaluations: int
    cost: int
    init: Tensor | None = None  # uint8 (C, H, W)
    strength: float = 1.0

    @property
    def unusual(self) -> str:
        """The field by which a request leaves what the self-test has tried, or ''."""
        fields = {"options": self.how.options, "image": self.init is not None, "guidance": self.how.guidance != 1.0}
        return next((name for name, given in fields.items() if given), "")

    def build(self, model: Model) -> Procedure[Tensor]:
        """The images as `Model.sample` makes them from the same seed: float (n, C, H, W) in model space."""
        seeds = [key_seed("sample", self.seed, index) for index in range(self.n)]
        init = None if self.init is None else self.init.expand(self.n, *self.init.shape)
        return model.sampling(seeds, self.conditioning, self.how, init=init, strength=self.strength)


@dataclass(frozen=True)
class EncodingPlan:
    """What an encoding request comes to: `pixels`, uint8 (n, C, H, W), to latents, or `latents`, float32, back."""

    pixels: Tensor | None
    latents: Tensor | None
    conditioning: Conditioning
    how: Sampling
    n: int
    cost: int

    @property
    def unusual(self) -> str:
        """As of a `GenerationPlan`."""
        return "latents" if self.pixels is None else "images"

    def build(self, model: Model) -> Procedure[Tensor]:
        """Latents, or images in model space, float (n, C, H, W)."""
        if self.pixels is not None:
            return model.encoding(self.pixels, self.conditioning, self.how)
        return model.sampling((0,) * self.n, self.conditioning, self.how, latents=self.latents)


@dataclass(frozen=True)
class LikelihoodPlan:
    """What a likelihood request comes to; pixels: uint8 (n, C, H, W)."""

    pixels: Tensor
    conditioning: Conditioning
    seed: int
    how: Scoring
    cost: int

    @property
    def n(self) -> int:
        return len(self.pixels)

    @property
    def unusual(self) -> str:
        """As of a `GenerationPlan`."""
        return "options" if self.how.options else ""

    def build(self, model: Model) -> Procedure[Likelihood]:
        """The scores as `Model.bits_per_dim` gives them with the same seed."""
        seeds = [key_seed("score", self.seed, index) for index in range(self.n)]
        return model.scoring(self.pixels, seeds, self.conditioning, self.how)


Plan = GenerationPlan | EncodingPlan | LikelihoodPlan


def plan_generation(request: GenerationRequest, model: Model, config: ServingConfig, seed: int) -> GenerationPlan:
    """Check a request against the model and price it.

    Raises:
        RequestError: what this model, this sampler or the limits do not allow; names the field.
    """
    size = shown(model.config.size)
    if request.size not in (None, "auto", size):
        raise RequestError(f"this model makes images of {size} pixels, got '{request.size}'", "size")
    steps = config.steps if request.steps is None else request.steps
    if steps > config.max_steps:
        raise RequestError(f"at most {config.max_steps} steps, got {steps}", "steps")
    name = request.sampler or config.sampler
    sampler = _chosen(SAMPLERS, name, "sampler")
    if request.grid is not None:
        _chosen(GRIDS, request.grid, "grid")
    options = dict(request.options)
    for extra in ("eta", "churn"):
        if (value := getattr(request, extra)) is not None:
            options[extra] = value
    options = _checked_options(options, askable(sampler.options), f"sampler '{name}'")

    def offline() -> str:
        return f"as a shard set they are made by: {_sample_command(request, model, name, steps, options, seed)}"

    if request.n > config.max_images:
        raise RequestError(f"at most {config.max_images} images a request, got {request.n}; {offline()}", "n")
    conditioning = _asked(request, request.n, model)
    guided = request.guidance != 1.0
    if request.quality not in (None, "auto"):
        message = f"there are no qualities to choose: 'steps' and 'sampler' decide, as in \"steps\": {2 * config.steps}"
        raise RequestError(f"{message}; got '{request.quality}'", "quality")
    if guided and model.guide is None and not _fields(request):
        wanted = model.conditioner.kind.asked_as
        raise RequestError(f"guidance needs {wanted}: without them there is nothing to guide towards", "guidance")
    evaluations = _evaluations(sampler, steps, options)
    if request.image is not None:
        evaluations = max(1, math.ceil(evaluations * request.strength))
    cost = request.n * evaluations * (2 if guided else 1)
    _check_cost(cost, model, config, f"{request.n} images x {evaluations} network evaluations", offline)
    init = None
    if request.image is not None:
        (data,) = decode_base64([request.image], "image")
        init = _decoded(data, "image", request.resize, model, config)
    how = Sampling(name, steps, request.grid, None, request.guidance, options, request.integer_steps)
    return GenerationPlan(request.n, conditioning, seed, how, evaluations, cost, init, request.strength)


def _sample_command(
    request: GenerationRequest, model: Model, sampler: str, steps: int, options: Mapping[str, Any], seed: int
) -> str:
    """What makes the images of a request that is too large for one answer; the same ones, where it has one class for
    all and no image to start from."""
    listed = [len(value) for value in _fields(request).values() if isinstance(value, list)]
    few = min(request.n, max([1, *listed]))  # n is what the request says, and may be a thousand millions
    one = model.conditioner.echo(_asked(request, few, model), 0)
    asked = f" --{model.conditioner.kind.asked_as}={_told(one)}" if model.conditioner.names else ""
    how: dict[str, Any] = {"sampler": sampler, "steps": steps, "grid": request.grid, "guidance": request.guidance}
    if request.integer_steps:
        how["integer_steps"] = True
    how |= {f"options.{name}": value for name, value in options.items()}
    told = " ".join(f"evaluation.sampling.{name}={json.dumps(value)}" for name, value in how.items()).replace('"', "")
    return f"python -m jobs.sample RUN_FILE --images {request.n} --seed {seed}{asked} {told}"


def plan_encoding(request: EncodingRequest, model: Model, config: ServingConfig) -> EncodingPlan:
    """As `plan_generation`.

    Raises:
        RequestError: as there; a sampler that has no way back; a latent of another size or that is not finite.
    """
    if (request.images is None) == (request.latents is None):
        raise RequestError("give images or latents, one of them", "images", code="missing_parameter")
    field = "images" if request.latents is None else "latents"
    encoded = request.images or request.latents or []
    n = len(encoded)
    if n > config.max_images:
        raise RequestError(f"at most {config.max_images} images a request, got {n}", field)
    if request.steps > config.max_steps:
        raise RequestError(f"at most {config.max_steps} steps, got {request.steps}", "steps")
    _chosen(ENCODERS, request.sampler, "sampler")
    if request.grid is not None:
        _chosen(GRIDS, request.grid, "grid")
    conditioning = _asked(request, n, model)
    evaluations = _evaluations(SAMPLERS[request.sampler], request.steps, {})
    _check_cost(n * evaluations, model, config, f"{n} images x {evaluations} network evaluations")
    how = Sampling(request.sampler, request.steps, request.grid)
    decoded = decode_base64(encoded, field)
    pixels = latents = None
    if field == "images":
        each = [_decoded(data, f"images[{i}]", request.resize, model, config) for i, data in enumerate(decoded)]
        pixels = torch.stack(each)
    else:
        latents = torch.stack([_latent(data, index, model) for index, data in enumerate(decoded)])
    return EncodingPlan(pixels, latents, conditioning, how, n, n * evaluations)


def _latent(data: bytes, index: int, model: Model) -> Tensor:
    expected = 4 * math.prod(model.space.shape)
    if len(data) != expected:
        raise RequestError(f"latents[{index}]: {len(data)} bytes, a latent of this model has {expected}", "latents")
    latent = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(model.space.shape)
    if not bool(torch.isfinite(latent).all()):
        raise RequestError(f"latents[{index}] has values that are not finite", "latents")
    if float(latent.abs().max()) > LARGEST_LATENT:
        got = f"{float(latent.abs().max()):.3g}"
        raise RequestError(
            f"latents[{index}]: values are near N(0, 1), at most {LARGEST_LATENT:g}; got {got}", "latents"
        )
    return latent


def _evaluations(sampler: Sampler, steps: int, options: Mapping[str, Any]) -> int:
    """Expected network evaluations of a row."""
    return max(1, int(sampler.evaluations(steps, **options)))


def plan_likelihood(
    request: LikelihoodOptions, encoded: Sequence[bytes], model: Model, config: ServingConfig, seed: int
) -> LikelihoodPlan:
    """As `plan_generation`; the images are decoded after the rest was found in order.

    Raises:
        RequestError: as there, or an image that cannot be read or has another size.
    """
    n = len(encoded)
    if n > config.max_images:
        raise RequestError(f"at most {config.max_images} images a request, got {n}", "images")
    estimator: Estimator = _chosen(ESTIMATORS, request.estimator, "estimator")
    options = _checked_options(request.options, askable(estimator.options), f"estimator '{request.estimator}'")
    conditioning = _asked(request, n, model)
    how = Scoring(request.estimator, options)
    evaluations = estimator.evaluations(math.prod(model.space.shape), model.scoring_options(how))
    _check_cost(n * evaluations, model, config, f"{n} images x {evaluations} network evaluations")
    pixels = torch.stack(
        [_decoded(data, f"images[{i}]", request.resize, model, config) for i, data in enumerate(encoded)]
    )
    return LikelihoodPlan(pixels, conditioning, seed, how, n * evaluations)


def _decoded(data: bytes, name: str, policy: str, model: Model, config: ServingConfig) -> Tensor:
    limits = headers.Limits(bytes=config.max_request_bytes, pixels=config.max_image_pixels)
    try:
        pixels = codecs.decode(data, model.config.channels, limits, plain=True)
    except ValueError as error:
        raise RequestError(f"{name}: {error}", name.partition("[")[0]) from None
    height, width = sides(model.config.size)
    if policy == "exact" and pixels.shape[:2] != (height, width):
        got = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise RequestError(
            f"{name}: this model takes images of {width} x {height} pixels, got {got}; "
            '"resize": "centre-crop" shrinks and crops it, "squash" shrinks it alone',
            "resize",
        )
    pixels = fit.fit(pixels, model.config.size, policy)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _chosen(table: Mapping[str, Any], name: str, kind: str) -> Any:
    try:
        return choose(table, name, kind)
    except ValueError as error:
        raise RequestError(str(error), kind) from None


Kinds = tuple[type, ...]
_KIND_NAMES = {type(None): "null", list: "a list of numbers", str: f"a string of at most {LONGEST_NAME} characters"}


def askable(options: Mapping[str, inspect.Parameter]) -> dict[str, tuple[Kinds, Any]]:
    """The options that a request may set: the plain types they take, and the default."""
    found: dict[str, tuple[Kinds, Any]] = {}
    for name, parameter in options.items():
        if name not in NOT_ASKED:
            kind = parameter.annotation
            bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
            kinds = get_args(bare) or (bare,)
            plain = [kind for kind in kinds if kind in PLAIN]
            found[name] = (*plain, *([list] if NUMBERS in kinds else [])), parameter.default
    return found


def _fits(value: OptionValue, kinds: Kinds) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return int in kinds or float in kinds
    if isinstance(value, list):
        return list in kinds and len(value) <= LONGEST_LIST
    return type(value) in kinds and not (isinstance(value, str) and len(value) > LONGEST_NAME)


def _checked_options(
    given: Mapping[str, OptionValue], known: Mapping[str, tuple[Kinds, Any]], kind: str
) -> dict[str, Any]:
    """Options that exist, of the types that the procedure declares."""
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            hint = did_you_mean(name, known)
            names = ", ".join(known) or "none"
            raise RequestError(f"{kind} has no option '{name[:64]}'{hint}; its options: {names}", name[:64])
        kinds, _ = known[name]
        if not _fits(value, kinds):
            wanted = " or ".join(_KIND_NAMES.get(k, k.__name__) for k in kinds)
            raise RequestError(f"option '{name}' of {kind} must be {wanted}, got {str(value)[:64]!r}", name)
        if (allowed := out_of_range(name, value, whole=int in kinds and float not in kinds)) is not None:
            raise RequestError(f"option '{name}' of {kind} must be {allowed}, got {str(value)[:64]}", name)
        checked[name] = float(value) if isinstance(value, int) and int not in kinds and bool not in kinds else value
    return checked


def _check_cost(
    cost: int,
    model: Model,
    config: ServingConfig,
    what: str,
    instead: Callable[[], str] = lambda: "ask for less at a time",
) -> None:
    pixels = model.config.pixels
    if cost * pixels > config.max_request_cost:
        raise RequestError(
            f"{what} x {pixels} pixels is more than the limit of {config.max_request_cost} (of a request, or of what "
            f"is done here in {config.deadline_s:g} s); {instead()}",
            code="request_too_large",
        )


def _fields(request: BaseModel) -> dict[str, Any]:
    """What a request asks of its images, a prompt included."""
    names = (*(kind.asked_as for kind in KINDS.values()), "prompt")
    return {name: value for name in names if (value := getattr(request, name, None)) not in (None, "")}


def _asked(request: BaseModel, n: int, model: Model) -> Conditioning:
    """What a request asks of each of n images. A prompt names one class for all, or tags with commas between them.

    Raises:
        RequestError: as `Conditioner.asked`, or prompt and another field that ask for different things.
    """
    fields, conditioner = _fields(request), model.conditioner
    prompt = fields.pop("prompt", "")
    try:
        asked = conditioner.asked(n, fields)
        if not prompt:
            return asked
        named = conditioner.prompted(n, prompt)
    except ConditionError as error:
        raise RequestError(str(error), error.field) from None
    if fields and not asked.same(named):
        raise RequestError(
            f"prompt and {next(iter(fields))} ask for different things: give one of them", next(iter(fields))
        )
    return named


def _told(echo: Mapping[str, Any]) -> str:
    """What was asked of an image, as the command line takes it."""
    (value,) = echo.values()
    return ",".join(value) if isinstance(value, list) else str(value)
