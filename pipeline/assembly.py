"""From a run file to what the training loop takes: the same on one machine and on every worker of a cluster."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pipeline
from pipeline import interchange, storage
from pipeline.choose import build as build_choice
from pipeline.conditioner import NAMES_OF, numbered
from pipeline.data.reading.stream import Images, Stream, StreamConfig, held_out, thread_stream
from pipeline.data.sets.manifest import Manifest
from pipeline.data.sets.manifest import load as load_manifest
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.likelihood.estimators import Likelihood
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.procedure import Procedure, drive
from pipeline.diffusion.randomness import key_seed
from pipeline.model import Model, ModelConfig, Scoring, build, in_memory, network_of, save, space_of
from pipeline.storage.lease import Claim
from pipeline.training.checkpoint import STATE, committed, folder, newest
from pipeline.training.events import Event, Finished
from pipeline.training.footprint import Footprint, check_room, footprint, free_memory
from pipeline.training.loop import RunError, train
from pipeline.training.loop import standing as training_standing
from pipeline.training.step import Place
from pipeline.training.task import HeldOut, Hooks, Task, check_finished

if TYPE_CHECKING:
    from pipeline.config import RunConfig

OpenStream = Callable[[StreamConfig, Manifest, list[int], int], Stream]

SCORED_AT_ONCE = 64
IN_ORDER = ("batch_size", "logical_shards", "seed", "window", "flip")  # what decides which image comes when


def checkpoints(config: "RunConfig") -> str:
    """URL of a run's checkpoints."""
    return storage.join(config.output, "checkpoints")


def data(config: "RunConfig") -> Manifest:
    """The shard set that the run trains on: the version its checkpoints began with, else the newest.

    Raises:
        ValueError: there is no such set, or it no longer has that version.
    """
    return load_manifest(config.stream.url, began(config).get("data.digest"))


def began(config: "RunConfig") -> Mapping[str, Any]:
    """The `identity` of the run whose checkpoints are at the output, not verified; empty where there is none."""
    found = _stored(config)
    return {} if found is None else found[1]["identity"]


def _stored(config: "RunConfig") -> tuple[int, Mapping[str, Any]] | None:
    """Step and facts of the newest checkpoint that can be read, not verified."""
    store = checkpoints(config)
    for step in committed(store):
        try:
            facts = json.loads(storage.read_bytes(storage.join(folder(store, step), STATE)))["facts"]
            facts["identity"].get("seed")
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # an older one says the same
            continue
        return step, facts
    return None


def changes_nothing_finished(config: "RunConfig") -> None:
    """Raises RunError where the run at the output has ended and would be described otherwise than it was trained."""
    found = _stored(config)
    if found is not None and "ended" in found[1]:
        check_finished(found, config.training, config.stream.batch_size, {"name": config.name}, checkpoints(config))


def assemble(
    config: "RunConfig",
    manifest: Manifest,
    place: Place,
    open_stream: OpenStream,
    stop: Callable[[], bool] = lambda: False,
    claim: Claim | None = None,
) -> Task:
    """What one rank trains. Its initial weights come from the run's seed, or from `init`. claim: the lease on the
    output, without which no checkpoint is committed.

    Raises:
        RunError: the shard set does not fit the model.
    """
    fits(config.model, manifest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed("initial weights", config.seed))
        denoiser = build(config.model)
    if config.init is not None:
        start_from(denoiser, config.model, config.init, config.tracking.uri)
    held = Held(config, manifest)
    return Task(
        config=config.training,
        denoiser=denoiser,
        objective=build_choice(OBJECTIVES, config.objective, "objective"),
        conditioner=numbered(config.model.condition, config.model.classes),
        space=space_of(config.model),
        open_batches=lambda step: open_stream(
            config.stream, manifest, place.shards(config.stream.logical_shards), step
        ),
        batch_size=config.stream.batch_size,
        logical_shards=config.stream.logical_shards,
        seed=config.seed,
        store=checkpoints(config),
        identity=identity(config, manifest),
        about=about(config, manifest),
        place=place,
        hooks=Hooks(
            evaluate=held.scores if config.training.evaluate_images else None,
            sample=held.sample if config.training.sample_images else None,
            stop=stop,
            commit=(lambda: None) if claim is None else claim.check,
        ),
    )


def train_here(
    config: "RunConfig", stop: Callable[[], bool] = lambda: False, claim: Claim | None = None
) -> Iterator[Event]:
    """The whole training in this process: no cluster, the data read by threads."""
    manifest = data(config)
    yield from train(assemble(config, manifest, Place(device=device_here(config)), thread_stream, stop, claim))


