"""Faults of AWS, before or after the work is done: what a caller must live with, seeded and counted.

A fault *before* means that nothing has run; one *after* means that everything has, and that the answer is lost.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, get_args

from prefect_slo.errors import InvalidValue
from prefect_slo.units import finite

When = Literal["before", "after"]
Kind = Literal["throttle", "error", "slow-down", "lost-reply", "connection", "unreachable"]
_OPERATION = re.compile(r"\*|[a-z0-9*?-]+\.[A-Z*?]\S*")
"""``service.Operation`` as botocore names it, or a pattern of such."""


@dataclass(frozen=True)
class Fault:
    """A rule.

    Attributes:
        operation: ``lambda.Invoke``, ``s3.PutObject``; ``s3.*`` and ``*`` match several.
        kind: ``throttle``: 429 of Lambda; ``error``: 500; ``slow-down``: 503 of S3; ``lost-reply``: no answer in time;
            ``connection``: it breaks; ``unreachable``: there is none, so that nothing can have been done.
        when: Before or after the work is done.
        probability: Of each call.
        times: At most so often; ``None`` for no end.
        lasts: Asked at each call: whether the fault is still there.

    Raises:
        InvalidValue: A kind that there isn't, or an operation that no call could have.
    """

    operation: str
    kind: Kind
    when: When = "before"
    probability: float = 1.0
    times: int | None = None
    lasts: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        if _OPERATION.fullmatch(self.operation) is None:
            raise InvalidValue("fault.operation", self.operation, "such as 'lambda.Invoke', 's3.*' or '*'")
        for name, known in (("kind", get_args(Kind)), ("when", get_args(When))):
            if getattr(self, name) not in known:
                raise InvalidValue(f"fault.{name}", getattr(self, name), f"one of {', '.join(known)}")
        if not 0 <= finite(self.probability, "fault.probability") <= 1:
            raise InvalidValue("fault.probability", self.probability, "0 to 1")


class Faults:
    """Faults that are in force while this is open. Calls of this process only, through moto.

    Args:
        rules: Rules; the first that applies to a call holds.
        seed: Of the draws.
    """

    def __init__(self, *rules: Fault, seed: int = 0) -> None:
        self.rules = list(rules)
        self.calls: Counter[str] = Counter()
        self.struck: Counter[tuple[str, str]] = Counter()
        self._used: Counter[int] = Counter()
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self._original: Any = None

    def add(self, *rules: Fault) -> None:
        """More rules, behind those there are."""
        self.rules.extend(rules)

    def __enter__(self) -> Faults:
        stub = _moto_stub()
        faults, original = self, stub.__call__
        self._original = original

        def call(stubber: Any, event_name: str, request: Any, **rest: Any) -> Any:
            operation = _operation(event_name)
            rule = faults._pick(operation)
            if rule is None:
                return original(stubber, event_name, request, **rest)
            if rule.when == "after":
                original(stubber, event_name, request, **rest)
            return _response(rule, request)

        stub.__call__ = call
        return self

    def __exit__(self, *_: object) -> None:
        _moto_stub().__call__ = self._original

    def _pick(self, operation: str) -> Fault | None:
        with self._lock:
            self.calls[operation] += 1
            for at, rule in enumerate(self.rules):
                if not fnmatch(operation, rule.operation) or (rule.times is not None and self._used[at] >= rule.times):
                    continue
                if rule.lasts is not None and not rule.lasts():
                    continue
                if self._rng.random() < rule.probability:
                    self._used[at] += 1
                    self.struck[operation, rule.kind] += 1
                    return rule
        return None


def _moto_stub() -> Any:
    """moto's class that answers in botocore's place."""
    from moto.core.botocore_stubber import BotocoreStubber

    return BotocoreStubber


def _operation(event_name: str) -> str:
    """``lambda.Invoke`` from ``before-send.lambda.Invoke``."""
    return event_name.split(".", 1)[1] if "." in event_name else event_name


def _response(rule: Fault, request: Any) -> Any:
    from botocore.awsrequest import AWSResponse
    from botocore.exceptions import ConnectionClosedError, EndpointConnectionError, ReadTimeoutError

    if rule.kind == "unreachable":
        raise EndpointConnectionError(endpoint_url=request.url, error="no route")
    if rule.kind == "lost-reply":
        raise ReadTimeoutError(endpoint_url=request.url)
    if rule.kind == "connection":
        raise ConnectionClosedError(endpoint_url=request.url)
    status, code, fields = _ANSWERS[rule.kind]
    if rule.kind == "slow-down":
        body = f"<Error><Code>{code}</Code><Message>Please reduce your request rate.</Message></Error>".encode()
    else:
        body = json.dumps({"__type": code, "message": "Rate Exceeded.", **fields}).encode()
    return AWSResponse(request.url, status, {"x-amzn-ErrorType": code}, _Raw(body))


_ANSWERS: dict[str, tuple[int, str, dict[str, str]]] = {
    "throttle": (429, "TooManyRequestsException", {"Reason": "ConcurrentInvocationLimitExceeded"}),
    "error": (500, "ServiceException", {}),
    "slow-down": (503, "SlowDown", {}),
}


class _Raw:
    """A body that has been received."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def stream(self, **_: Any) -> Any:
        yield self._body

    def read(self, *_: Any, **__: Any) -> bytes:
        body, self._body = self._body, b""
        return body
