"""The tables of a set and their columns: Parquet, read whole or a row group at a time by ranges."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage

Table = Any  # pyarrow ships no types
Column = Any

SHARDS_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("split", pa.string()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("samples", pa.int64()),
        ("classes", pa.list_(pa.int32())),
        ("class_counts", pa.list_(pa.int64())),
    ]
)
SAMPLES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),  # of the stored bytes
        ("content", pa.binary(32)),  # of the stored pixels: equal for exact duplicates
        ("original", pa.binary(32)),  # of the source's bytes
        ("label", pa.int32()),
        ("tags", pa.list_(pa.string())),
        ("caption", pa.string()),
        ("width", pa.int32()),  # before resizing
        ("height", pa.int32()),
        ("source", pa.string()),
    ]
)
REMOVED_SCHEMA = pa.schema([("shard", pa.string()), ("index", pa.int64()), ("reason", pa.string())])
REJECTS_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string())])


def sample_batches(url: str, tables: tuple[tuple[str, str], ...], columns: list[str]) -> Iterator[Table]:
    """Some columns of the samples tables, a row group (a slice of the source) at a time; a few MiB in memory. Read by
    ranges, so not verified by the tables' digests.
    """
    for path, _ in tables:
        with storage.open_ranges(storage.join(url, *path.split("/"))) as raw, pq.ParquetFile(raw) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)


def shard_rows(url: str, tables: tuple[tuple[str, str], ...], shard: str) -> Table:
    """The rows of one shard's samples in tar order, found by the row groups' statistics.

    Raises:
        ValueError: no table has them.
    """
    for path, _ in tables:
        with storage.open_ranges(storage.join(url, *path.split("/"))) as raw, pq.ParquetFile(raw) as file:
            column = file.schema_arrow.get_field_index("shard")
            pieces: list[Table] = []
            for group in range(file.num_row_groups):
                found = file.metadata.row_group(group).column(column).statistics
                if found is not None and found.has_min_max and not found.min <= shard <= found.max:
                    continue
                rows = file.read_row_group(group)
                pieces.append(rows.filter(pa.array(np.array(rows["shard"].to_pylist(), dtype=object) == shard)))
            found_rows = pa.concat_tables(pieces) if pieces else SAMPLES_SCHEMA.empty_table()
            if found_rows.num_rows:
                return found_rows
    raise ValueError(f"no samples table of {url} has rows of {shard}")


def parquet_bytes(table: Table) -> bytes:
    """A table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def integers(column: Column) -> NDArray[np.int64]:
    """A column of whole numbers."""
    return column.to_numpy().astype(np.int64)
