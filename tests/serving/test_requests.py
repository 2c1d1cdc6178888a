"""Bodies, forms and plans: what is refused is refused by name, before anything is allocated."""

import base64
import copy
import json
import resource
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import load_config
from pipeline.data.formats.codecs import encode_png
from pipeline.diffusion.pixels import to_pixels
from pipeline.diffusion.procedure import drive
from pipeline.model import Model
from pipeline.serving.config import ServingConfig
from pipeline.serving.forms import parse_form
from pipeline.serving.plans import GenerationPlan, plan_generation, plan_likelihood
from pipeline.serving.refusals import Refused, RequestError
from pipeline.serving.requests import GenerationRequest, LikelihoodOptions, decode_base64, parse_body

RUN_FILE = "jobs/configs/digits.yaml"
PART = b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n'
CONFIG = ServingConfig(max_images=16, max_steps=64)


def plan(model: Model, config: ServingConfig = CONFIG, **fields: Any) -> Any:
    return plan_generation(parse_body(GenerationRequest, fields), model, config, 1)


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"label": 3}, "label", "did you mean 'labels'"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": "4"}, "n", "valid integer"),
        ({"n": float("nan")}, "n", "integer"),
        ({"guidance": float("inf")}, "guidance", "finite"),
        ({"seed": 2**53}, "seed", "less than or equal to"),
        ({"seed": -1}, "seed", "greater than or equal to"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"options": {"eta": [1, "x"]}}, "options", "options"),
        ({"prompt": "x" * 300}, "prompt", "at most 256"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        parse_body(GenerationRequest, fields)
    assert caught.value.param == param
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"n": 17}, "n", "at most 16 images"),
        ({"steps": 65}, "steps", "at most 64 steps"),
        ({"size": "1024x1024"}, "size", "8x8 pixels, got '1024x1024'"),
        ({"sampler": "huen"}, "sampler", "did you mean 'heun'"),
        ({"grid": "rhoo"}, "grid", "did you mean 'rho'"),
        ({"labels": 10}, "labels", "0..9"),
        ({"labels": [1, 2]}, "labels", "one for each of the 1 images"),
        ({"prompt": "cat"}, "prompt", "name or number of a class"),
        ({"prompt": "3", "labels": 4}, "labels", "give one of them"),
        ({"guidance": 2.0}, "guidance", "needs labels"),
        ({"options": {"clipp": 1.0}}, "clipp", "did you mean 'clip'"),
        ({"sampler": "heun", "eta": 0.5}, "eta", "has no option 'eta'"),
        ({"options": {"clip": "yes"}}, "clip", "must be float or null"),
        (
            {"sampler": "sde", "options": {"lam": None}},
            "lam",
            "must be float or a string of at most 64",
        ),
        ({"options": {"churn": [1.0]}}, "churn", "must be float"),
        (
            {"sampler": "ddim", "options": {"eta": [0.5, 1e308]}},
            "eta",
            r"must be between 0 and 10, got \[0\.5, 1e\+308",
        ),
        ({"sampler": "ddim", "options": {"eta": [0.5] * 5000}}, "eta", "must be float or a list of numbers"),
        ({"sampler": "langevin", "options": {"steps_per_level": 10**9}}, None, "more than the limit"),
    ],
)
def test_what_the_model_cannot_do_is_named(tiny: Model, fields: dict[str, Any], param: str | None, text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        plan(tiny, **fields)
    assert caught.value.param == param


def test_cost_counts_images_evaluations_and_both_rows_of_guidance(tiny: Model) -> None:
    assert plan(tiny, n=3, sampler="heun", steps=10).cost == 3 * 19
    assert plan(tiny, n=3, sampler="heun", steps=10, labels=1, guidance=2.0).cost == 2 * 3 * 19
    tight = ServingConfig(max_request_cost=3 * 19 * 64)
    assert plan(tiny, tight, n=3, sampler="heun", steps=10).evaluations == 19
    with pytest.raises(RequestError, match=r"4 images x 19 network evaluations x 64 pixels") as caught:
        plan(tiny, tight, n=4, sampler="heun", steps=10)
    assert caught.value.code == "request_too_large"


def test_what_is_too_large_names_the_command_that_makes_the_same_images(tiny: Model) -> None:
    fields = {"labels": 3, "sampler": "ancestral", "steps": 7, "grid": "uniform_t", "options": {"clip": None}}
    tight = ServingConfig(max_request_cost=64 * 7 * 8)
    for config, n in ((CONFIG, 17), (tight, 9)):
        with pytest.raises(RequestError, match=r"python -m jobs\.sample RUN_FILE") as caught:
            plan(tiny, config, n=n, **fields)
        words = str(caught.value).partition("made by: ")[2].split()
        assert words[3:9] == ["RUN_FILE", "--images", str(n), "--seed", "1", "--labels=3"]
        assert load_config(RUN_FILE, words[9:]).evaluation.sampling == plan(tiny, n=1, **fields).how


def test_options_may_be_lists_and_formulas(tiny: Model) -> None:
    """What a request asks for is what the model is asked: the same images as by the same options in `Model.sample`."""
    asked: list[dict[str, Any]] = [
        {"sampler": "sde", "options": {"lam": "sqrt(t)"}},
        {"sampler": "sde", "options": {"lam": [1.0, 0.5, 0]}},
        {"sampler": "ddim", "options": {"eta": [0.0, 0.5, 1.0], "sigma_1": "beta"}},
        {"sampler": "ancestral", "options": {"finish": "draw"}},
        {"sampler": "predictor_corrector", "options": {"sde": "vp", "predictor": "euler", "corrector_steps": 0}},
        {"sampler": "langevin", "options": {"level": -2.0, "finish": "y", "steps_per_level": 2}},
        {"sampler": "heun", "grid": "rho", "integer_steps": True, "options": {"churn": 2.0, "churn_last": True}},
    ]
    for fields in asked:
        made = plan(tiny, n=1, steps=4, **fields)
        image = to_pixels(drive(made.build(tiny), tiny.networks))
        assert torch.equal(image, tiny.sample(1, seed=1, how=made.how)), fields
    with pytest.raises(ValueError, match="adaptive"):
        plan(tiny, sampler="adaptive", integer_steps=True).build(tiny)


def asked(made: GenerationPlan) -> list[int]:
    assert made.conditioning.label is not None
    return made.conditioning.label.tolist()


@pytest.mark.parametrize("fields", [{}, {"labels": 3}, {"prompt": "3"}, {"labels": [3, 4]}])
def test_a_request_for_too_many_is_refused_without_room_for_them(tiny: Model, fields: dict[str, Any]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match=r"at most 16 images a request, got 300000000; .* --labels="):
        plan(tiny, n=300_000_000, **fields)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; a number each takes 2.4 GB


def test_a_prompt_is_a_class(tiny: Model) -> None:
    assert asked(plan(tiny, prompt="7", n=2)) == [7, 7]
    assert asked(plan(tiny, prompt=" 07 ")) == [7]
    assert asked(plan(tiny, prompt="")) == [-1]
    assert asked(plan(tiny, labels=[1, -1], n=2)) == [1, -1]
    assert asked(plan(tiny, prompt="7", labels=7)) == [7]
    with pytest.raises(RequestError, match="ask for different things"):
        plan(tiny, prompt="7", labels=6)


def test_a_prompt_is_matched_exactly_first_then_without_case(tiny: Model) -> None:
    names = ["cat", "Cat", "tabby Cat", "DOG", "1", "Straße", "x", "y", "z", "2"]
    named = Model(tiny.config, tiny.denoiser, {**tiny.card, "class_names": names}, tiny.digest)
    told = {"cat": 0, "Cat": 1, " Cat ": 1, "TABBY CAT": 2, "dog": 3, "1": 4, "STRASSE": 5, "2": 9, "3": 3, "X": 6}
    assert {prompt: asked(plan(named, prompt=prompt))[0] for prompt in told} == told
    for prompt in ("CAT", "tabby", "10", "²"):
        with pytest.raises(RequestError, match="name or number of a class"):
            plan(named, prompt=prompt)


def test_the_adaptive_sampler_is_priced_by_its_tolerance(tiny: Model) -> None:
    costs = [plan(tiny, sampler="adaptive", options={"tolerance": 10.0**-p}).cost for p in (1, 2, 3, 4, 5)]
    assert costs == [55, 80, 105, 130, 155]
    images = [encode_png(np.zeros((8, 8, 1), np.uint8))]
    scored = [
        plan_likelihood(
            parse_body(LikelihoodOptions, {"estimator": "ode", "options": {"tolerance": tolerance, "solver": solver}}),
            images,
            tiny,
            ServingConfig(),
            0,
        ).cost
        for solver, tolerance in (("bosh3", 1e-3), ("bosh3", 1e-4), ("dopri5", 1e-4))
    ]
    assert scored[0] < scored[2] < scored[1]


def test_likelihood_images_are_decoded_within_limits(tiny: Model, digits: np.ndarray) -> None:
    good = [encode_png(image) for image in digits]
    request = parse_body(LikelihoodOptions, {"labels": [1, 2, 3], "options": {"levels": 8}})
    made = plan_likelihood(request, good, tiny, CONFIG, 0)
    assert np.array_equal(made.pixels.permute(0, 2, 3, 1).numpy(), digits)
    assert made.cost >= 3 * 8
    wide = encode_png(np.zeros((4, 9, 1), dtype=np.uint8))
    for bad, text in [(b"nonsense", "not a jpg, png or webp"), (good[0][:-20], "truncated"), (wide, "got 9 x 4")]:
        with pytest.raises(RequestError, match=rf"images\[1\]: .*{text}"):
            plan_likelihood(request, [good[0], bad, good[2]], tiny, CONFIG, 0)
    small = ServingConfig(max_image_pixels=60)
    with pytest.raises(RequestError, match=r"images\[0\]: 8 x 8 pixels; allowed are 1 to 60"):
        plan_likelihood(request, good, tiny, small, 0)
    with pytest.raises(RequestError, match="more than the limit"):
        plan_likelihood(parse_body(LikelihoodOptions, {"options": {"levels": 10**9}}), good, tiny, CONFIG, 0)


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.text(max_size=20))
def test_a_form_of_any_bytes_is_read_as_sent(files: list[bytes], name: str) -> None:
    sent = httpx.Request(
        "POST",
        "http://test/",
        data={"estimator": name, "labels": json.dumps([1, -1]), "seed": "12"},
        files=[("images", (f"{index}.png", content, "image/png")) for index, content in enumerate(files)],
    )
    fields, got = parse_form(sent.headers["content-type"], sent.read())
    assert got == files
    assert fields == {"estimator": name, "labels": [1, -1], "seed": 12}


