"""A model: a denoiser with its configuration and card, and the directory it is stored in.

A model directory is verifiable data: `model.safetensors` (EMA weights), `config.json` (`ModelConfig`), `card.json`
(lineage and metrics) and `digests.json`, written last, with the sha256 of each of them. Its own sha256 is the model's
digest.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import backbones, storage
from pipeline.choose import build as build_choice
from pipeline.choose import choose
from pipeline.conditioner import KINDS, NAMES_OF, Conditioner, numbered
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.guidance import autoguidance, classifier_free
from pipeline.diffusion.likelihood.estimators import ESTIMATORS, Likelihood
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.pixels import Pixels
from pipeline.diffusion.procedure import Procedure, drive
from pipeline.diffusion.randomness import Noise, key_seed
from pipeline.diffusion.sampling.encode import ENCODERS
from pipeline.diffusion.sampling.grids import explicit_grid, grid, integer_grid
from pipeline.diffusion.sampling.samplers import SAMPLERS, prior
from pipeline.diffusion.scaling import prior_variance
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.diffusion.space import Space
from pipeline.ranges import Range, check
from pipeline.size import settled, sides

FILES = ("model.safetensors", "config.json", "card.json")
SCORED_TOGETHER = 16  # rows of every network call of a score: so its bits do not depend on what is scored beside it


@dataclass(frozen=True)
class ModelConfig:
    """What a model is: enough to build its network and to know how it was trained to denoise."""

    size: Annotated[int | tuple[int, int], "image height and width, pixels: 64, or [height, width]"]
    channels: Annotated[int, "colour channels: 1 or 3"] = 3
    classes: Annotated[int, "number of classes, or of tags; 0 for an unconditional model", Range(ge=0)] = 0
    condition: Annotated[str, "what the network is told of an image: labels (its class), tags (any of several)"] = (
        "labels"
    )
    network: Annotated[dict[str, Any], "backbone: name (unet, vdm, dit) and its options"] = field(
        default_factory=lambda: {"name": "unet"}
    )
    schedule: Annotated[dict[str, Any], "time law gamma(t): name and its options"] = field(
        default_factory=lambda: {"name": "cosine"}
    )
    prediction: Annotated[str, "what the network outputs: x, eps, v, score, flow, edm, mean (of a table's step)"] = (
        "eps"
    )
    scaling: Annotated[str, "(alpha, sigma) as functions of gamma: vp, ve, subvp, flow"] = "vp"
    data_std: Annotated[float, "sigma_data of the edm prediction and the unit_variance input"] = 0.5
    level: Annotated[str, "what the network is told of the level: normalised_gamma, log_sigma, step_index"] = (
        "step_index"
    )
    network_input: Annotated[str, "what the network sees: z (= alpha y) or unit_variance (EDM)"] = "z"
    learned_variance: Annotated[bool, "the network also outputs IDDPM's variance interpolation v"] = False

    def __post_init__(self) -> None:
        check(self, "model")
        object.__setattr__(self, "size", settled(self.size, "model.size"))
        if self.channels not in (1, 3):
            raise ValueError(f"model.channels must be 1 or 3, got {self.channels}")
        choose(KINDS, self.condition, "model.condition")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, *sides(self.size)

    @property
    def pixels(self) -> int:
        """Of an image, height times width."""
        return math.prod(sides(self.size))


def space_of(config: ModelConfig) -> Space:
    """What a model of this configuration diffuses."""
    return Pixels(config.image_shape)


def build(config: ModelConfig) -> Denoiser:
    """The denoiser of a configuration, freshly initialised from torch's global generator.

    Raises:
        ValueError: unknown name or option, or a prediction that cannot be decoded within the schedule.
    """
    schedule = build_choice(SCHEDULES, config.schedule, "schedule")
    return Denoiser(
        network_of(config),
        schedule,
        Parameterization(config.prediction, config.scaling, config.data_std, schedule.table),
        level=config.level,
        network_input=config.network_input,
        learned_variance=config.learned_variance,
    )


def network_of(config: ModelConfig) -> nn.Module:
    """The network of a configuration, as `build` makes it."""
    return backbones.build(
        build_choice(backbones.BACKBONES, config.network, "network"),
        channels=config.channels,
        size=config.size,
        classes=config.classes,
        out_channels=config.channels * (2 if config.learned_variance else 1),
    )


@dataclass(frozen=True)
class Sampling:
    """How to sample. `options` are the sampler's own (eta, churn, clip, ...); `grid` None is the sampler's default."""

    sampler: Annotated[str, "name of the sampler"] = "heun"
    steps: Annotated[int, "levels to query"] = 18
    grid: Annotated[str | None, "grid of levels; null: the sampler's default"] = None
    indices: Annotated[
        tuple[int, ...] | None, "explicit step indices of a tabulated schedule, in place of grid and steps"
    ] = None
    guidance: Annotated[float, "guidance scale; 1 is the model itself"] = 1.0
    options: Annotated[dict[str, Any], "the sampler's own options"] = field(default_factory=dict)
    integer_steps: Annotated[bool, "ask at steps of the schedule's table alone, the nearest to each level"] = False

    @staticmethod
    def named(how: "Sampling | str | None", options: Mapping[str, Any]) -> "Sampling":
        """A sampler by its name, or the default one, with options: those of `Sampling`, and its own."""
        if isinstance(how, Sampling):
            _alone(how, options)
            return how
        fields = ("steps", "grid", "indices", "guidance", "integer_steps")
        general = {name: value for name, value in options.items() if name in fields}
        own = {name: value for name, value in options.items() if name not in general}
        return Sampling(how or Sampling.sampler, **general, options=own)


@dataclass(frozen=True)
class Scoring:
    """How to score. `options` are the estimator's own (levels, probes, tolerance, ...)."""

    estimator: Annotated[str, "name of the likelihood estimator"] = "vlb"
    options: Annotated[dict[str, Any], "the estimator's own options"] = field(default_factory=dict)

    @staticmethod
    def named(how: "Scoring | str | None", options: Mapping[str, Any]) -> "Scoring":
        """An estimator by its name, or the default one, with its options."""
        if isinstance(how, Scoring):
            _alone(how, options)
            return how
        return Scoring(how or Scoring.estimator, dict(options))


