"""Every numeric field and option at its extremes, encodings that JSON allows, and headers no client sends. Each must
come to an answer or to a 4xx, within the deadline: never to a 5xx."""

import base64
import json
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.diffusion.likelihood.estimators import ESTIMATORS
from pipeline.diffusion.sampling.encode import ENCODERS
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.serving.plans import askable
from tests.faults.hostile_requests import ENCODE, GENERATE, SCORE, Hostile, form, part, png

FLOATS = (
    "0", "-0.0", "-1", "1", "0.5", "5e-324", "1e-300", "-1e-300", "1e-30", "1e-12", "1e-7", "1e-5", "1e-3", "10", "1e3",
    "1e6", "1e30", "1e38", "3.5e38", "1e154", "1e200", "1e307", "1e308", "1.7976931348623157e308", "-1e308",
    "9007199254740993", "1" + "0" * 308, "1" + "0" * 400, "true", "null", '"1"', "[1]", "[]", "{}",
    "[1e308, -1]", "[1, 1, 1e-300]",
)  # fmt: skip
WHOLES = (
    "0", "-1", "1", "2", "1000", "100000", "2147483648", "9223372036854775808", "-9223372036854775809",
    "1" + "0" * 400, "1.0", "1.5", "1e2", "true", "null", '"1"', "[1]",
)  # fmt: skip
IMAGE = base64.b64encode(png(8, 8)).decode()
FIELDS: dict[str, Sequence[str]] = {
    "n": WHOLES, "steps": WHOLES, "partial_images": WHOLES, "labels": WHOLES, "seed": WHOLES, "guidance": FLOATS,
    "strength": FLOATS, "eta": FLOATS, "churn": FLOATS,
}  # fmt: skip


def _asked(path: str, name: str, fields: dict[str, str]) -> Hostile:
    """`fields`: JSON text by name."""
    body = "{" + ", ".join(f'"{key}": {text}' for key, text in fields.items()) + "}"
    return Hostile(name, path, body.encode(), fair=True)


def _short(text: str) -> str:
    return text if len(text) < 24 else f"{text[:8]}...({len(text)})"


def fields() -> Iterator[Hostile]:
    """Numbers of the generation request, with and without a stream and an image."""
    for name, values in FIELDS.items():
        for text in values:
            for more in ({}, {"stream": "true"}) if name in ("guidance", "partial_images") else ({},):
                sampler = {"eta": '"ddim"', "churn": '"heun"'}.get(name, '"ddim"')
                told = {"labels": "3", "steps": "3", "sampler": sampler, "image": json.dumps(IMAGE)} | more
                if name != "strength":
                    del told["image"]
                stream = " in a stream" if more else ""
                yield _asked(GENERATE, f"{name} of {_short(text)}{stream}", told | {name: text})


def options() -> Iterator[Hostile]:
    """Options of every sampler and estimator, the ones that a later version adds as well."""
    for path, table in ((GENERATE, SAMPLERS), (SCORE, ESTIMATORS)):
        for name, entry in table.items():
            for option, (kinds, _) in askable(entry.options).items():
                if not {int, float} & set(kinds):
                    continue
                for text in FLOATS if float in kinds else WHOLES:
                    told = {"options": f'{{"{option}": {text}}}'}
                    if path == GENERATE:
                        told |= {"sampler": f'"{name}"', "steps": "3", "labels": "3"}
                    else:
                        told |= {"estimator": f'"{name}"', "images": f'["{IMAGE}"]'}
                    yield _asked(path, f"{name} {option} of {_short(text)}", told)


def latents() -> Iterator[Hostile]:
    """Latents of float32's extremes, all values or one."""
    values = (0.0, -0.0, 1e-45, 1e-38, 1.0, 30.0, 999.0, 1001.0, 1e6, 1e19, 3e38, -3e38, np.inf, -np.inf, np.nan)
    for value in values:
        for count in (1, 64):
            latent = np.zeros(64, "<f4")
            latent[:count] = value
            encoded = base64.b64encode(latent.tobytes()).decode()
            for sampler in ENCODERS:
                told = {"latents": f'["{encoded}"]', "sampler": f'"{sampler}"', "steps": "3"}
                yield _asked(ENCODE, f"{count} latents of {value} by {sampler}", told)