@pytest.mark.parametrize(
    ("content_type", "body", "text"),
    [
        ("multipart/form-data", b"", "without a boundary"),
        ("multipart/form-data; boundary=x", b"--x\r\n", "cut off"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nhello\r\n--x--\r\n", "no name"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n{\r\n--x--',
            "'seed'",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n1\r\n--x--',
            "files go into 'images'",
        ),
        (
            "multipart/form-data; boundary=x",
            PART + b"1\r\n" + PART + b"1\r\n--x--",
            "'seed' is given twice",
        ),
    ],
)
def test_a_broken_form_is_refused(content_type: str, body: bytes, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_form(content_type, body)
    assert text in str(caught.value)


def test_base64_is_checked() -> None:
    encoded = base64.b64encode(b"abc").decode()
    assert decode_base64([encoded, f"data:image/png;base64,{encoded}"]) == [b"abc", b"abc"]
    with pytest.raises(RequestError, match=r"images\[1\]: not base64"):
        decode_base64([encoded, "#!"])


def test_refusals_survive_the_way_between_processes() -> None:
    for error in (Refused("no", 429, "queue_full", "n", 2.5), RequestError("bad", "n", 413, "too_large")):
        again = copy.copy(error)  # by the same protocol as pickling
        assert type(again) is type(error)
        assert vars(again) == vars(error)
    assert Refused("no", 500, "x").body()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"host": "0.0.0.0"}, "set serving.key_hashes"),
        ({"host": "gpu.example"}, "set serving.key_hashes"),
        ({"key_hashes": ("secret",)}, "sha256 digests"),
        ({"chunk": 0}, "serving.chunk"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas <= max_replicas"),
        ({"sampler": "hein"}, "did you mean 'heun'"),
        ({"port": 70_000}, "serving.port"),
        ({"deadline_s": 0.0}, "serving.deadline_s"),
    ],
)
def test_the_serving_section_is_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ServingConfig(**options)
    ServingConfig(host="0.0.0.0", key_hashes=("0" * 64,))