class Model:
    """A denoiser ready to sample and to score. `guide` is a weaker network of the same shape, for auto-guidance."""

    def __init__(
        self,
        config: ModelConfig,
        denoiser: Denoiser,
        card: Mapping[str, Any] | None = None,
        digest: str = "",
        guide: Denoiser | None = None,
    ) -> None:
        self.config = config
        self.space = space_of(config)
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.card = dict(card or {})
        self.digest = digest
        self.guide = None if guide is None else guide.eval().requires_grad_(False)

    @property
    def networks(self) -> dict[str, Denoiser]:
        return {"main": self.denoiser} if self.guide is None else {"main": self.denoiser, "guide": self.guide}

    @cached_property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @cached_property
    def conditioner(self) -> Conditioner:
        """What the model is told; names by its card, else numbers."""
        names = self.card.get(NAMES_OF[self.config.condition])
        if isinstance(names, list) and len(names) == self.config.classes:
            return Conditioner(self.config.condition, tuple(map(str, names)))
        return numbered(self.config.condition, self.config.classes)

    def asked(self, n: int, **fields: Any) -> Conditioning:
        """What is asked of n images: `labels=` or `tags=`, whichever the model is told.

        Raises:
            ValueError: a field that it is not told, a wrong count, a name or number that it does not know.
        """
        return self.conditioner.asked(n, fields)

    def _told(self, conditioning: Conditioning | None, n: int) -> Conditioning:
        told = self.conditioner.nothing(n) if conditioning is None else conditioning
        if told.rows not in (0, n):
            raise ValueError(f"conditioning: need one row an image, {n}, got {told.rows}")
        return told.to(self.device)

    def levels(self, how: Sampling) -> Tensor:
        """The levels that `how` queries, gamma float64, descending."""
        schedule = self.denoiser.schedule
        if how.indices is not None:
            return explicit_grid(schedule, how.indices)
        name = how.grid or choose(SAMPLERS, how.sampler, "sampler").grid
        levels = grid(name, schedule, how.steps)
        return integer_grid(levels, schedule) if how.integer_steps else levels

    def sampling(
        self,
        seeds: Sequence[int],
        conditioning: Conditioning | None = None,
        how: Sampling | None = None,
        *,
        latents: Tensor | None = None,
        init: Tensor | None = None,
        strength: float = 1.0,
    ) -> Procedure[Tensor]:
        """The procedure that makes len(seeds) images, float (n, C, H, W) in model space; image i depends on seeds[i]
        and on its start.

        latents: float32 (n, C, H, W), what `encoding` made; the start in place of a standard normal draw.
        init: uint8 (n, C, H, W), images to start from (SDEdit, Meng et al. 2022), noised to where a share
        `strength` in (0, 1] of the steps is still to go.
        """
        how = how or Sampling()
        conditioning = self._told(conditioning, len(seeds))
        noise = Noise(seeds, self.device)
        process, levels = self.denoiser.process, self.levels(how)
        if how.integer_steps:
            if how.sampler == "adaptive":
                raise ValueError("integer_steps: sampler 'adaptive' asks wherever its error leads it; choose another")
            process = replace(process, nodes=self.denoiser.schedule.table)  # pyright: ignore[reportAttributeAccessIssue]
        shape = (len(seeds), *self.space.shape)
        if init is not None:
            if not 0 < strength <= 1:
                raise ValueError(f"strength must lie in (0, 1], got {strength}")
            levels = levels[len(levels) - max(1, round(strength * len(levels))) :]
            y = noise.normal_(torch.empty(shape, device=self.device)).mul_(math.exp(float(levels[0]) / 2))
            if len(init) != len(seeds):
                raise ValueError(f"init: need one image a seed, {len(seeds)}, got {len(init)}")
            y += self.clean(init)
        elif latents is not None:
            y = latents.to(self.device, torch.float32).contiguous() * self._latent_unit(levels)
            if y.shape != shape:
                raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        else:
            y = prior(process, shape, noise, gamma=float(levels[0]))
        sampler = choose(SAMPLERS, how.sampler, "sampler")
        procedure = sampler.start(process, y, levels, noise, conditioning, **how.options)
        if how.guidance == 1.0:
            return procedure
        if self.guide is None and self.card.get("label_dropout") == 0:
            raise ValueError(
                "guidance must be 1: this model was trained with labels alone (training.label_dropout was 0), so it "
                "does not know the unconditional prediction that guidance starts from"
            )
        return (classifier_free if self.guide is None else autoguidance)(procedure, how.guidance)

    def encoding(
        self, pixels: Tensor, conditioning: Conditioning | None = None, how: Sampling | None = None
    ) -> Procedure[Tensor]:
        """The procedure that carries uint8 images (n, C, H, W) up the probability flow to their latents, float32
        (n, C, H, W), near N(0, I) for images like the trained ones. `sampling` with the same `how` leads back as steps
        are refined.

        Raises:
            ValueError: a sampler without a way back, which only deterministic ones have.
        """
        how = how or Sampling()
        encoder = choose(ENCODERS, how.sampler, "deterministic sampler")
        levels = self.levels(how)
        self.denoiser.process.check_levels(levels)
        conditioning = self._told(conditioning, len(pixels))
        up = encoder(self.clean(pixels), levels.flip(0), conditioning, **how.options)
        return _scaled(up, 1 / self._latent_unit(levels))

    def _latent_unit(self, levels: Tensor) -> float:
        """Standard deviation of the prior at the highest level."""
        return math.sqrt(prior_variance(self.denoiser.process.scaling, float(levels[0])))

    def clean(self, pixels: Tensor) -> Tensor:
        """uint8 images (n, C, H, W) as z, float32 (n, *space.shape), in plain order: what an image scores or becomes
        does not depend on how it lay in memory (channels_last from our shards and from files, not from an array).

        Raises:
            ValueError: pixels of another type or shape.
        """
        return self.space.encode(pixels.to(self.device).contiguous())

    def scoring(
        self,
        pixels: Tensor,
        seeds: Sequence[int],
        conditioning: Conditioning | None = None,
        how: Scoring | None = None,
    ) -> Procedure[Likelihood]:
        """The procedure that scores uint8 images (n, C, H, W); image i's estimate depends on seeds[i] alone."""
        how = how or Scoring()
        if self.space.grid is None:
            raise ValueError("this model works on no grid of grey levels: its images have no likelihood")
        x = self.clean(pixels)
        estimator = choose(ESTIMATORS, how.estimator, "estimator")
        options = self.scoring_options(how)
        conditioning = self._told(conditioning, len(pixels))
        noise = Noise(seeds, self.device)
        return estimator.start(x, self.denoiser.process, noise, conditioning, pixels=self.space.grid, **options)

    def scoring_options(self, how: Scoring) -> dict[str, Any]:
        """The estimator's options, completed by what this model says of itself (`Estimator.needs`).

        Raises:
            ValueError: an option that the estimator has not, or what it needs of a model that this one has not.
        """
        estimator = choose(ESTIMATORS, how.estimator, "estimator")
        for name in how.options:
            if name not in estimator.options:
                known = ", ".join(estimator.options)
                raise ValueError(f"estimator '{how.estimator}' has no option '{name}'; it has: {known}")
        return dict(estimator.needs(how.options, self.denoiser))

    def sample(
        self,
        n: int = 16,
        how: Sampling | str | None = None,
        *,
        seed: int = 0,
        labels: int | Sequence[int] | Tensor | None = None,
        tags: Sequence[str] | Sequence[Sequence[str]] | None = None,
        **options: Any,
    ) -> Tensor:
        """n images, uint8 (n, C, H, W).

        how: a `Sampling`, or a sampler's name with options, those of `Sampling` and the sampler's own:
        `model.sample(16, "heun", steps=18)`. labels, tags: what is asked of the images, of all or one each.

        Raises:
            ValueError: an option that there is not, what the sampler refuses, or what the model cannot be asked for.
        """
        procedure = Sampling.named(how, options)
        return self.sampled(self.asked(n, labels=labels, tags=tags), n, procedure, seed)

    def sampled(self, conditioning: Conditioning, n: int, how: Sampling | None = None, seed: int = 0) -> Tensor:
        """As `sample`, of what `conditioning` asks."""
        seeds = [key_seed("sample", seed, index) for index in range(n)]
        return self.space.decode(drive(self.sampling(seeds, conditioning, how), self.networks)).cpu()

    def bits_per_dim(
        self,
        pixels: Tensor,
        how: Scoring | str | None = None,
        *,
        seed: int = 0,
        labels: int | Sequence[int] | Tensor | None = None,
        tags: Sequence[str] | Sequence[Sequence[str]] | None = None,
        chunk: int = SCORED_TOGETHER,
        **options: Any,
    ) -> Likelihood:
        """Likelihood of uint8 images (n, C, H, W), bits/dim an image with parts and standard errors.

        how: a `Scoring`, or an estimator's name with its options: `model.bits_per_dim(images, "ode", tolerance=1e-3)`.
        chunk: rows of every network call; with one value of it an image's score is the same to the last bit whatever
        it is scored with.

        Raises:
            ValueError: an option that the estimator has not, what it refuses, or what the model is not told.
        """
        if chunk < 1:
            raise ValueError(f"bits_per_dim: chunk must be at least 1, got {chunk}")
        scoring, n = Scoring.named(how, options), len(pixels)
        seeds = [key_seed("score", seed, index) for index in range(n)]
        asked = self.asked(n, labels=labels, tags=tags)
        return drive(self.scoring(pixels, seeds, asked, scoring), self.networks, chunk)


