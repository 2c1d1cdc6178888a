"""Requests that no honest client sends, by family. Each must come to a 4xx of the error schema, or to a closed door."""

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

GENERATE, SCORE, ENCODE = "/v1/images/generations", "/v1/likelihood", "/v1/encodings"
JSON_TYPE = "application/json"
MOST_IMAGES, MOST_BYTES = 16, 200_000  # of the endpoint that is asked


@dataclass(frozen=True)
class Hostile:
    """One request. raw: the whole of it as bytes on the wire, in place of the rest; fair: it may have an answer."""

    name: str
    path: str = GENERATE
    body: bytes = b""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": JSON_TYPE})
    raw: bytes | None = None
    fair: bool = False


# --- a wrong value in each field -------------------------------------------------------------------------------------

NUMBERS = ("n", "partial_images", "labels", "steps", "guidance", "strength", "seed", "eta", "churn")
TEXTS = ("model", "prompt", "size", "response_format", "output_format", "quality", "sampler", "grid", "image")
WRONG_FOR_ALL = {  # JSON text
    "object": '{"a": {"b": 1}}',
    "list of lists": "[[1]]",
    "NaN": "NaN",
    "minus infinity": "-Infinity",
    "1e999": "1e999",
    "minus seven": "-7",
}
WRONG_NUMBERS = {
    "2**80": str(2**80),
    "huge digits": "9" * 4000,
    "more digits than Python reads": "9" * 6000,
    "true": "true",
    "text": '"12"',
    "list of text": '["1", "2"]',
    "1e300": "1e300",
    "minus 1e-300": "-1e-300",
}
WRONG_TEXTS = {
    "true": "true",
    "five thousand letters": json.dumps("x" * 5000),
    "NUL": '"\\u0000"',
    "lone surrogate": '"\\ud800"',
    "path": '"../../../../etc/passwd"',
    "URL": '"http://169.254.169.254/latest/meta-data"',
    "right to left": '"\\u202e\\u2066abc"',
    "combining": json.dumps("e" + "\u0301" * 100),
    "format string": '"{0.__class__} %s %n ${jndi:ldap://x}"',
    "quote": '"\'; DROP TABLE models; --"',
    "full-width digits": '"\uff11\uff12"',
}


def fields() -> Iterator[Hostile]:
    """Each field of the generation request with each value that it cannot have."""
    for name in (*NUMBERS, *TEXTS, "stream", "user", "options"):
        wrong = dict(WRONG_FOR_ALL)
        wrong |= WRONG_NUMBERS if name in NUMBERS else WRONG_TEXTS if name in TEXTS else {}
        if name in ("stream", "options"):
            wrong |= {"text": '"yes"', "number": "1"}
        for what, text in wrong.items():
            if name == "churn" and what in ("2**80", "1e300"):
                continue  # a fair question: churn is clamped to what the model's levels allow
            yield Hostile(f"{name}: {what}", body=b'{"steps": 2, "%s": %s}' % (name.encode(), text.encode()))


def other_endpoints() -> Iterator[Hostile]:
    """The same for the fields of likelihood and encodings."""
    image = json.dumps(base64.b64encode(png(8, 8)).decode())
    for path, names in (
        (SCORE, ("labels", "estimator", "seed", "resize", "options", "images", "model")),
        (ENCODE, ("labels", "sampler", "steps", "grid", "images", "latents", "model")),
    ):
        for name in names:
            for what, text in WRONG_FOR_ALL.items():
                images = "" if name in ("images", "latents") else f', "images": [{image}]'
                yield Hostile(f"{path} {name}: {what}", path, f'{{"{name}": {text}{images}}}'.encode())


