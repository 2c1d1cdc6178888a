"""A folder or prefix of images; the first sub-folder is the class."""

from collections.abc import Iterable, Iterator

from pipeline import storage
from pipeline.data.config import ShardConfig
from pipeline.data.formats import tar
from pipeline.data.making.sources.base import Found, Labels, Unit, ahead, image_bytes


class FolderSource:
    """One image a file."""

    mixed = True

    def __init__(self, config: ShardConfig) -> None:
        for name in ("tags_field", "caption_field", "class_field"):
            if getattr(config, name):
                raise ValueError(f"{name}: the source {config.source} has images in folders, not tars or tables")
        local = storage.local_path(config.source)
        if local is not None and not local.is_dir():
            raise ValueError(f"source {config.source} is not a folder")
        self.config, self.slice_weight = config, config.slice_size
        self.classes = set[str]()
        self.bare: str | None = None

    def units(self) -> Iterator[Unit]:
        for entry in storage.list_files(self.config.source):
            folder, _, rest = entry.path.partition("/")
            if rest:
                self.classes.add(folder)
            elif self.bare is None:
                self.bare = entry.path
            yield Unit(entry.path, entry.size, 0, 1)

    def labels(self) -> Labels:
        if not self.config.classes or not self.classes:
            return Labels((), frozenset())
        if self.bare is not None:
            raise ValueError(
                f"source {self.config.source} has {self.bare!r} outside of its class folders "
                f"({', '.join(sorted(self.classes)[:5])}, ...); move it into one of them, or set classes: false"
            )
        return Labels((tar.CLASS,), frozenset(self.classes))

    def read(self, units: Iterable[Unit]) -> Iterator[Found]:
        root, limit = self.config.source.rstrip("/"), self.config.max_image_bytes

        def one(unit: Unit) -> Found:
            data = image_bytes(f"{root}/{unit.path}", unit.size, limit)
            return Found(unit.path, data, unit.path.partition("/")[0] if self.config.classes else None)

        yield from ahead(one, units, self.config.source)