def _alone(how: object, options: Mapping[str, Any]) -> None:
    """Raises ValueError where options come beside a configuration that has its own."""
    if options:
        kind = type(how).__name__
        raise ValueError(f"options {', '.join(options)}: a {kind} has its own; give a name with options, or a {kind}")


def _scaled(procedure: Procedure[Tensor], factor: float) -> Procedure[Tensor]:
    return (yield from procedure) * factor


# --- the directory
# -----------------------------------------------------------------------------------------------------


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def save(url: str, config: ModelConfig, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """Write a model directory at `url` (local or s3://); the digests go last, so a cut-off save is never loaded.
    Returns the digest.
    """
    contents, digests = _contents(config, weights, card)
    for name, data in contents.items():
        storage.write_bytes(storage.join(url, name), data)
    storage.write_bytes(storage.join(url, "digests.json"), digests)
    return hashlib.sha256(digests).hexdigest()


def in_memory(
    config: ModelConfig, weights: Mapping[str, Tensor], card: Mapping[str, Any], device: torch.device | str = "cpu"
) -> Model:
    """The model that `load` reads after `save`, the digest too, without the directory.

    Raises:
        ValueError: the weights do not fit the configuration.
    """
    with torch.random.fork_rng(devices=[]):
        denoiser = build(config)
    try:
        denoiser.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the configuration: {error}") from error
    digest = hashlib.sha256(_contents(config, weights, card)[1]).hexdigest()
    return Model(config, denoiser.to(device), card, digest)


def _contents(
    config: ModelConfig, weights: Mapping[str, Tensor], card: Mapping[str, Any]
) -> tuple[dict[str, bytes], bytes]:
    """The files of a model directory, and digests.json."""
    contents = {
        "model.safetensors": safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in weights.items()}),
        "config.json": _canonical(asdict(config)),
        "card.json": _canonical(dict(card)),
    }
    return contents, _canonical({name: hashlib.sha256(data).hexdigest() for name, data in contents.items()})


