"""The OpenAPI document against the endpoint's behaviour: requests that it allows, and requests that it forbids.

Allowed ones get 200 or a documented 4xx, forbidden ones a 4xx; nothing gets a 5xx. Every refusal has the error schema.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from pipeline.model import load
from pipeline.serving.config import ServingConfig
from tests.faults.endpoint import Endpoint, serving
from tests.serving.tiny import save_tiny

schemathesis = pytest.importorskip("schemathesis")

OPERATIONS = (
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/likelihood"),
    ("POST", "/v1/encodings"),
)
CASES = [(*key, True) for key in OPERATIONS] + [(*key, False) for key in OPERATIONS[4:]]  # the others take nothing
IDS = [f"{path} {'allowed' if positive else 'forbidden'}" for _, path, positive in CASES]
FEW = {True: 160, False: 40}  # allowed, forbidden (which are slow to make): 200 an endpoint
MANY = 2000


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    url = str(tmp_path_factory.mktemp("model") / "tiny")
    save_tiny(url)
    config = ServingConfig(model="tiny", max_images=3, max_steps=4, steps=2, max_request_bytes=100_000)
    with serving(load(url), config) as made:
        yield made


@pytest.fixture(scope="module")
def operations(endpoint: Endpoint) -> dict[tuple[str, str], Any]:
    schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    found = [each.ok() for each in schema.get_all_operations()]
    return {(each.method.upper(), each.path): each for each in found}


def test_the_document_names_every_operation(operations: dict[tuple[str, str], Any]) -> None:
    assert operations.keys() == set(OPERATIONS)
    assert all({"200", "4XX"} <= set(each.responses.status_codes) for key, each in operations.items() if "v1" in key[1])


def has_error_schema(answer: Any) -> bool:
    """Whether a refusal says why as all of ours do."""
    try:
        body = answer.json()
        same = body["error"].keys() == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return same and [body["trace_id"]] == answer.headers["x-request-id"]


def check(endpoint: Endpoint, operation: Any, positive: bool, count: int) -> None:
    mode = schemathesis.GenerationMode.POSITIVE if positive else schemathesis.GenerationMode.NEGATIVE
    seen: Counter[int] = Counter()
    wrong: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how schemathesis uses its libraries

        @settings(
            max_examples=count,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def asked(case: Any) -> None:
            try:
                answer = case.call(base_url=endpoint.url, timeout=60)
            except (UnicodeError, ValueError):
                return  # nothing that its client can put on the wire
            seen[answer.status_code] += 1
            allowed = (200, *range(400, 500)) if positive else range(400, 500)
            fine = answer.status_code in allowed and (answer.status_code == 200 or has_error_schema(answer))
            if not fine:  # told at the end: shrinking would ask again and again
                wrong.append(f"{answer.status_code} {answer.text[:300]}\n{case.as_curl_command()[:2000]}")

        asked()
    print(f"{operation.method.upper()} {operation.path}: {sum(seen.values())} cases, {dict(seen)}")
    assert not wrong, "\n\n".join(wrong[:5])
    assert sum(seen.values()) >= 0.5 * count or operation.method == "get"
    assert endpoint.alive


@pytest.mark.parametrize(("method", "path", "positive"), CASES, ids=IDS)
def test_behaviour_is_what_the_document_says(
    endpoint: Endpoint, operations: dict[tuple[str, str], Any], method: str, path: str, positive: bool
) -> None:
    check(endpoint, operations[method, path], positive, FEW[positive])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("method", "path", "positive"), CASES, ids=IDS)
def test_behaviour_is_what_the_document_says_of_many(
    endpoint: Endpoint, operations: dict[tuple[str, str], Any], method: str, path: str, positive: bool
) -> None:
    check(endpoint, operations[method, path], positive, MANY)
