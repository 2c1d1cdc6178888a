"""Images to WebDataset shards with a Parquet manifest, by Ray tasks. Run again, it adds what the source has more as a
new version; where nothing is new, it verifies what is there and mends what is damaged.
"""

from jobs import cli
from jobs.progress import bar
from pipeline import storage
from pipeline.cluster.session import prepare_environment, session
from pipeline.config import RunConfig, load_config
from pipeline.data.making.sources.base import is_file
from pipeline.data.sets.manifest import HELD_OUT, TRAIN, Manifest, folder_of


def run(config: RunConfig) -> Manifest:
    """Shard `config.shard`. Needs a Ray session."""
    prepare_environment()
    from pipeline.cluster.shard_tasks import ShardProgress, shard

    with bar("shard", 1, "images") as live:

        def show(progress: ShardProgress) -> None:
            share = progress.slices_done + progress.verified
            live.total = max(progress.images, 1) * max(progress.slices + progress.to_verify, 1) / max(share, 1)
            note = f"{progress.rejected} rejected" if progress.rejected else ""
            live.update(progress.images, note)

        manifest = shard(config.shard, show)
    train, held_out = manifest.split(TRAIN), manifest.split(HELD_OUT)
    rejected, others = manifest.card["rejected"], manifest.card.get("others", 0)
    cli.console.print(
        f"  {manifest.url}: {train.total:,} training and {held_out.total:,} held-out images in "
        f"{len(train.urls) + len(held_out.urls)} shards, {rejected} rejected, {others} other; "
        f"manifest {manifest.digest[:12]}, version {manifest.version}"
    )
    for path, _ in manifest.reject_tables if rejected or others else ():
        cli.console.print(f"  what is not in the set, and why: {manifest.url}/{path}")
    if len(manifest.removed):
        cli.console.print(
            f"  left out by readers, and why: {manifest.url}/{folder_of(manifest.digest)}/removed.parquet"
        )
    return manifest


def main() -> None:
    args = cli.parser("shard", __doc__ or "", ["shard", "cluster"]).parse_intermixed_args()

    def job() -> None:
        config = load_config(args.run_file, args.overrides)
        source = config.shard.source
        listed = not config.shard.mixture and not is_file(source)
        if listed and next(storage.list_files(source), None) is None:  # before a Ray is started for it
            raise ValueError(f"shard.source: no file in {source}")
        with session(config.cluster.address):
            run(config)

    cli.main(job)


if __name__ == "__main__":
    main()