def load(url: str, device: torch.device | str = "cpu") -> Model:
    """Read and verify a model directory, local or s3://.

    Raises:
        ValueError: a file's digest is not the recorded one, or the weights do not fit the configuration.
        FileNotFoundError: no committed model there.
    """
    digests_bytes = storage.read_bytes(storage.join(url, "digests.json"))
    digests = json.loads(digests_bytes)
    contents: dict[str, bytes] = {}
    for name in FILES:
        contents[name] = storage.read_bytes(storage.join(url, name))
        got = hashlib.sha256(contents[name]).hexdigest()
        if got != digests.get(name):
            raise ValueError(f"{storage.join(url, name)} is damaged: sha256 {got}, expected {digests.get(name)}")
    config = config_from(json.loads(contents["config.json"]))
    with torch.random.fork_rng(devices=[]):
        denoiser = build(config)
    try:
        denoiser.load_state_dict(safetensors.torch.load(contents["model.safetensors"]))
    except RuntimeError as error:
        raise ValueError(f"{url}: the weights do not fit the configuration: {error}") from error
    return Model(
        config, denoiser.to(device), json.loads(contents["card.json"]), hashlib.sha256(digests_bytes).hexdigest()
    )


def config_from(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from plain JSON; an unknown key is a ValueError that names the valid ones."""
    return build_choice({"model": ModelConfig}, {"name": "model", **values}, "model configuration")
