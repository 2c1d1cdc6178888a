"""The S3 server and the small sets of the data tests."""

from tests.data.conftest import made, s3_bucket, s3_server

__all__ = ["made", "s3_bucket", "s3_server"]