def encodings() -> Iterator[Hostile]:
    """Bodies in the encodings that JSON readers take, with surrogates where they can stand."""
    fair = '{"steps": 2, "seed": 1}'
    for encoding in (
        "utf-8-sig",
        "utf-16",
        "utf-16-le",
        "utf-16-be",
        "utf-32",
        "utf-32-le",
        "utf-32-be",
        "utf-7",
        "cp037",
    ):
        yield Hostile(f"body in {encoding}", body=fair.encode(encoding), fair=True)
    lone = "\ud800"
    texts = {
        "option": {"options": {lone: 1}}, "option's value": {"options": {"variance": lone}},
        "option beside a good one": {"options": {"eta": 0.5, f"eta{lone}": 1}, "sampler": "ddim"},
        "sampler": {"sampler": lone}, "grid": {"grid": lone}, "prompt": {"prompt": lone}, "model": {"model": lone},
        "size": {"size": lone}, "user": {"user": lone}, "image": {"image": lone}, "field": {f"steps{lone}": 2},
        "low one": {"options": {"\udfff": 1}}, "pair": {"prompt": "\ud83d\ude00"}, "quality": {"quality": lone},
    }  # fmt: skip
    for name, body in texts.items():
        yield Hostile(f"lone surrogate: {name}", body=json.dumps(body).encode())
        yield Hostile(
            f"lone surrogate in UTF-16: {name}",
            body=json.dumps(body, ensure_ascii=False).encode("utf-16", "surrogatepass"),
        )
    for name in ("estimator", "resize", "model"):
        yield Hostile(f"lone surrogate: likelihood {name}", SCORE, json.dumps({name: lone, "images": [IMAGE]}).encode())
    yield Hostile(
        "lone surrogate: likelihood option", SCORE, json.dumps({"options": {lone: 1}, "images": [IMAGE]}).encode()
    )
    good = part("images", png(8, 8), "a.png")
    for name, text in {
        "given twice": b'{"levels": 2, "levels": 3}', "surrogate": b'{"\\ud800": 1}',
        "huge": b'{"levels": ' + b"9" * 6000 + b"}",
        "infinite": b'{"tolerance": Infinity}', "1e999": b'{"tolerance": 1e999}',
    }.items():  # fmt: skip
        yield form(f"form with an option {name}", [good, part("estimator", b"ode"), part("options", text)])


def headers() -> Iterator[Hostile]:
    """Bytes that are no ASCII in every header that something on the way reads."""
    body = b'{"steps": 2, "seed": 1}'
    for name in (
        "x-request-id", "x-session-id", "serve_multiplexed_model_id", "serve-multiplexed-model-id",
        "x-request-timeout-seconds", "authorization", "origin", "host", "content-type", "content-encoding", "accept",
        "accept-encoding", "user-agent", "cookie", "traceparent", "tracestate", "baggage", "last-event-id", "range",
        "if-none-match", "x-forwarded-for", "forwarded", "connection", "te", "trailer", "x-any",
    ):  # fmt: skip
        for value in (b"\xff", b"\xc3\x28", b"\x80abc", "\u00e9".encode(), b"a" * 7000, b"", b"nan", b"-1", b"1e-300"):
            lines = {"host": b"127.0.0.1", "content-type": b"application/json", "connection": b"close", name: value}
            head = b"".join(key.encode() + b": " + told + b"\r\n" for key, told in lines.items())
            raw = (
                b"POST "
                + GENERATE.encode()
                + b" HTTP/1.1\r\n"
                + head
                + b"content-length: %d\r\n\r\n" % len(body)
                + body
            )
            yield Hostile(f"header {name}: {value[:8]!r} of {len(value)}", raw=raw, fair=True)
    for name in ("host", "content-type", "authorization", "origin", "content-length", "x-request-id"):
        told = b"127.0.0.1" if name == "host" else b"%d" % len(body) if name == "content-length" else b"x"
        raw = b"POST " + GENERATE.encode() + b" HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        raw += (
            b"connection: close\r\n"
            + name.encode()
            + b": "
            + told
            + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
            + body
        )
        yield Hostile(f"header {name} twice", raw=raw, fair=True)


def all_numbers() -> list[Hostile]:
    """Every one, each family in turn."""
    families = (fields, options, latents, encodings, headers)
    return [each for family in families for each in family()]
