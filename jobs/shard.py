"""Images to WebDataset shards with a Parquet manifest, by Ray tasks. Run again, it verifies what is there and makes
what is missing.
"""

from jobs import cli
from jobs.progress import bar
from pipeline.cluster.session import prepare_environment, session
from pipeline.config import RunConfig, load_config
from pipeline.data import storage
from pipeline.data.manifest import HELD_OUT, TRAIN, Manifest


def run(config: RunConfig) -> Manifest:
    """Shard `config.shard`. Needs a Ray session."""
    prepare_environment()
    from pipeline.cluster.shard_tasks import ShardProgress, shard

    with bar("shard", 1, "images") as live:

        def show(progress: ShardProgress) -> None:
            share = progress.slices_done + progress.verified
            live.total = max(progress.images, 1) * max(progress.slices, 1) / max(share, 1)
            note = f"{progress.rejected} rejected" if progress.rejected else ""
            live.update(progress.images, note)

        manifest = shard(config.shard, show)
    train, held_out = manifest.split(TRAIN), manifest.split(HELD_OUT)
    rejected = manifest.card["rejected"]
    cli.console.print(
        f"  {manifest.url}: {train.total:,} training and {held_out.total:,} held-out images in "
        f"{len(train.urls) + len(held_out.urls)} shards, {rejected} rejected; manifest {manifest.digest[:12]}"
    )
    if rejected:
        cli.console.print(f"  rejected images and why: {manifest.url}/rejects.parquet")
    return manifest


def main() -> None:
    args = cli.parser("shard", __doc__ or "", ["shard", "cluster"]).parse_intermixed_args()

    def job() -> None:
        config = load_config(args.run_file, args.overrides)
        if next(storage.list_files(config.shard.source), None) is None:  # before a Ray is started for it
            raise ValueError(f"shard.source: no file in {config.shard.source}")
        with session(config.cluster.address):
            run(config)

    cli.main(job)


if __name__ == "__main__":
    main()
