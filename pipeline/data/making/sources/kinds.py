"""Which kind of source a URL is."""

from collections import Counter
from collections.abc import Callable
from itertools import islice

from pipeline import storage
from pipeline.choose import choose
from pipeline.data.config import ShardConfig
from pipeline.data.making.sources.base import IMAGE_SUFFIXES, PACKED, Source, is_file
from pipeline.data.making.sources.folder import FolderSource
from pipeline.data.making.sources.tables import TableSource
from pipeline.data.making.sources.tars import TarSource

LOOKED_AT = 1000  # files, for those that tell


def open_source(config: ShardConfig) -> Source:
    """The source of a configuration, of the kind that is asked for or that the suffixes tell.

    Raises:
        ValueError: an archive that is not read; files of several kinds; fields that this kind of source does not have.
    """
    source = config.source
    if config.kind:
        return choose(KINDS, config.kind, "kind of source")(config)
    packed = next((say for suffix, say in PACKED.items() if source.lower().endswith(suffix)), "")
    if packed:
        raise ValueError(f"source {source} is {packed}, then name the folder or the .tar")
    paths = [source] if is_file(source) else [e.path for e in islice(storage.list_files(source), LOOKED_AT)]
    told = [kind for path in paths for suffix, kind in SUFFIXES.items() if path.lower().endswith(suffix)]
    found = Counter(told)
    if len(found) > 1:
        there = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
        raise ValueError(
            f"source {source} has files of several kinds ({there}, of the first {len(paths)} files): "
            f"say which to take, such as kind: {found.most_common(1)[0][0]}; the others are then named and left out"
        )
    return KINDS[told[0] if told else "images"](config)


KINDS: dict[str, Callable[[ShardConfig], Source]] = {"images": FolderSource, "tars": TarSource, "tables": TableSource}
SUFFIXES = {".tar": "tars", ".parquet": "tables", **dict.fromkeys(IMAGE_SUFFIXES, "images")}
