"""What an account lets run at once: read from it, remembered for some minutes, and never more than asked for."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT_S = 300.0
_LOCK = threading.Lock()
_KNOWN: dict[tuple[Any, ...], tuple[float, Allowed]] = {}


@dataclass(frozen=True)
class Allowed:
    """Invocations that may be under way at once.

    Attributes:
        account: Of the whole account in this region; ``None`` where it was not said.
        unreserved: Of that, what no function has reserved.
        reserved: By function, what is set aside for it, and what it never exceeds.
        refused: Why AWS did not say; empty where it did.
    """

    account: int | None = None
    unreserved: int | None = None
    reserved: Mapping[str, int] = field(default_factory=dict)
    refused: str = ""

    def __str__(self) -> str:
        reserved = "".join(f", {count} reserved for {name}" for name, count in self.reserved.items())
        return f"{self.account} at once, {self.unreserved} unreserved{reserved}"

    def of(self, function: str, asked: int) -> int:
        """How many invocations of a function may be under way, of so many that are asked for."""
        if function in self.reserved:
            return min(asked, self.reserved[function])
        return asked if self.unreserved is None else min(asked, self.unreserved)

    def of_all(self, functions: Iterable[str], asked: int) -> int:
        """How many may be of all functions together: what each has set aside, and what the others share."""
        names = list(functions)
        if any(name not in self.reserved for name in names) and self.unreserved is None:
            return asked
        shared = (self.unreserved or 0) if any(name not in self.reserved for name in names) else 0
        return min(asked, shared + sum(self.reserved.get(name, 0) for name in names))


def allowed(
    client: Any, region: str | None, endpoint: str | None, functions: Iterable[str], *, fresh: bool = False
) -> Allowed:
    """What the account allows these functions; whoever may not ask is told nothing, and goes by what they were given.

    Args:
        client: boto3's Lambda client.
        region: As it was given to the client; names the account with ``endpoint``.
        endpoint: Likewise.
        functions: Names of functions.
        fresh: Ask, even where the last answer is not old.
    """
    key = (region, endpoint, tuple(functions))
    with _LOCK:
        at, known = _KNOWN.get(key, (-math.inf, Allowed()))
    if not fresh and time.monotonic() < at + KEPT_S:
        return known
    found = _asked(client, key[-1])
    with _LOCK:
        _KNOWN[key] = time.monotonic(), found
    return found


def remembered(region: str | None, endpoint: str | None, functions: Iterable[str]) -> Allowed:
    """The last answer, however old; one that says nothing where nobody has asked."""
    with _LOCK:
        return _KNOWN.get((region, endpoint, tuple(functions)), (0.0, Allowed()))[1]


def forget_allowed() -> None:
    """Have it read anew: after a mocked account has changed."""
    with _LOCK:
        _KNOWN.clear()


def _asked(client: Any, names: tuple[str, ...]) -> Allowed:
    from botocore.exceptions import BotoCoreError, ClientError

    reserved = {}
    try:
        limits = client.get_account_settings()["AccountLimit"]
        for name in names:
            try:
                setting = client.get_function_concurrency(FunctionName=name)
            except ClientError as error:
                if error.response["Error"]["Code"] != "ResourceNotFoundException":
                    raise
            else:
                if (count := setting.get("ReservedConcurrentExecutions")) is not None:
                    reserved[name] = int(count)
    except (ClientError, BotoCoreError) as error:
        return Allowed(refused=f"{type(error).__name__}: {error}")
    return Allowed(int(limits["ConcurrentExecutions"]), int(limits["UnreservedConcurrentExecutions"]), reserved)
