"""Many images from a trained model, as a shard set with a manifest: 10,000 for a Fréchet distance in one command.

Image i follows from the model, the seed and i alone. A run that was cut off goes on where it was and ends in the same
bytes; run again, it verifies what is there and makes damaged shards again. The sampler is `evaluation.sampling`.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

from jobs import cli
from jobs.evaluate import trained_model
from jobs.progress import bar
from pipeline import storage
from pipeline.cluster.session import prepare_environment, session
from pipeline.config import RunConfig, load_config
from pipeline.data.making import generated
from pipeline.data.making.slices import SliceDone
from pipeline.data.sets.manifest import Manifest
from pipeline.evaluation.work import here
from pipeline.model import Model
from pipeline.serving.offline import SliceWork, generated_set
from pipeline.storage.lease import Claim, hold

IMAGES = 10_000
Worker = Callable[[Sequence[SliceWork]], Iterator[tuple[int, SliceDone]]]


def run(
    config: RunConfig,
    model: Model | None = None,
    *,
    url: str | None = None,
    images: int = IMAGES,
    seed: int = 0,
    asked: Mapping[str, Any] | None = None,
    local: bool = False,
) -> Manifest:
    """The finished set at `url`, else at OUTPUT/samples. Needs a Ray session unless `local`."""
    prepare_environment()
    model = model or trained_model(config, _device(config, local))
    place = url or storage.join(config.output, "samples")
    rows = max((len(value) for value in (asked or {}).values()), default=0)
    conditioning = model.asked(rows, **asked) if asked else None
    how, chunk = config.evaluation.sampling, config.serving.chunk
    made, work = generated_set(place, model, images, seed, conditioning, how, chunk)
    with hold(place, "jobs.sample") as lease:
        found = _made(config, model, made, work, local, lease.claim)
    cli.console.print(
        f"  {found.url}: {images:,} images in {found.shards.num_rows} shards; manifest {found.digest[:12]}",
        soft_wrap=True,
    )
    return found


def _made(
    config: RunConfig, model: Model, made: generated.GeneratedSet, work: list[SliceWork], local: bool, claim: Claim
) -> Manifest:
    images = made.images
    found = generated.standing(made)
    if found is None:
        done = generated.finished(made)
        _make(config, model, [piece for piece in work if piece.index not in done], images, local)
        found = generated.commit(made, claim.check)
    elif wrong := generated.damaged(found):
        _make(config, model, [work[index] for index in wrong], images, local)
        if still := generated.damaged(found):
            raise ValueError(
                f"{made.url}: shards {still} do not come to the same bytes on this machine; choose another url"
            )
        generated.clean(made)
    return found


def _make(config: RunConfig, model: Model, work: Sequence[SliceWork], images: int, local: bool) -> None:
    if not work:
        return
    done = images - sum(piece.images for piece in work)
    with bar("sample", images, "images") as live:
        live.update(done, f"{done:,} were there" if done else "")
        for place, _ in _worker(config, model, local)(work):
            done += work[place].images
            live.update(done)


def _device(config: RunConfig, local: bool) -> str:
    """Where this process samples; tasks find their own device."""
    return "cuda" if local and config.cluster.gpus_per_worker > 0 else "cpu"


def _worker(config: RunConfig, model: Model, local: bool) -> Worker:
    """Those of an evaluation do any work that knows how to run."""
    if local:
        return cast(Worker, here(model))
    from pipeline.cluster.batch import ray_worker

    return cast(Worker, ray_worker(model, 1.0, config.cluster.gpus_per_worker))


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks of the images in turn."""
    asked: dict[str, Any] = {}
    if args.labels is not None:
        try:
            asked["labels"] = [int(part) for part in args.labels.split(",")]
        except ValueError:
            raise ValueError(f"--labels must be class numbers with commas between them, got '{args.labels}'") from None
    if args.tags:
        asked["tags"] = [[tag for tag in text.split(",") if tag] for text in args.tags]
    return asked


def main() -> None:
    parser = cli.parser("sample", __doc__ or "", ["model", "evaluation", "serving", "cluster", "tracking"])
    parser.add_argument("--model", help="another model than the run's: models:/NAME@alias or a model directory")
    parser.add_argument("--to", metavar="URL", help="where the set goes, a folder or s3:// prefix [OUTPUT/samples]")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help=f"how many [{IMAGES}]")
    parser.add_argument("--seed", type=int, default=0, help="image i follows from it and i alone [0]")
    parser.add_argument("--labels", metavar="K,...", help="classes in turn, -1 for no class [all classes]")
    parser.add_argument("--tags", action="append", metavar="T,...", help="tags of an image; again: of the next in turn")
    parser.add_argument("--local", action="store_true", help="one process, no Ray")
    args = parser.parse_intermixed_args()

    def job() -> None:
        import pipeline

        config, asked = load_config(args.run_file, args.overrides), _asked(args)
        model = None
        if args.model:
            device = _device(config, args.local)
            model = pipeline.load(args.model, device=device, tracking_uri=config.tracking.uri)
        with nullcontext() if args.local else session(config.cluster.address):
            run(config, model, url=args.to, images=args.images, seed=args.seed, asked=asked, local=args.local)

    cli.main(job)


if __name__ == "__main__":
    main()
