"""A folder or prefix of images; the first sub-folder is the class."""

from collections.abc import Iterable, Iterator

from pipeline import storage
from pipeline.data.config import ShardConfig
from pipeline.data.formats import tar
from pipeline.data.making.sources.base import IMAGE_SUFFIXES, PACKED, Found, Labels, Unit, ahead, image_bytes, shown


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
        for entry in storage.list_files(self.config.source, odd=True):
            folder, _, rest = entry.path.partition("/")
            if rest and is_text(folder):
                self.classes.add(folder)
            elif not rest and self.bare is None and entry.path.lower().endswith(IMAGE_SUFFIXES):
                self.bare = entry.path
            yield Unit(entry.path, entry.size, 0, 1)

    def labels(self) -> Labels:
        if not self.config.classes or not self.classes:
            return Labels((), frozenset())
        if self.bare is not None:
            raise ValueError(
                f"source {self.config.source} has the image {shown(self.bare)!r} outside of its class folders "
                f"({', '.join(sorted(self.classes)[:5])}, ...); move it into one of them, or set classes: false"
            )
        return Labels((tar.CLASS,), frozenset(self.classes))

    def read(self, units: Iterable[Unit]) -> Iterator[Found]:
        root, limit = self.config.source.rstrip("/"), self.config.max_image_bytes

        def one(unit: Unit) -> Found:
            folder, _, rest = unit.path.partition("/")
            if unit.size < 0:
                return Found(shown(unit.path), ValueError("other: a broken link, or no file"))
            if not is_text(unit.path):
                return Found(shown(unit.path), ValueError("its name is not UTF-8; rename it"))
            packed = next((say for suffix, say in PACKED.items() if unit.path.lower().endswith(suffix)), "")
            if packed:
                return Found(unit.path, ValueError(f"other: {packed}"))
            data = image_bytes(f"{root}/{unit.path}", unit.size, limit)
            return Found(unit.path, data, folder if rest and self.config.classes else None)

        yield from ahead(one, units, self.config.source)


def is_text(path: str) -> bool:
    """Whether a name is UTF-8."""
    return shown(path) == path