def device_here(config: "RunConfig") -> torch.device:
    """Where `train_here` trains."""
    return torch.device("cuda" if config.cluster.gpus_per_worker > 0 else "cpu")


def standing(config: "RunConfig", manifest: Manifest) -> Finished | None:
    """The end of this run's training where it is there already, and checks that need no worker.

    Raises:
        RunError: the shard set does not fit the model, the checkpoints at `output` are of another run, or they are
            its end and the run file was changed since.
    """
    fits(config.model, manifest)
    facts = identity(config, manifest)
    told = about(config, manifest)
    return training_standing(config.training, config.stream.batch_size, checkpoints(config), facts, told)


def identity(config: "RunConfig", manifest: Manifest) -> dict[str, Any]:
    """The facts that make a run this run: a checkpoint is continued only where they are the same. Flat, JSON values."""
    return choices(config) | {"data.digest": manifest.digest}


def choices(config: "RunConfig") -> dict[str, Any]:
    """The part of a run's `identity` that its run file says."""
    facts = {
        "model": asdict(config.model),
        "objective": config.objective,
        "init": config.init,
        "seed": config.seed,
        "stream": {name: getattr(config.stream, name) for name in IN_ORDER},
    }
    return dict(_flat("", json.loads(json.dumps(facts))))


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def fits(model: ModelConfig, manifest: Manifest) -> None:
    """Raises RunError where the shard set has not what the model takes."""
    if manifest.image.shape != model.image_shape:
        raise RunError(
            f"model takes images of (channels, height, width) {model.image_shape}, the shard set at {manifest.url} has "
            f"{manifest.image.shape}: change model.size and model.channels, or shard it anew"
        )
    names = names_of(model, manifest)
    if model.classes and len(names) != model.classes:
        what = "classes" if model.condition == "labels" else model.condition
        raise RunError(f"model.classes is {model.classes}, the shard set at {manifest.url} has {len(names)} {what}")


def names_of(model: ModelConfig, manifest: Manifest) -> tuple[str, ...]:
    """The set's names of what the model is told: its classes, or its tags."""
    return manifest.class_names if model.condition == "labels" else manifest.names.tags


def start_from(denoiser: Denoiser, config: ModelConfig, url: str, tracking_uri: str | None) -> None:
    """Copies the weights of a model version or directory, or of a local diffusers folder, into a fresh denoiser.

    Raises:
        RunError: they do not fit.
    """
    if interchange.is_diffusers(url):
        try:
            interchange.start_from(denoiser.network, config, url)
        except ValueError as error:
            raise RunError(f"init: {error}") from None
        return
    weights = pipeline.load(url, tracking_uri=tracking_uri).denoiser.state_dict()
    try:
        denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"init: the weights of {url} do not fit the model of this run: {error}") from None


class Held:
    """The held-out images, read when they are first asked for, and the fixed draws they are scored by."""

    def __init__(self, config: "RunConfig", manifest: Manifest) -> None:
        self.config, self.manifest = config, manifest
        self.images: Images | None = None

    def scores(self, denoiser: Denoiser, place: Place) -> HeldOut:
        """By the continuous bound; image i's draws depend on i alone.

        Images are scored in groups, the same for any number of ranks: what a group scores does not depend on it.
        """
        if self.images is None:
            self.images = held_out(self.manifest, self.config.training.evaluate_images)
        model, count = Model(self.config.model, denoiser), len(self.images.images)
        levels = self.config.training.evaluate_levels
        how = Scoring("vlb", {"levels": levels})
        found = HeldOut(
            *(torch.zeros(shape, dtype=torch.float64) for shape in ((count,), (count, levels), (count, levels)))
        )
        for rows in torch.arange(count).split(SCORED_AT_ONCE)[place.rank :: place.world]:
            seeds = [key_seed("held-out", index) for index in rows.tolist()]
            told = model.conditioner.of(self.images)[rows]
            seen: list[tuple[Tensor, Tensor]] = []
            scoring = model.scoring(self.images.images[rows], seeds, told, how)
            scoring = _watched(scoring, model.space.encode(self.images.images[rows].to(model.device)), seen)
            found.bits_per_dim[rows] = drive(scoring, model.networks).bits_per_dim.double().cpu()
            found.gamma[rows], found.error[rows] = (torch.cat(columns, 1).cpu() for columns in zip(*seen, strict=True))
        return found

    def sample(self, denoiser: Denoiser) -> Tensor:
        """A grid's images, uint8 (n, C, H, W), classes or tags in turn, the same seeds every time."""
        model, count = Model(self.config.model, denoiser), self.config.training.sample_images
        return model.sampled(model.conditioner.in_turn(range(count)), count)


