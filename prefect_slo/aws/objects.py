"""Files on S3: stage-run tables that profiling jobs elsewhere have left there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect_slo.errors import InvalidValue

SCHEME = "s3://"
TRIES = 5
"""Attempts of one call, with botocore's standard back-off: throttling and broken connections pass."""


def is_s3(path: str | Path) -> bool:
    """Whether it names an object on S3."""
    return isinstance(path, str) and path.startswith(SCHEME)


@contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """The object as a local file of the same name, for as long as the body runs.

    Args:
        uri: ``s3://bucket/key``. Credentials and region are found as boto3 finds them.

    Raises:
        InvalidValue: Not such a name, or an object that can't be read, with AWS's reason.
    """
    bucket, key = _split(uri)
    with tempfile.TemporaryDirectory(prefix="prefect-slo-") as folder:
        local = Path(folder) / key.rpartition("/")[2]
        with _refused(uri, "an object that can be read"):
            _client().download_file(bucket, key, str(local))
        yield local


@contextmanager
def stored(uri: str) -> Iterator[Path]:
    """A local file that becomes the object when the body has ended without an error.

    Raises:
        InvalidValue: Not ``s3://bucket/key``, or an object that can't be written, with AWS's reason.
    """
    bucket, key = _split(uri)
    with tempfile.TemporaryDirectory(prefix="prefect-slo-") as folder:
        local = Path(folder) / key.rpartition("/")[2]
        yield local
        with _refused(uri, "an object that can be written"):
            _client().upload_file(str(local), bucket, key)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not bucket or not key or key.endswith("/"):
        raise InvalidValue("uri", uri, "s3://bucket/key")
    return bucket, key


def _client() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"max_attempts": TRIES, "mode": "standard"}))


@contextmanager
def _refused(uri: str, expected: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise InvalidValue("uri", uri, f"{expected} ({error})") from None
