"""Storage: one URL form, atomic writes, refusals by name, S3 through a real server."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from pipeline import storage
from pipeline.storage import files, local, s3
from tests.faults.data_store import Proxy, environment

REFUSED = [
    "pipe:cat /etc/passwd",
    "pipe:curl http://169.254.169.254/",
    "http://169.254.169.254/latest/meta-data",
    "https://example.org/x.tar",
    "file:///etc/passwd",
    "file:x",
    "ftp://host/x",
    "gs://bucket/x",
    "S3://bucket/x",
    "s3:bucket/x",
    "s3:///key",
    "s3://b/key",
    "s3://Bucket/key",
    "s3://user:secret@host/key",
    "s3://bucket/../other",
    "s3://bucket/a//b",
    "s3://bucket/./a",
    "data:text/plain,hello",
    "python:os.system",
    "c:\\windows",
    "a\nb",
    "a\0b",
    "",
]
LEAVING = [
    "..",
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a//b",
    "./a",
    "s3://bucket/x",
    "pipe:id",
    "a\\..\\b",
    "a\0b",
    "",
    "a/",
]


@pytest.mark.parametrize("url", REFUSED)
def test_refused_urls(url: str) -> None:
    for call in (
        storage.parse,
        storage.exists,
        storage.read_bytes,
        lambda u: storage.write_bytes(u, b""),
        lambda u: list(storage.list_files(u)),
        storage.delete,
    ):
        with pytest.raises(ValueError, match=r"refused|not a storage URL"):
            call(url)


@pytest.mark.parametrize("part", LEAVING)
@pytest.mark.parametrize("root", ["/data/set", "s3://bucket/set"])
def test_join_stays_below_its_root(root: str, part: str) -> None:
    with pytest.raises(ValueError, match="refused path"):
        storage.join(root, part)


def test_join() -> None:
    assert storage.join("/a/b/", "c/d", "e") == "/a/b/c/d/e"
    assert storage.join("s3://bucket", "c", "d") == "s3://bucket/c/d"
    assert storage.join("/", "c") == "/c"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "root")
    else:
        yield request.getfixturevalue("s3_bucket")


def test_round_trip(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "folder", "data.bin")
    data = os.urandom(100_000)
    assert not storage.exists(url)
    storage.write_bytes(url, data)
    assert storage.exists(url)
    assert storage.size_of(url) == len(data)
    assert storage.read_bytes(url) == data
    assert storage.read_bytes(url, 10, 20) == data[10:20]
    assert storage.read_bytes(url, 99_990) == data[99_990:]
    assert storage.read_bytes(url, 99_990, 200_000) == data[99_990:]
    assert storage.read_bytes(url, 5, 5) == b""
    assert storage.digest_of(url) == storage.digest(data)
    storage.write_bytes(url, b"new")
    assert storage.read_bytes(url) == b"new"
    source = tmp_path / "source"
    source.write_bytes(data)
    storage.write_file(storage.join(root, "folder", "other"), source)
    storage.fetch_file(storage.join(root, "folder", "other"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert [(e.path, e.size) for e in storage.list_files(root)] == [("folder/data.bin", 3), ("folder/other", len(data))]
    assert [e.path for e in storage.list_files(storage.join(root, "folder"))] == ["data.bin", "other"]
    storage.delete(url)
    storage.delete(url)
    assert not storage.exists(url)
    storage.delete_tree(storage.join(root, "folder"))
    assert list(storage.list_files(root)) == []


def test_missing(root: str) -> None:
    for call in (storage.read_bytes, storage.size_of, storage.digest_of):
        with pytest.raises(FileNotFoundError):
            call(storage.join(root, "nothing"))
    assert list(storage.list_files(storage.join(root, "nothing"))) == []


def test_listing_pages_on_s3(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LIST_PAGE", 10)
    for i in range(25):
        storage.write_bytes(storage.join(s3_bucket, "many", f"{i:04d}"), b"")
    assert [entry.path for entry in storage.list_files(storage.join(s3_bucket, "many"))] == [
        f"{i:04d}" for i in range(25)
    ]


def test_missing_bucket_and_credentials_are_named(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        storage.write_bytes("s3://not-there/x", b"")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3.client_of.cache_clear()
    with pytest.raises(PermissionError, match="no S3 credentials"):
        storage.read_bytes(storage.join(s3_bucket, "x"))


def test_an_unreachable_store_is_named_after_all_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setattr(s3, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(s3, "LONGEST_DELAY_S", 0.002)
    with pytest.raises(s3.StorageError, match=r"s3://bucket/x: no answer after 8 tries") as caught:
        storage.read_bytes("s3://bucket/x")
    assert "very-secret" not in str(caught.value)


def test_a_failed_local_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(str(path), "not bytes")  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~local._umask()


def test_hidden_files_are_left_out_and_link_loops_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / ".hidden").write_bytes(b"1")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "x")
    assert [entry.path for entry in storage.list_files(str(tmp_path))] == ["a/x", "link"]


def test_bytes_that_are_wrong_twice_in_the_same_way_are_damaged(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, read, reads = storage.join(s3_bucket, "data"), storage.read_array, list[str]()
    storage.write_bytes(url, b"as it was")
    monkeypatch.setattr(files, "read_array", lambda url, stop: (reads.append(url), read(url, stop))[1])
    for sha256, expected in ((storage.digest(b"as it was"), 1), (storage.digest(b"another"), 2), (None, 2)):
        reads.clear()
        data, right = storage.read_sure(url, sha256, 100)
        assert data is not None
        assert (data.tobytes(), right, len(reads)) == (b"as it was", expected == 1, expected)
    assert storage.read_sure(storage.join(s3_bucket, "nothing"), None, 100) == (None, False)


def test_bytes_that_the_line_damages_are_read_again(s3_server: str, s3_bucket: str) -> None:
    url, body = storage.join(s3_bucket, "data"), os.urandom(1000)
    storage.write_bytes(url, body)
    with Proxy(s3_server, 0.5, 0, ("flipped byte",)) as proxy, environment(proxy.endpoint, ("test", "test")):
        for _ in range(20):
            data, right = storage.read_sure(url, storage.digest(body), 1001)
            assert right
            assert data is not None
            assert data.tobytes() == body
    assert proxy.injected.total() > 5


def test_a_first_failure_is_tried_again_at_once_unless_the_store_has_too_much_to_do() -> None:
    busy = ClientError({"ResponseMetadata": {"HTTPStatusCode": 503}}, "GetObject")  # pyright: ignore[reportArgumentType]
    assert s3.delay(1, ConnectionError()) == 0
    assert 0 < s3.delay(1, busy) <= s3.FIRST_DELAY_S
    assert s3.delay(20, busy) <= s3.LONGEST_DELAY_S


def test_a_full_disk_is_said_with_the_path(tmp_path: Path) -> None:
    """Where a file may grow no further; nothing is left of it."""
    import resource

    path, limits = tmp_path / "large.bin", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            storage.write_bytes(str(path), bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_write_is_on_the_disk_before_it_has_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's fsync with all its bytes, the rename, the folder's fsync, in this order."""
    seen: list[tuple[str, str | bytes]] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append(("folder", str(path)) if path.is_dir() else ("file", path.read_bytes()))
        fsync(handle)

    def renamed(source: str, target: str) -> None:
        seen.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    place = tmp_path / "a"
    storage.write_bytes(str(place), b"all of it")
    assert seen == [("file", b"all of it"), ("rename", str(place)), ("folder", str(tmp_path))]
