"""One client of a service for the whole process: making one takes up to 100 ms, and each has its own connections."""

from __future__ import annotations

import threading
from typing import Any

from prefect_slo.aws.refusals import plainly

_LOCK = threading.Lock()
_CLIENTS: dict[tuple[Any, ...], Any] = {}

CONNECT_S = 5.0
GRACE_S = 30.0
"""A reply may come this long after the function's own timeout, before it is given up."""


def client(
    service: str, *, region: str | None, endpoint: str | None, read_s: float, connections: int, attempts: int = 1
) -> Any:
    """A client that every caller with the same arguments shares; safe in threads.

    Args:
        service: E.g. ``"lambda"``.
        region: ``None`` as boto3 finds it.
        endpoint: ``None`` for AWS.
        read_s: How long an answer may take. boto3's 60 s would call a function again that is still running.
        connections: Connections kept open: more at once than that open and close others.
        attempts: Calls at most, the first included. For invocations 1: they are retried by us, or not at all.

    Raises:
        AwsRefused: No region is set, or a profile that there isn't.
    """
    key = (service, region, endpoint, read_s, connections, attempts)
    with _LOCK:
        if key not in _CLIENTS:
            import boto3
            from botocore.config import Config

            config = Config(
                connect_timeout=CONNECT_S,
                read_timeout=read_s,
                tcp_keepalive=True,
                max_pool_connections=max(connections, 1),
                retries={"total_max_attempts": attempts, "mode": "standard"},
            )
            with plainly():
                session = boto3.session.Session(region_name=region)
                _CLIENTS[key] = session.client(service, endpoint_url=endpoint, config=config)
        return _CLIENTS[key]


def forget_clients() -> None:
    """Have clients made anew: after credentials or a mocked AWS have changed."""
    with _LOCK:
        _CLIENTS.clear()