def limits() -> Iterator[Hostile]:
    """Asked for more than anyone may have, or for what is not there."""
    asks: dict[str, dict[str, Any]] = {
        "n of 1e9": {"n": 10**9},
        "n a little too large": {"n": MOST_IMAGES + 1},
        "steps of 1e9": {"steps": 10**9},
        "both": {"n": 10**9, "steps": 10**9},
        "a million labels": {"n": 1, "labels": [0] * 60_000},
        "a label that is not there": {"labels": 10},
        "labels of another count": {"n": 2, "labels": [1, 2, 3]},
        "seed too large": {"seed": 2**53},
        "prompt and labels": {"prompt": "1", "labels": 2},
        "guidance without labels": {"guidance": 3.0},
        "unknown field": {"steps": 2, "temperature": 1},
        "field with other case": {"steps": 2, "N": 1},
        "prototype": {"steps": 2, "__proto__": {"n": 1}},
        "class": {"steps": 2, "__class__": "x"},
        "two hundred unknown fields": {f"f{i}": i for i in range(200)},
        "a field with a long name": {"x" * 50_000: 1},
        "a surrogate as a field": {"\ud800": 1},
        "options unknown": {"options": {"pixels": 1}},
        "options too many": {"options": {f"o{i}": 1 for i in range(33)}},
        "options nested": {"options": {"eta": [[1]]}},
        "option of the wrong type": {"sampler": "ddim", "options": {"eta": "all"}},
        "option process": {"sampler": "ancestral", "options": {"process": "x"}},
        "tolerance of zero": {"sampler": "adaptive", "options": {"tolerance": 0.0}},
        "tolerance of 1e-300": {"sampler": "adaptive", "options": {"tolerance": 1e-300}},
        "langevin without end": {"sampler": "langevin", "steps": 60, "options": {"steps_per_level": 10**9}},
        "another size": {"size": "512x512"},
        "a URL as the answer": {"response_format": "url"},
        "half an image": {"image": base64.b64encode(png(8, 8)[:40]).decode()},
        "a bomb as an image": {"image": base64.b64encode(png_header(60_000, 60_000)).decode()},
        "strength of zero": {"image": base64.b64encode(png(8, 8)).decode(), "strength": 0},
    }
    for name, body in asks.items():
        yield Hostile(name, body=json.dumps(body).encode())


# --- bodies that are no body -----------------------------------------------------------------------------------------


def bodies() -> Iterator[Hostile]:
    """Not JSON, not an object, not text, not whole."""
    whole = b'{"n": 1, "steps": 2, "sampler": "ddim", "labels": [3], "seed": 5}'
    for cut in range(len(whole)):
        yield Hostile(f"cut after {cut} bytes", body=whole[:cut])
    shapes = {
        "null": b"null", "number": b"5", "text": b'"n"', "list": b"[]", "list of objects": b'[{"n": 1}]',
        "true": b"true", "NaN": b"NaN", "single quotes": b"{'n': 1}", "trailing comma": b'{"n": 1,}',
        "comment": b'{"n": 1} // one', "two objects": b'{"n": 1}{"n": 2}', "bare word": b"{n: 1}",
        "leading zeros": b'{"n": 01}', "hex": b'{"n": 0x1}', "plus": b'{"n": +1}', "control": b'{"n": 1\x00}',
        "nested lists": b"[" * 90_000, "nested lists, closed": b"[" * 50_000 + b"]" * 50_000,
        "nested objects": b'{"a":' * 30_000, "nested in a field": b'{"options":' * 10_000 + b"1" + b"}" * 10_000,
        "key twice": b'{"steps": 2, "n": 1, "n": 1000000000}',
        "bytes": bytes(range(256)), "zeros": bytes(1000), "gzip": b"\x1f\x8b\x08\x00" + bytes(100),
        "XML": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a 'a'>]><x>&a;</x>", "form": b"n=1&steps=2",
        "bad UTF-8": b'{"prompt": "\xff\xfe"}', "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
        "UTF-8 of a surrogate": b'{"prompt": "\xed\xa0\x80"}', "cut UTF-8": b'{"prompt": "\xe2\x82"}',
        "bad escape": b'{"prompt": "\\x41"}', "cut escape": b'{"prompt": "\\u00"}',
        "too large": b'{"prompt": "' + b"x" * MOST_BYTES + b'"}', "spaces": b" " * (MOST_BYTES + 1),
    }  # fmt: skip
    for name, body in shapes.items():
        for path in (GENERATE, SCORE, ENCODE):
            yield Hostile(f"{path} {name}", path, body)


# --- images ----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, color: int = 0) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))


