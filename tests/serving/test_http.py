"""The HTTP application over a service in this process: answers, refusals, keys, streams."""

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from pipeline.data.formats.codecs import decode, encode_png
from pipeline.model import Model, Sampling, Scoring
from pipeline.serving.config import ServingConfig
from pipeline.serving.logs import JsonLines
from pipeline.serving.rate_limits import RateLimits
from pipeline.serving.refusals import Refused, RequestError
from pipeline.serving.requests import GenerationRequest, parse_body
from pipeline.serving.service import Identity, Service
from pipeline.web.app import make_app

GENERATE, SCORE = "/v1/images/generations", "/v1/likelihood"


@pytest.fixture
def ask(service: Service) -> Callable[..., httpx.Response]:
    def request(method: str, path: str, **options: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(make_app(service, service.config), raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return await client.request(method, path, **options)

        return asyncio.run(run())

    return request


def pixels_of(answer: Mapping[str, Any]) -> np.ndarray:
    return np.stack([decode(base64.b64decode(item["b64_json"]), 1) for item in answer["data"]])


def test_images_are_those_of_the_model_in_a_notebook(ask: Callable[..., httpx.Response], tiny: Model) -> None:
    fields = {"n": 3, "labels": [1, 2, -1], "sampler": "ddim", "steps": 5, "seed": 11, "eta": 0.5}
    answer = ask("POST", GENERATE, json=fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    expected = tiny.sample(3, Sampling("ddim", 5, options={"eta": 0.5}), labels=[1, 2, -1], seed=11)
    assert (
        np.abs(pixels_of(body).astype(int) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    )  # chunks of another size
    facts = {"model": "tiny", "model_version": "7", "model_digest": tiny.digest, "seed": 11, "evaluations": 5}
    assert body.items() >= {**facts, "row_evaluations": 15, "size": "8x8"}.items()
    assert body["trace_id"] == answer.headers["x-request-id"]
    assert ask("POST", GENERATE, json=fields).json()["data"] == body["data"]


def test_a_seed_is_drawn_and_told(ask: Callable[..., httpx.Response]) -> None:
    first, second = (ask("POST", GENERATE, json={"steps": 2}).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert ask("POST", GENERATE, json={"steps": 2, "seed": first["seed"]}).json()["data"] == first["data"]


def test_a_stream_shows_previews_and_ends_with_the_same_images(ask: Callable[..., httpx.Response]) -> None:
    fields = {"n": 2, "labels": 3, "guidance": 1.5, "sampler": "ddim", "steps": 6, "seed": 4}
    whole = ask("POST", GENERATE, json=fields).json()
    answer = ask("POST", GENERATE, json={**fields, "stream": True, "partial_images": 3})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event["evaluations"] for event in events] == [2, 4, 6, 6]
    assert [event["partial_image_index"] for event in events[:-1]] == [0, 1, 2]
    assert events[-1]["data"] == whole["data"]
    assert np.array_equal(pixels_of(events[2]), pixels_of(whole))  # DDIM ends on the guided x_hat


def test_what_the_deadline_leaves_no_time_for_is_refused_before_a_step(tiny: Model) -> None:
    service = Service(tiny, ServingConfig(model="tiny", deadline_s=0.1), Identity("tiny", "1", tiny.digest))
    calls = service.engine.load().calls
    with pytest.raises(RequestError, match=r"done here in 0\.1 s\); .* jobs\.sample RUN_FILE --images 64"):
        asyncio.run(service.answer(parse_body(GenerationRequest, {"n": 64, "steps": 1000})))
    assert service.engine.load().calls == calls
    service.close()


@pytest.mark.parametrize("sent", [0, 2])
def test_a_client_that_leaves_while_an_event_is_being_sent_ends_its_work(service: Service, sent: int) -> None:
    fields = {"n": 16, "sampler": "heun", "steps": 64, "stream": True, "partial_images": 64}
    before = service.engine.load()
    assert before.live == 0

    async def run() -> None:
        stuck = asyncio.Event()
        body = [{"type": "http.request", "body": json.dumps(fields).encode()}]
        bodies = 0

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop()
            await stuck.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal bodies
            bodies += message["type"] == "http.response.body"
            if bodies > sent:
                stuck.set()
                await asyncio.Event().wait()  # the network takes no more

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": GENERATE,
            "headers": headers,
            "query_string": b"",
        }
        scope["client"] = ("127.0.0.1", 50_000)
        await make_app(service, service.config)(scope, receive, send)  # pyright: ignore[reportArgumentType]

    asyncio.run(asyncio.wait_for(run(), 30))
    end = time.monotonic() + 10
    while service.engine.load().live:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert service.engine.load().cancelled == before.cancelled + 1


def test_likelihood_is_that_of_the_model_in_a_notebook(
    ask: Callable[..., httpx.Response], tiny: Model, service: Service, digits: np.ndarray
) -> None:
    encoded = [encode_png(image) for image in digits]
    options = {"levels": 16}
    fields = {"labels": [0, 1, 2], "seed": 3, "options": options, "estimator": "vlb"}
    as_json = ask("POST", SCORE, json={**fields, "images": [base64.b64encode(data).decode() for data in encoded]})
    assert as_json.status_code == 200, as_json.text
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    files = [("images", ("a.png", data, "image/png")) for data in encoded]
    as_form = ask("POST", SCORE, data=form, files=files)
    assert as_form.json()["data"] == as_json.json()["data"]
    pixels = torch.from_numpy(digits).permute(0, 3, 1, 2)
    expected = tiny.bits_per_dim(pixels, Scoring("vlb", options), labels=[0, 1, 2], seed=3)
    body = as_json.json()
    for index, item in enumerate(body["data"]):
        assert item["bits_per_dim"] == pytest.approx(float(expected.bits_per_dim[index]), rel=1e-5)
        assert sum(item["parts_nats"].values()) == pytest.approx(item["nats"])
        scores = service.held_out["vlb"]
        below = sum(score < item["bits_per_dim"] for score in scores)
        assert item["percentile"] == pytest.approx(100 * below / len(scores))
        assert item["standard_error"] > 0
    assert body["model_digest"] == tiny.digest
    assert body["estimator"] == "vlb"


def test_a_card_without_scores_gives_no_percentile(ask: Callable[..., httpx.Response], digits: np.ndarray) -> None:
    files = [("images", ("a.png", encode_png(digits[0]), "image/png"))]
    body = ask("POST", SCORE, data={"estimator": "ode", "options": '{"tolerance": 0.1}'}, files=files).json()
    assert body["data"][0]["percentile"] is None
    assert body["data"][0]["standard_errors_nats"].keys() == {"dequantisation", "probes"}


def test_an_image_without_its_class_has_no_place_among_those_with_theirs(
    ask: Callable[..., httpx.Response], digits: np.ndarray
) -> None:
    files = [("images", ("a.png", encode_png(image), "image/png")) for image in digits[:2]]
    body = ask("POST", SCORE, data={"labels": "[3, -1]", "options": '{"levels": 4}'}, files=files).json()
    assert [item["percentile"] is None for item in body["data"]] == [False, True]


def test_what_an_openai_client_may_ask_is_answered_usefully(
    ask: Callable[..., httpx.Response], digits: np.ndarray
) -> None:
    told = ask("POST", GENERATE, json={"quality": "hd"})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "quality")
    assert '"steps": 8' in told.json()["error"]["message"]
    assert ask("POST", GENERATE, json={"quality": "auto", "steps": 2}).status_code == 200
    edit = ask("POST", "/v1/images/edits", data={"prompt": "3"}, files={"image": ("a.png", encode_png(digits[0]))})
    assert edit.status_code == 404
    assert "starts from a picture by its 'image' (base64) and 'strength'" in edit.json()["error"]["message"]


def test_an_image_of_another_size_is_offered_a_resize(ask: Callable[..., httpx.Response]) -> None:
    wide = base64.b64encode(encode_png(np.zeros((9, 12, 1), np.uint8))).decode()
    for path, body in ((SCORE, {"images": [wide]}), ("/v1/encodings", {"images": [wide]}), (GENERATE, {"image": wide})):
        refused = ask("POST", path, json={**body, **({"options": {"levels": 4}} if path == SCORE else {"steps": 2})})
        assert refused.status_code == 400
        assert 'got 12 x 9; "resize": "centre-crop" shrinks and crops it' in refused.json()["error"]["message"]
        fitted = {**body, "resize": "centre-crop", **({"options": {"levels": 4}} if path == SCORE else {"steps": 2})}
        assert ask("POST", path, json=fitted).status_code == 200


def test_models_are_listed_and_shown(ask: Callable[..., httpx.Response], tiny: Model) -> None:
    listed = ask("GET", "/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["tiny"]
    for name in ("tiny", "tiny@champion"):
        shown = ask("GET", f"/v1/models/{name}").json()
        assert shown["digest"] == tiny.digest
        assert shown["held_out"]["vlb"]["count"] == 300
        assert "held_out_bits_per_dim" not in shown["card"]
        assert shown["samplers"]["heun"]["options"]["churn"] == 0.0
    assert ask("GET", "/v1/models/other").status_code == 404
    assert ask("GET", "/healthz").json() == {"status": "ok"}
    assert len(ask("GET", "/readyz").json()["self_test"]["digest"]) == 64


def refusal(answer: httpx.Response) -> tuple[int, str]:
    body = answer.json()
    assert body.keys() == {"error", "trace_id"}, body
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, body["error"]["code"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "options", "expected"),
    [
        ("GET", "/nowhere", {}, (404, "not_found")),
        ("GET", GENERATE, {}, (405, "method_not_allowed")),
        ("POST", GENERATE, {"content": b"{}"}, (415, "unsupported_media_type")),
        ("POST", GENERATE, {"content": b"{", "headers": JSON}, (400, "malformed_body")),
        ("POST", GENERATE, {"content": b"\xff\xfe", "headers": JSON}, (400, "malformed_body")),
        ("POST", GENERATE, {"content": b"[" * 100_000, "headers": JSON}, (400, "malformed_body")),
        ("POST", GENERATE, {"content": b'{"n":' + b"9" * 5000 + b"}", "headers": JSON}, (400, "malformed_body")),
        ("POST", GENERATE, {"content": b"[]", "headers": JSON}, (400, "malformed_body")),
        ("POST", GENERATE, {"content": b'{"guidance": NaN}', "headers": JSON}, (400, "invalid_value")),
        ("POST", GENERATE, {"json": {"n": 10**9}}, (400, "invalid_value")),
        ("POST", GENERATE, {"json": {"steps": 10**18}}, (400, "invalid_value")),
        (
            "POST",
            GENERATE,
            {"json": {"sampler": "predictor_corrector", "options": {"predictor": "no"}}},
            (400, "invalid_value"),
        ),
        ("POST", GENERATE, {"json": {"negative_prompt": "x"}}, (400, "unknown_parameter")),
        ("POST", GENERATE, {"json": {"model": "dall-e-3"}}, (404, "model_not_found")),
        ("POST", GENERATE, {"json": {"n": 99, "stream": True}}, (400, "invalid_value")),
        ("POST", SCORE, {"json": {}}, (400, "missing_parameter")),
        ("POST", SCORE, {"json": {"images": []}}, (400, "invalid_value")),
        ("POST", SCORE, {"json": {"images": ["%%%"]}}, (400, "invalid_value")),
        ("POST", SCORE, {"json": {"images": ["AAAA"]}}, (400, "invalid_value")),
        ("POST", SCORE, {"data": {"seed": "1"}, "files": []}, (415, "unsupported_media_type")),
        ("POST", SCORE, {"json": {"images": ["A" * 300_000]}}, (413, "request_too_large")),
        ("POST", GENERATE, {"json": {}, "headers": {"origin": "http://evil.example"}}, (403, "forbidden")),
        ("POST", GENERATE, {"json": {}, "headers": {"host": "evil.example"}}, (403, "forbidden")),
    ],
)
def test_what_is_refused_is_refused_in_one_schema(
    ask: Callable[..., httpx.Response], method: str, path: str, options: dict[str, Any], expected: tuple[int, str]
) -> None:
    assert refusal(ask(method, path, **options)) == expected


@pytest.mark.parametrize("path", ["/", "/app.js", "/healthz", "/readyz"])
def test_what_watches_may_ask_for_the_head_alone(ask: Callable[..., httpx.Response], path: str) -> None:
    assert ask("HEAD", path).status_code == ask("GET", path).status_code == 200


def test_a_body_without_a_length_is_cut_off_at_the_limit(ask: Callable[..., httpx.Response]) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65_536
            yield b" " * 65_536

    assert refusal(ask("POST", GENERATE, content=endless(), headers=JSON)) == (413, "request_too_large")
    assert sent < 600_000


def test_keys_are_asked_before_the_body_is_read(service: Service) -> None:
    config = replace(service.config, key_hashes=(hashlib.sha256(b"open sesame").hexdigest(),))

    async def run() -> list[int]:
        transport = httpx.ASGITransport(make_app(service, config))
        statuses: list[int] = []
        async with httpx.AsyncClient(transport=transport, base_url="http://gpu.example") as client:
            for key in (None, "Bearer wrong", "Basic open sesame", "Bearer open sesame"):
                headers = {} if key is None else {"authorization": key}
                answer = await client.get("/v1/models", headers=headers)
                statuses.append(answer.status_code)
            statuses.append((await client.get("/")).status_code)
        return statuses

    assert asyncio.run(run()) == [401, 401, 401, 200, 200]


def test_the_openapi_document_has_the_bodies(ask: Callable[..., httpx.Response]) -> None:
    document = ask("GET", "/openapi.json").json()
    body = document["paths"][GENERATE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert {"n", "labels", "seed", "stream"} <= body["properties"].keys()
    assert document["paths"][SCORE]["post"]["requestBody"]["content"].keys() == {
        "application/json",
        "multipart/form-data",
    }


# --- encodings, init images, resumed streams, quotas -----------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "steps", "grey_levels"), [("heun", 60, 3), ("dpmpp_2m", 64, 6), ("euler", 64, 40)])
def test_an_image_goes_up_to_its_latent_and_back(
    ask: Callable[..., httpx.Response], tiny: Model, sampler: str, steps: int, grey_levels: int
) -> None:
    pixels = tiny.sample(2, Sampling("heun", 40), labels=[3, 4], seed=8).permute(0, 2, 3, 1).numpy()
    how = {"sampler": sampler, "steps": steps, "labels": [3, 4]}
    up = ask(
        "POST", "/v1/encodings", json={**how, "images": [base64.b64encode(encode_png(x)).decode() for x in pixels]}
    )
    assert up.status_code == 200, up.text
    latents = [item["latent"] for item in up.json()["data"]]
    assert up.json()["data"][0]["shape"] == [1, 8, 8]
    assert np.isfinite(np.frombuffer(base64.b64decode(latents[0]), "<f4")).all()
    down = ask("POST", "/v1/encodings", json={**how, "latents": latents}).json()
    assert np.abs(pixels_of(down).astype(int) - pixels).max() <= grey_levels


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({}, "images", "images or latents"),
        ({"images": ["AAAA"], "latents": ["AAAA"]}, "images", "one of them"),
        ({"latents": ["AAAA"]}, "latents", "3 bytes, a latent of this model has 256"),
        ({"latents": [base64.b64encode(b"\xff" * 256).decode()]}, "latents", "not finite"),
        ({"latents": [base64.b64encode(b"\0" * 256).decode()], "sampler": "ancestral"}, "sampler", "heun"),
        ({"images": ["AAAA"]}, "images", r"images\[0\]"),
    ],
)
def test_an_encoding_that_cannot_be_is_refused_by_field(
    ask: Callable[..., httpx.Response], fields: dict[str, Any], param: str, text: str
) -> None:
    answer = ask("POST", "/v1/encodings", json=fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert re.search(text, answer.json()["error"]["message"])


def test_an_init_image_stays_the_nearer_the_smaller_the_strength(
    ask: Callable[..., httpx.Response], tiny: Model
) -> None:
    start = tiny.sample(1, Sampling("heun", 40), labels=[3], seed=8)[0].permute(1, 2, 0).numpy()
    fields = {"n": 8, "labels": 3, "seed": 1, "steps": 40, "image": base64.b64encode(encode_png(start)).decode()}
    away = []
    for strength in (0.2, 0.5, 1.0):
        answer = ask("POST", GENERATE, json={**fields, "strength": strength}).json()
        assert answer["evaluations"] == 2 * round(40 * strength) - 1  # Heun's last step is Euler's
        away.append(np.abs(pixels_of(answer).astype(int) - start).mean())
    assert away[0] < away[1] < away[2]


def test_a_broken_stream_goes_on_after_the_last_event(ask: Callable[..., httpx.Response]) -> None:
    fields = {"n": 2, "sampler": "ddim", "steps": 8, "seed": 4, "stream": True, "partial_images": 8}
    whole = ask("POST", GENERATE, json=fields).text.split("\n\n")[:-1]
    assert [event.splitlines()[0] for event in whole] == [f"id: {number}" for number in (*range(1, 9), 8)]
    for had in (1, 5, 8):
        rest = ask("POST", GENERATE, json=fields, headers={"last-event-id": str(had)}).text.split("\n\n")[:-1]

        def pictures(events: list[str]) -> list[Any]:
            return [json.loads(event.partition("data: ")[2])["data"] for event in events]

        assert pictures(rest) == pictures(whole[had:])
    for bad in ({"seed": None}, {"stream": False}):
        assert ask("POST", GENERATE, json={**fields, **bad}, headers={"last-event-id": "3"}).status_code == 400
    assert ask("POST", GENERATE, json=fields, headers={"last-event-id": "x"}).status_code == 400


def test_a_name_given_twice_is_refused(ask: Callable[..., httpx.Response]) -> None:
    answer = ask("POST", GENERATE, content=b'{"n": 1000000000, "seed": 2, "n": 1}', headers=JSON)
    assert refusal(answer) == (400, "malformed_body")
    assert "'n' is given twice" in answer.json()["error"]["message"]


def test_a_key_spends_its_quota_and_gets_it_back() -> None:
    now = 0.0
    quotas = RateLimits(600, clock=lambda: now)
    quotas.charge("a", 500)
    quotas.charge("a", 400)  # the last one may pass the limit
    with pytest.raises(Refused, match="600 cost units a minute") as caught:
        quotas.charge("a", 1)
    assert (caught.value.status, caught.value.code) == (429, "quota_exceeded")
    assert caught.value.retry_after_s == pytest.approx(30.1)
    quotas.charge("b", 1)  # another's is its own
    now = 31.0
    quotas.charge("a", 1)
    RateLimits(0).charge("a", 1e30)


def test_no_request_spends_more_than_a_minute_of_its_quota() -> None:
    quotas = RateLimits(600, clock=lambda: 0.0)
    with pytest.raises(
        RequestError, match=r"costs 601 units .* more than the 600 that this key has in a minute"
    ) as caught:
        quotas.charge("a", 601)
    assert (caught.value.status, caught.value.code) == (400, "request_too_large")
    quotas.charge("a", 600)


@pytest.mark.parametrize(("ingresses", "statuses"), [(1, [200, 200, 429]), (2, [200, 429, 429])])
def test_ingresses_share_a_quota(service: Service, ingresses: int, statuses: list[int]) -> None:
    hashes = (hashlib.sha256(b"k").hexdigest(),)
    config = replace(service.config, key_hashes=hashes, key_quota=12 * 64, ingress_replicas=ingresses)

    async def run() -> list[int]:
        transport = httpx.ASGITransport(make_app(service, config))
        key = {"authorization": "Bearer k"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=key) as client:
            fields = {"n": 2, "sampler": "ddim", "steps": 4}  # 8 x 64 units
            return [(await client.post(GENERATE, json=fields)).status_code for _ in range(3)]

    assert asyncio.run(run()) == statuses


def test_a_quota_is_charged_by_cost_before_the_work(service: Service) -> None:
    key = {"authorization": "Bearer k", "host": "127.0.0.1"}
    config = replace(service.config, key_hashes=(hashlib.sha256(b"k").hexdigest(),), key_quota=12 * 64)
    before = service.engine.load().rows

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(service, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=key) as client:
            fields = {"n": 2, "sampler": "ddim", "steps": 4}
            return [await client.post(GENERATE, json=fields) for _ in range(3)]

    first, second, third = asyncio.run(run())
    assert first.status_code == second.status_code == 200
    assert (third.status_code, third.json()["error"]["code"]) == (429, "quota_exceeded")
    assert int(third.headers["retry-after"]) >= 1
    assert service.engine.load().rows == before + 16


def test_a_request_is_a_line_of_json_with_its_trace_and_lineage(
    ask: Callable[..., httpx.Response], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "raydiffusion"):
        answer = ask(
            "POST", GENERATE, json={"steps": 2, "seed": 3, "prompt": "5"}, headers={"authorization": "Bearer s3"}
        )
        ask("GET", "/nowhere/secret-path")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.message == "request"]
    assert (
        lines[0].items() >= {"trace_id": answer.json()["trace_id"], "status": 200, "seed": 3, "model": "tiny"}.items()
    )
    assert lines[0]["route"] == GENERATE
    assert lines[1].items() >= {"status": 404, "route": "unmatched"}.items()
    assert "secret" not in caplog.text
    assert "s3" not in str(lines)
