"""Which kind of source a URL is."""

from collections.abc import Callable
from itertools import islice

from pipeline import storage
from pipeline.data.config import ShardConfig
from pipeline.data.making.sources.base import IMAGE_SUFFIXES, Source
from pipeline.data.making.sources.folder import FolderSource
from pipeline.data.making.sources.tables import TableSource
from pipeline.data.making.sources.tars import TarSource

LOOKED_AT = 1000  # files, for the first that tells


def open_source(config: ShardConfig) -> Source:
    """The source of a configuration, by the suffix of its URL or of the first file in it that tells.

    Raises:
        ValueError: fields that this kind of source does not have.
    """
    paths = [config.source] if config.source.endswith((".tar", ".parquet")) else None
    if paths is None:
        paths = [entry.path for entry in islice(storage.list_files(config.source), LOOKED_AT)]
    kinds = (SOURCES[suffix] for path in paths for suffix in SOURCES if path.lower().endswith(suffix))
    return next(kinds, FolderSource)(config)


SOURCES: dict[str, Callable[[ShardConfig], Source]] = {
    ".tar": TarSource,
    ".parquet": TableSource,
    **dict.fromkeys(IMAGE_SUFFIXES, FolderSource),
}