def png(width: int, height: int, rows: int | None = None) -> bytes:
    data = zlib.compress(bytes((width + 1) * (height if rows is None else rows)))
    return png_header(width, height) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def images() -> Iterator[Hostile]:
    """What is no image, or more than one may be asked to decode."""
    bad = {
        "nothing": b"", "one byte": b"x", "text": b"hello", "html": b"<html><script>", "svg": b"<svg xmlns='x'/>",
        "gif": b"GIF89a" + bytes(50), "bmp": b"BM" + bytes(60), "tiff": b"II*\x00" + bytes(60), "zip": b"PK\x03\x04",
        "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.", "pdf": b"%PDF-1.7", "png mark alone": b"\x89PNG\r\n\x1a\n",
        "header alone": png_header(8, 8), "no size": png_header(0, 0), "a side of 2**31": png_header(2**31 - 1, 1),
        "bomb of 60,000": png_header(60_000, 60_000) + chunk(b"IDAT", zlib.compress(bytes(100_000))),
        "bomb of data": png_header(8, 8) + chunk(b"IDAT", zlib.compress(bytes(30_000_000))),
        "wrong size": png(9, 8), "too few rows": png(8, 8, 3)[:-20], "16 bit": png_header(8, 8, 16),
        "depth 3": png_header(8, 8, 3), "grey palette": png_header(8, 8, 8, 3) + chunk(b"IDAT", zlib.compress(b"0")),
        "broken CRC": png(8, 8)[:29] + b"xxxx" + png(8, 8)[33:40], "jpeg mark": b"\xff\xd8\xff\xe0" + bytes(20),
        "jpeg of 65,500": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc\x03" + bytes(30),
        "webp": b"RIFF\x00\x00\x00\x00WEBP",
        "webp animated": b"RIFF\x40\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x02\x00\x00\x00\x07\x00\x00\x07\x00\x00ANIM",
    }  # fmt: skip
    for name, data in bad.items():
        encoded = base64.b64encode(data).decode()
        yield Hostile(f"image {name}", SCORE, json.dumps({"images": [encoded]}).encode())
        yield Hostile(f"encoded image {name}", ENCODE, json.dumps({"images": [encoded]}).encode())
        yield form(f"file {name}", [part("images", data, "a.png")])
    good = base64.b64encode(png(8, 8)).decode()
    lists: dict[str, list[Any]] = {
        "none": [], "too many": [good] * (MOST_IMAGES + 1), "ten thousand": [""] * 10_000, "not base64": ["***"],
        "half base64": [good[:-3]], "data URL without data": ["data:image/png;base64"], "URL": ["http://127.0.0.1/x.png"],
        "file URL": ["file:///etc/passwd"], "surrogate": ["\ud800"], "numbers": [1, 2], "nulls": [None],
        "nested": [[good]], "a good and a bad one": [good, "AAAA"],
    }  # fmt: skip
    for name, images in lists.items():
        for path in (SCORE, ENCODE):
            yield Hostile(f"{path} images: {name}", path, json.dumps({"images": images}).encode())
    for name, options in {
        "levels of 1e9": {"levels": 10**9}, "unknown": {"x": 1}, "levels of text": {"levels": "8"},
        "levels of zero": {"levels": 0}, "levels below zero": {"levels": -5},
    }.items():  # fmt: skip
        yield Hostile(f"likelihood options: {name}", SCORE, json.dumps({"images": [good], "options": options}).encode())


# --- forms -----------------------------------------------------------------------------------------------------------

BOUNDARY = "----0123456789"


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    told = f'; filename="{filename}"' if filename else ""
    return f'Content-Disposition: form-data; name="{name}"{told}\r\n\r\n'.encode() + data


def form(name: str, parts: list[bytes], boundary: str = BOUNDARY, end: bytes | None = None) -> Hostile:
    mark = b"--" + BOUNDARY.encode()
    body = b"".join(mark + b"\r\n" + each + b"\r\n" for each in parts) + (mark + b"--\r\n" if end is None else end)
    kind = f"multipart/form-data; boundary={boundary}" if boundary else "multipart/form-data"
    return Hostile(name, SCORE, body, headers={"content-type": kind})


def forms() -> Iterator[Hostile]:
    """Multipart bodies that break the rules."""
    good = part("images", png(8, 8), "a.png")
    yield form("form without a boundary", [good], boundary="")
    yield form("form with another boundary", [good], boundary="other")
    yield form("form without an end", [good], end=b"")
    yield form("form without parts", [])
    yield form("form without files", [part("seed", b"1")])
    yield form("field twice", [good, part("seed", b"1"), part("seed", b"2")])
    yield form("form with an unknown field", [good, part("colour", b"red")])
    yield form("file under another name", [part("file", png(8, 8), "a.png")])
    yield form("part without a name", [b"Content-Disposition: form-data\r\n\r\nx"])
    yield form("part without headers", [b"\r\n\r\nx"])
    yield form("part of another kind", [b'Content-Disposition: attachment; name="images"\r\n\r\nx'])
    yield form("part with 5,000 headers", [b"X: y\r\n" * 5000 + part("seed", b"1")])
    yield form("ten thousand parts", [part(f"f{i}", b"") for i in range(2000)])
    yield form("options not JSON", [good, part("options", b"{levels: 8}")])
    yield form("options nested deep", [good, part("options", b"[" * 50_000)])
    yield form("options of NaN", [good, part("options", b'{"levels": NaN}')])
    yield form("seed not UTF-8", [good, part("seed", b"\xff\xfe")])
    yield form("estimator not UTF-8", [good, part("estimator", b"\xff")])
    yield form("name of NUL", [part("\x00", b"x")])
    yield form("name of a path", [part("../../x", b"x", "../../etc/passwd")])
    yield form("too many files", [good] * (MOST_IMAGES + 1))
    yield form("an endless boundary", [good], boundary="x" * 5000)


