"""Requests to S3, and what is done when the store does not answer or cannot now.

boto3 takes endpoint, region and credentials from the environment or the instance role (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, ...).
"""

import os
import random
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from pipeline.storage.hedge import Hedge

T = TypeVar("T")

ATTEMPTS = 8
FIRST_DELAY_S, DELAY_GROWTH, LONGEST_DELAY_S = 0.05, 2.5, 5.0
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 10.0  # without a single byte
MISSING_ATTEMPTS = 3  # a 404 for an object that should exist is tried again: stores answer so while they settle
PASSING = ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed")
PIECE_BYTES = 256 << 10  # of a body, between signs of life
TOO_BUSY = (429, 503)  # status of a store that is asked for too much

HEDGE = Hedge()


class StorageError(OSError):
    """A store that did not answer after all retries, or refused; names the URL and the last reason."""


def read(url: str, where: dict[str, Any]) -> bytes:
    """The body of a GET request, see `hedge` and `retried`."""

    def fetch(heard: Callable[[], None]) -> bytes:
        answer = client().get_object(**where)
        pieces: list[bytes] = []
        heard()
        for piece in answer["Body"].iter_chunks(PIECE_BYTES):  # fewer bytes than announced are an error
            heard()
            pieces.append(piece)
        return b"".join(pieces)

    return retried(url, lambda: HEDGE.run(fetch))


def client() -> Any:
    """The S3 client of this process and endpoint (a client must not cross a fork)."""
    return client_of(os.getpid(), os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))


@lru_cache(maxsize=4)
def client_of(pid: int, endpoint: str | None) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    return Session().client(
        "s3",
        region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        config=Config(
            retries={"total_max_attempts": 1},  # one policy only: retried
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=64,
            # stores other than AWS refuse the newer checksum trailers; we keep digests of our own
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def put_new(url: str, bucket: str, key: str, data: bytes) -> None:
    """A PUT that the store refuses where the key is taken, which is no error here."""
    from botocore.exceptions import ClientError

    def put() -> None:
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if _status(error) == 409:  # two at once, and the store has taken neither
                raise StorageError(f"{url}: the store answered 409") from error
            if _status(error) != 412:
                raise

    retried(url, put)


def retried(url: str, call: Callable[[], T], attempts_if_missing: int = MISSING_ATTEMPTS) -> T:
    """Runs an S3 request, again after a passing failure with exponential, jittered delays.

    Raises:
        FileNotFoundError, PermissionError: what the store said. StorageError: everything else, after ATTEMPTS tries.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    last: Exception | None = None
    for attempt in range(ATTEMPTS):
        time.sleep(delay(attempt, last))
        try:
            return call()
        except NoCredentialsError as error:
            raise PermissionError(
                f"{url}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the node a role"
            ) from error
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = _status(error)
            if code == "NoSuchBucket":
                raise FileNotFoundError(f"{url}: there is no such bucket") from error
            if status == 404 and attempt + 1 >= attempts_if_missing:
                raise FileNotFoundError(f"{url}: there is no such object") from error
            if status in (401, 403):
                raise PermissionError(f"{url}: the store refused ({code})") from error
            passing = status >= 500 or status in (404, 408, *TOO_BUSY) or code in PASSING
            if not passing:
                raise StorageError(f"{url}: the store answered {status} {code}") from error
            last = error
        except (BotoCoreError, OSError) as error:
            last = error
        except Exception as error:  # urllib3 errors come through bare from a streamed body
            if not type(error).__module__.startswith("urllib3"):
                raise
            last = error
    raise StorageError(
        f"{url}: no answer after {ATTEMPTS} tries; the last failure: {type(last).__name__}: {last}"
    ) from last


def delay(attempt: int, last: Exception | None) -> float:
    """Seconds before an attempt: the second comes at once, unless the store was asked for too much."""
    busy = last is not None and _status(last) in TOO_BUSY
    if attempt == 0 or (attempt == 1 and not busy):
        return 0.0
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * DELAY_GROWTH ** (attempt - 1)) * random.uniform(0.5, 1.0)


def _status(error: Exception) -> int:
    """The HTTP status of an answer that boto3 made an error; 0 where there was none."""
    response: Any = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
