"""multipart/form-data (RFC 7578): fields and image files."""

import json
from email.message import Message
from email.parser import BytesParser
from typing import Any

from pipeline.serving.refusals import RequestError


def parse_form(content_type: str, body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The fields of a multipart/form-data body (RFC 7578), and the files in its `images` parts, in order.

    `labels`, `tags`, `seed` and `options` are read as JSON. The body is in memory already, its size limited by the
    caller.

    Raises:
        RequestError: no boundary, a malformed part, a field given twice, or a file under another name.
    """
    outer = _headers(b"Content-Type: " + content_type.encode("latin-1", "replace"))
    boundary = outer.get_param("boundary")
    if outer.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise RequestError("multipart/form-data without a boundary", code="malformed_body")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise RequestError("the multipart body is cut off: its last boundary is missing", code="malformed_body")
    fields: dict[str, Any] = {}
    files: list[bytes] = []
    for piece in pieces[1:-1]:
        head, found, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = _headers(head)
        name = headers.get_param("name", header="content-disposition")
        if not found or headers.get_content_disposition() != "form-data" or not isinstance(name, str):
            raise RequestError("a part of the multipart body has no name", code="malformed_body")
        if headers.get_filename() is not None or name == "images":
            if name != "images":
                raise RequestError(f"files go into 'images', got '{name[:64]}'", name[:64], code="unknown_parameter")
            files.append(content)
        elif name in fields:
            raise RequestError(f"'{name[:64]}' is given twice", name[:64])
        else:
            fields[name] = _form_value(name, content)
    return fields, files


def _headers(data: bytes) -> Message:
    return BytesParser().parsebytes(data + b"\r\n\r\n", headersonly=True)


def _form_value(name: str, content: bytes) -> Any:
    try:
        text = content.decode("utf-8")
        return loads(text) if name in ("labels", "tags", "seed", "options") else text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"'{name[:64]}' cannot be read: {str(error)[:200]}", name[:64]) from None


def loads(text: str | bytes) -> Any:
    """JSON, each name of an object given once: of two values a reader before us may have checked the other.

    Raises:
        ValueError, RecursionError: it is not.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice[:64]}' is given twice")
    return found