# --- routes and headers ----------------------------------------------------------------------------------------------


def routes() -> Iterator[Hostile]:
    """Other methods, other paths, other content types."""
    for path in (GENERATE, SCORE, ENCODE):
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
            yield Hostile(f"{method} {path}", path, b"", method)
    for path in ("/v1/models", "/readyz", "/healthz", "/openapi.json", "/"):
        yield Hostile(f"POST {path}", path, b"{}")
    for path in (
        "/v1", "/v2/models", "/v1/images", "/v1/images/generations/x", "/v1/chat/completions", "/admin", "/.env",
        "/.git/config", "/metrics.php",
        "/v1/models/../../../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/" + "x" * 5000, "/v1/models/%F0%9F%92%A9",
        "/v1/models/tiny%0d%0aX-A:%20b", "/v1/models/{{7*7}}", "/v1/models/models:/other@champion",
        "/app.js/../../requests.py", "/static/../service.py",
    ):  # fmt: skip
        yield Hostile(f"GET {path[:60]}", path, method="GET")
    for kind in (
        "", "text/plain", "application/x-www-form-urlencoded", "application/xml", "application/octet-stream",
        "image/png", "application/json5", "json", "multipart/mixed; boundary=x",
        "application/x-python-pickle", "*/*", "a" * 3000,
    ):  # fmt: skip
        yield Hostile(
            f"content type {kind[:40]!r}", body=b'{"steps": 2}', headers={"content-type": kind} if kind else {}
        )
    base = {"content-type": JSON_TYPE}
    for name, headers in {
        "another host": {"host": "evil.example"}, "host with a port": {"host": "evil.example:8000"},
        "no such origin": {"origin": "https://evil.example"}, "origin null": {"origin": "null"},
        "last event not a number": {"last-event-id": "x"}, "last event below zero": {"last-event-id": "-1"},
        "last event without a stream": {"last-event-id": "3"}, "last event huge": {"last-event-id": "9" * 40},
    }.items():  # fmt: skip
        yield Hostile(f"header: {name}", body=b'{"steps": 2}', headers=base | headers)


# --- the wire --------------------------------------------------------------------------------------------------------


def wire() -> Iterator[Hostile]:
    """Bytes that are no HTTP, or half of it: the server closes, answers 4xx, or waits until its client leaves."""
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    for name, raw in {
        "half a body": head + b'content-length: 1000\r\n\r\n{"n": 1',
        "no body": head + b"content-length: 50\r\n\r\n",
        "half a header": head[:70],
        "half a request line": b"POST /v1/ima",
        "length too large": head + b"content-length: 99999999999\r\n\r\n{}",
        "length below zero": head + b"content-length: -5\r\n\r\n{}",
        "length not a number": head + b"content-length: ten\r\n\r\n{}",
        "two lengths": head + b"content-length: 2\r\ncontent-length: 5\r\n\r\n{}",
        "length and chunks": head + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "half a chunk": head + b"transfer-encoding: chunked\r\n\r\n100\r\nabc",
        "chunk size not hex": head + b"transfer-encoding: chunked\r\n\r\nzz\r\nabc\r\n",
        "chunks without end": head + b"transfer-encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n",
        "chunks beyond the limit": head
        + b"transfer-encoding: chunked\r\n\r\n"
        + (b"4000\r\n" + b" " * 16384 + b"\r\n") * 14,
        "unknown encoding": head + b"transfer-encoding: gzip\r\n\r\n{}",
        "header of 200,000": head + b"x-a: " + b"a" * 200_000 + b"\r\n\r\n",
        "ten thousand headers": head + b"".join(b"x-%d: y\r\n" % i for i in range(10_000)) + b"\r\n",
        "header without a colon": head + b"nonsense\r\n\r\n",
        "header with NUL": head + b"x-a: \x00\r\n\r\n",
        "no host": b"POST /v1/images/generations HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        "HTTP/9.9": b"GET / HTTP/9.9\r\nhost: 127.0.0.1\r\n\r\n",
        "unknown method": b"FOO /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
        "no HTTP": b"hello\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
        "zeros": bytes(2000),
        "a long path": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
        "obsolete folding": head + b"x-a: b\r\n c\r\n\r\n",
        "expect": head + b"expect: 100-continue\r\ncontent-length: 99999999\r\n\r\n",
        "upgrade": b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    }.items():  # fmt: skip
        yield Hostile(f"wire: {name}", raw=raw)


def all_requests() -> list[Hostile]:
    """Every one, each family in turn."""
    families = (fields, other_endpoints, limits, bodies, images, forms, routes, wire)
    return [each for family in families for each in family()]
