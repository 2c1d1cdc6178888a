"""Parquet tables with one image a row: its bytes, or a URL below a stated root; and columns of labels."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.config import ShardConfig
from pipeline.data.formats import tar
from pipeline.data.making.sources.base import (
    Found,
    Labels,
    Unit,
    ahead,
    files_of,
    image_bytes,
    no_image,
    root_of,
    shown,
)

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "url")
ROWS_AT_ONCE = 64
MOST_CLASSES = 1 << 20


class NotATable(ValueError):
    """A file that is no Parquet table."""


class TableSource:
    """Tables; one slice is a run of row groups of at least the slice size."""

    mixed = False

    def __init__(self, config: ShardConfig) -> None:
        self.config, self.slice_weight = config, config.slice_size
        self.root = root_of(config.source)
        self.image_root = config.image_root or self.root
        self.extras: tuple[str, ...] = ()
        self.classes = set[str]()

    def units(self) -> Iterator[Unit]:
        for entry in files_of(self.config.source):
            if entry.size < 0 or not entry.path.lower().endswith(".parquet"):
                yield Unit(entry.path, entry.size, 0, 0)
                continue
            try:
                yield from self._groups(entry)
            except NotATable:
                yield Unit(entry.path, entry.size, 0, 0)

    def _groups(self, entry: storage.Entry) -> Iterator[Unit]:
        with self._open(entry.path) as file:
            columns, twice = self._columns(file.schema_arrow, entry.path)
            self.extras = tuple(extra for extra in tar.EXTRAS if extra in columns)
            label = "" if twice else columns.get(tar.CLASS, "")
            for group in range(file.num_row_groups):
                if label and _is_text(file.schema_arrow.field(label).type):
                    self._number(file, group, label, entry.path)
                yield Unit(entry.path, entry.size, group, file.metadata.row_group(group).num_rows)

    def labels(self) -> Labels:
        return Labels(self.extras, frozenset(self.classes))

    def read(self, units: Iterable[Unit]) -> Iterator[Found]:
        yield from ahead(self._resolved, (row for unit in units for row in self._rows(unit)), self.image_root)

    def _rows(self, unit: Unit) -> Iterator[Found | tuple[str, Mapping[str, Any], dict[str, str]]]:
        """The rows of a row group, or what is wrong with each."""
        if unit.size < 0 or not unit.path.lower().endswith(".parquet"):
            yield no_image(unit.path, "tables")
            return
        try:
            with self._open(unit.path) as file:
                yield from self._group(file, unit)
        except NotATable as error:
            yield Found(shown(unit.path), ValueError(str(error)))

    def _group(self, file: Any, unit: Unit) -> Iterator[Found | tuple[str, Mapping[str, Any], dict[str, str]]]:
        columns, twice = self._columns(file.schema_arrow, unit.path)
        at = sum(file.metadata.row_group(group).num_rows for group in range(unit.group))
        stop = at + file.metadata.row_group(unit.group).num_rows
        reason = twice
        try:
            wanted = list(columns.values())
            for batch in () if twice else file.iter_batches(ROWS_AT_ONCE, row_groups=[unit.group], columns=wanted):
                for row in batch.to_pylist():
                    yield shown(f"{unit.path}#{at}"), row, columns
                    at += 1
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if _of_the_store(error):
                raise
            reason = f"a damaged row group: {error}"
        for number in range(at, stop):
            yield Found(shown(f"{unit.path}#{number}"), ValueError(reason))

    def _resolved(self, found: Found | tuple[str, Mapping[str, Any], dict[str, str]]) -> Found:
        if isinstance(found, Found):
            return found
        name, row, columns = found
        try:
            label = row[columns[tar.CLASS]] if tar.CLASS in columns else None
            if tar.CLASS in columns and (label is None or (isinstance(label, int) and not 0 <= label < 10**9)):
                raise ValueError(f"its class is {label!r}; it must be a name or a number from 0")
            listed = row[columns[tar.TAGS]] or [] if tar.TAGS in columns else []
            caption = row[columns[tar.CAPTION]] or "" if tar.CAPTION in columns else ""
            data = self._bytes(row[columns["image"]])
        except ValueError as error:
            return Found(name, error)
        return Found(name, data, label, tuple(sorted({str(tag) for tag in listed})), str(caption).strip())

    def _bytes(self, value: Any) -> bytes | ValueError:
        limit = self.config.max_image_bytes
        if isinstance(value, dict):  # as Hugging Face's datasets keep images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return image_bytes(self._below_root(value), None, limit)
        if not value:
            return ValueError("no image in this row")
        return value if len(value) <= limit else ValueError(f"{len(value)} bytes, more than the limit of {limit}")

    def _below_root(self, url: str) -> str:
        """An image's URL: relative to the root, or written out and below it.

        Raises:
            ValueError: it lies elsewhere, or is no URL that is ever opened.
        """
        root = self.image_root.rstrip("/")
        if url.startswith(f"{root}/"):
            url = url[len(root) + 1 :]
        elif url.startswith("s3://"):
            raise ValueError(f"refused URL {url!r}: it is not below image_root {root}")
        return storage.join(root, url)

    @contextlib.contextmanager
    def _open(self, path: str) -> Iterator[Any]:
        with storage.open_ranges(storage.join(self.root, path)) as raw:
            try:
                file = pq.ParquetFile(raw)
            except (pa.ArrowException, OSError) as error:
                if _of_the_store(error):
                    raise
                raise NotATable(f"{self.root}/{path} is not a Parquet table: {error}") from None
            with file:
                yield file

    def _columns(self, schema: Any, path: str) -> tuple[dict[str, str], str]:
        """Which column holds what: "image" and the extras that are asked for; and why none of the rows can be read,
        if so.

        Raises:
            ValueError: a column that is not there or of another type.
        """
        config, names = self.config, set(schema.names)
        image = config.image_field or next((name for name in IMAGE_COLUMNS if name in names), "")
        label = (config.class_field or ("label" if "label" in names else "")) if config.classes else ""
        asked = {"image": image, tar.CLASS: label, tar.TAGS: config.tags_field, tar.CAPTION: config.caption_field}
        columns = {what: name for what, name in asked.items() if name or what == "image"}
        for what, name in columns.items():
            if name not in names:
                raise ValueError(
                    f"{self.root}/{path} has no column {name or ' or '.join(IMAGE_COLUMNS)!r} for the {_SAY[what]}; "
                    f"it has {', '.join(schema.names)}"
                )
            if schema.names.count(name) > 1:
                return columns, f"the table has {schema.names.count(name)} columns named {name!r}"
            if not _FITS[what](schema.field(name).type):
                raise ValueError(
                    f"{self.root}/{path}: column {name!r} cannot be the {_SAY[what]}: it is {schema.field(name).type}"
                )
        return columns, ""

    def _number(self, file: Any, group: int, label: str, path: str) -> None:
        """Takes the names of a row group's classes; those of a damaged one are missed as its rows are."""
        try:
            column = file.read_row_group(group, columns=[label])[label]
            self.classes.update(name for name in column.unique().to_pylist() if name is not None)
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if _of_the_store(error):
                raise
        if len(self.classes) > MOST_CLASSES:
            raise ValueError(f"{self.root}/{path}: more than {MOST_CLASSES} different classes; is it the right column?")


def _of_the_store(error: Exception) -> bool:
    """Whether an error is the store's; of damaged bytes pyarrow makes its own, or an OSError without a number."""
    return isinstance(error, OSError) and not (type(error) is OSError and error.errno is None)


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_name(kind: Any) -> bool:
    return _is_text(kind) or pa.types.is_integer(kind)


def _is_image(kind: Any) -> bool:
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return binary or _is_text(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


_SAY = {"image": "image", tar.CLASS: "class", tar.TAGS: "tags", tar.CAPTION: "caption"}
_FITS = {
    "image": _is_image,
    tar.CLASS: _is_name,
    tar.TAGS: lambda kind: pa.types.is_list(kind) and _is_name(kind.value_type),
    tar.CAPTION: _is_text,
}