def _watched(scoring: Procedure[Likelihood], x: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Procedure[Likelihood]:
    """The same procedure; `seen` gets (gamma, mean square of eps_hat - eps), (n, m) each, of every query: m levels of
    each clean image of x (n, C, H, W).
    """
    try:
        query = next(scoring)
        while True:
            answer = yield query
            clean = x.repeat_interleave(query.rows // len(x), dim=0)
            error = (answer.x_hat - clean).double().square().flatten(1).mean(1) / torch.exp(query.gamma)
            seen.append((query.gamma.view(len(x), -1), error.view(len(x), -1)))
            query = scoring.send(answer)
    except StopIteration as end:
        return end.value


def export(config: "RunConfig", manifest: Manifest, mlflow_run: str = "") -> str:
    """The run's EMA weights as a model directory at OUTPUT/model, and in the form that `export` names; its URL.

    Raises:
        ValueError: the run has no checkpoint that verifies.
    """
    state, rejected = newest(checkpoints(config))
    if state is None:
        raise ValueError(
            f"no checkpoint to make a model of at {checkpoints(config)}: {'; '.join(rejected) or 'train first'}"
        )
    url = storage.join(config.output, "model")
    told = about(config, manifest)
    whole = card(state.facts, state.step, told) | {"mlflow_run": mlflow_run}
    save(url, config.model, state.tensors["ema"], whole)
    if config.export:
        interchange.export(
            in_memory(config.model, state.tensors["ema"], whole), storage.join(config.output, "diffusers")
        )
    return url


def needs(config: "RunConfig") -> Footprint:
    """What one worker of the run takes of memory, of one logical shard; nothing is allocated.

    Raises:
        ValueError: a network that cannot be built.
    """
    stream, model = config.stream, config.model
    checkpointed = config.training.checkpoint_activations
    conditioner = numbered(model.condition, model.classes)
    return footprint(lambda: network_of(model), space_of(model).shape, conditioner, stream.shard_batch, checkpointed)


def has_room(config: "RunConfig", workers: int) -> None:
    """Raises ValueError where so many workers on this machine's processor certainly need more memory than is free."""
    if config.cluster.gpus_per_worker == 0:
        half = config.training.precision != "fp32"
        check_room(needs(config), workers, config.stream.shard_batch, half, free_memory())


def exportable(config: "RunConfig") -> None:
    """Raises ValueError where the trained model could not be written as a diffusers folder; names what to change."""
    interchange.expressed(config.model, config.training.label_dropout)


def demands(config: "RunConfig") -> None:
    """Raises ValueError where the run cannot leave what its `export` demands."""
    if config.export is None:
        return
    try:
        exportable(config)
    except ValueError as error:
        raise ValueError(f"export: {error}") from None
    if storage.is_s3(config.output):
        raise ValueError("export: needs a local output; leave it out and use jobs.register --export diffusers DIR")


def about(config: "RunConfig", manifest: Manifest) -> dict[str, Any]:
    """What a card tells of a run, beside how its weights were trained; kept in its checkpoints. JSON values."""
    return {
        "name": config.name,
        "objective": config.objective,
        "seed": config.seed,
        "model": json.loads(json.dumps(asdict(config.model))),
        "data": {"url": manifest.url, "digest": manifest.digest, "samples": manifest.card["samples"]},
        NAMES_OF[config.model.condition]: list(names_of(config.model, manifest)),
        "version": pipeline.__version__,
    }


def card(facts: Mapping[str, Any], step: int, instead: Mapping[str, Any]) -> dict[str, Any]:
    """A model's card by its checkpoint: what the weights were trained with, whatever the run file says by now. instead:
    `about` for a checkpoint that does not have its own.

    trained_with: settings of the training, each from a number of images on; complete: whether the training had ended.
    """
    told = {name: value for name, value in (facts.get("about") or instead).items() if name != "model"}
    trained_with = facts.get("history") or []
    dropout = {"label_dropout": trained_with[-1]["label_dropout"]} if trained_with else {}
    ended = facts.get("ended")
    return {
        **told,
        **dropout,
        "images_seen": facts["images"],
        "step": step,
        "trained_with": trained_with,
        "complete": ended is not None and ended != "stopped",
    }
