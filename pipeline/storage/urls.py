"""URL rules: a local path or s3://bucket/key, and nothing else."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*):")
_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]$")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Location:
    """A parsed URL: `bucket` is None for a local path; `path` is the local path or the S3 key (may be empty for a
    whole bucket).
    """

    bucket: str | None
    path: str


@dataclass(frozen=True)
class Entry:
    """One listed file: `path` relative to the listed URL with forward slashes, `size` in bytes."""

    path: str
    size: int


def parse(url: str) -> Location:
    """A URL's parts; a local path's `~` is the home folder.

    Raises:
        ValueError: any scheme but s3, a malformed bucket, `.` or `..` in an S3 key, control characters.
    """
    if not url or _CONTROL.search(url):
        raise ValueError(f"not a storage URL: {url!r}; give a local path or s3://bucket/prefix")
    scheme = _SCHEME.match(url)
    if scheme is None:
        return Location(None, os.path.expanduser(url))
    if scheme.group(1) != "s3" or not url.startswith("s3://"):
        raise ValueError(
            f"refused URL {url!r}: scheme '{scheme.group(1)}:' is not allowed; "
            "give a local path (./name for a name with a colon) or s3://bucket/prefix"
        )
    bucket, _, key = url[len("s3://") :].partition("/")
    if not _BUCKET.match(bucket):
        raise ValueError(f"refused URL {url!r}: '{bucket}' is not a bucket name")
    key = key.rstrip("/")
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"refused URL {url!r}: empty, '.' or '..' parts in an S3 key")
    return Location(bucket, key)


def join(root: str, *relative: str) -> str:
    """`root` with relative parts below it.

    Raises:
        ValueError: a part that is absolute, has a scheme, a backslash, a control character, or leaves the root by
            `..`.
    """
    parse(root)
    url = root.rstrip("/") or "/"
    for part in relative:
        pieces = part.split("/")
        if (
            _SCHEME.match(part)
            or "\\" in part
            or _CONTROL.search(part)
            or any(piece in ("", ".", "..") for piece in pieces)
        ):
            raise ValueError(f"refused path {part!r} below {root}: it must be relative and stay below its root")
        url = f"{url.rstrip('/')}/{part}"
    return url


def is_s3(url: str) -> bool:
    """Whether the URL is on S3."""
    return parse(url).bucket is not None


def local_path(url: str) -> Path | None:
    """The path of a local URL, None on S3."""
    location = parse(url)
    return Path(location.path) if location.bucket is None else None
