"""The S3 server of the data's tests."""

from tests.data.conftest import s3_bucket, s3_server

__all__ = ["s3_bucket", "s3_server"]
