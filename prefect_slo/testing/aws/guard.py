"""Fake credentials, a scrubbed environment, and a wall: nothing under test can reach AWS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from prefect_slo.testing.aws.wall import sitecustomize
from prefect_slo.testing.aws.wall.sitecustomize import RealAwsCall, walled

__all__ = ["RealAwsCall", "fake_credentials", "no_real_aws"]

WALL = Path(sitecustomize.__file__).parent
"""On ``PYTHONPATH``, the same wall for another process."""

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
    """Inside, requests of botocore to anything but this machine raise ``RealAwsCall``, before a socket is opened.

    Those of aiobotocore too, where it is installed: moto answers none of them inside a process.
    """
    from botocore.httpsession import URLLib3Session

    real = URLLib3Session.send

    URLLib3Session.send = walled(real)
    try:
        with _no_asynchronous_calls():
            yield
    finally:
        URLLib3Session.send = real


@contextmanager
def _no_asynchronous_calls() -> Iterator[None]:
    try:
        session: Any = import_module("aiobotocore.httpsession").AIOHTTPSession
    except (ImportError, AttributeError):
        yield
        return
    real = session.send
    session.send = walled(real)
    try:
        yield
    finally:
        session.send = real
