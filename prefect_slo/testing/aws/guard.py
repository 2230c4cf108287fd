"""Fake credentials, a scrubbed environment, and a wall: nothing under test can reach AWS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

REGION = "us-east-1"
FAKE = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_SESSION_TOKEN": "testing",
    "AWS_SECURITY_TOKEN": "testing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_REGION": REGION,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
_SCRUBBED = "AWS_"


class RealAwsCall(BaseException):
    """A request that would have left this machine. Not an ``Exception``: no retry may swallow it."""


@contextmanager
def fake_credentials() -> Iterator[dict[str, str]]:
    """Inside, the environment holds fake credentials and nothing else of AWS; yields what it holds."""
    before = {name: value for name, value in os.environ.items() if name.startswith(_SCRUBBED)}
    for name in before:
        del os.environ[name]
    os.environ.update(FAKE)
    try:
        yield dict(FAKE)
    finally:
        for name in [name for name in os.environ if name.startswith(_SCRUBBED)]:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def no_real_aws() -> Iterator[None]:
    """Inside, requests of botocore to anything but this machine raise ``RealAwsCall``, before a socket is opened."""
    from botocore.httpsession import URLLib3Session

    real = URLLib3Session.send

    def send(self: Any, request: Any) -> Any:
        host = urlsplit(request.url).hostname or ""
        if host in ("localhost", "::1") or host.startswith("127."):
            return real(self, request)
        raise RealAwsCall(f"blocked {request.method} {request.url}: it would have left this machine")

    URLLib3Session.send = send
    try:
        yield
    finally:
        URLLib3Session.send = real
