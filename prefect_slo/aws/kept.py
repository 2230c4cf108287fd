"""Results that stay on S3, and values that many calls take: stored once, and read by whoever needs them.

A result that is too large for a reply lies on S3 already. It stays there: the flow's process gets a reference, fetches
the value when it is read, and sends the reference to calls that take it on a pool of the same bucket, whose workers
fetch it themselves. What comes from the flow's process and is taken by several calls is stored under its content.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from decimal import Decimal
from typing import Any, NamedTuple

from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.aws.storage import Requests, reading, writing

KEEP_BYTES = 2**20
"""Of a result that fits into no reply, values of at least this size stay; arguments of that size are stored once. To
fetch one takes a worker 10 to 30 ms."""

_NOT_THERE = (404, 416)


class Place:
    """A bucket and folder that several pools share: what lies there, workers of each can read.

    Args:
        store: The bucket and folder that the pools were given.
    """

    def __init__(self, store: S3Prefix) -> None:
        self.store = store
        self._gone: set[str] = set()

    def lose(self, key: str) -> None:
        """An object is known not to be there any more."""
        self._gone.add(key)

    def gone(self, key: str) -> str:
        """In words why an object can't be had any more; empty where that isn't known."""
        where = f"s3://{self.store.bucket}/{key}"
        return f"{where} is not there any more" if key in self._gone else ""


_PLACES: dict[tuple[str | None, ...], Place] = {}
_LOCK = threading.Lock()


def place_of(store: S3Prefix) -> Place:
    """The place of a bucket and folder: one for all pools that were given the same, under the same encryption."""
    name = (store.bucket, store.prefix.strip("/"), store.endpoint, store.kms_key, store.sse)
    with _LOCK:
        return _PLACES.setdefault(name, Place(store))


class KeptObject:
    """A pickled value that lies on S3: an object, or a part of one (``Kept``).

    Attributes:
        place: Where it lies.
        key: The object.
        at: Where in it the value begins.
        size: Bytes of the value.
    """

    def __init__(self, place: Place, key: str, at: int, size: int, paid: Callable[[Decimal], None]) -> None:
        self.place, self.key, self.at, self.size, self._paid = place, key, at, size, paid

    def __str__(self) -> str:
        return f"s3://{self.place.store.bucket}/{self.key}#{self.at}+{self.size}"

    @property
    def fetch_usd(self) -> Decimal:
        """What bringing it here costs."""
        return reading(self.size).usd

    @property
    def document(self) -> dict[str, Any]:
        """Where it lies, as a worker is told."""
        return {"bucket": self.place.store.bucket, "key": self.key, "at": self.at, "size": self.size}

    def gone(self) -> str:
        """In words why it can't be had any more, as far as that is known."""
        return self.place.gone(self.key)

    def fetch(self) -> bytes:
        """Bring it here.

        Raises:
            LookupError: It is not there any more.
            ClientError: S3 refuses it.
        """
        from botocore.exceptions import ClientError

        try:
            content = self.place.store.get_range(self.key, self.at, self.size)
        except ClientError as error:
            if error.response["ResponseMetadata"].get("HTTPStatusCode") not in _NOT_THERE:
                raise
            self.place.lose(self.key)
            raise LookupError(self.gone()) from None
        self._paid(self.fetch_usd)
        return content


class Value(NamedTuple):
    """A pickled value of this process that a call takes, by its content."""

    sha: str
    content: bytes


class Shared:
    """Values of this process that calls of one flow run take: each is stored once, however many take it.

    What one call alone has taken so far, and fits into its request, goes in there.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._stored: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    def travels(self, value: Value, room: int) -> bool:
        """Whether a value goes into the request of a call that has so much room."""
        with self._lock:
            first = value.sha not in self._seen and value.sha not in self._stored
            self._seen.add(value.sha)
        return first and len(value.content) <= room

    def forget(self, value: Value) -> None:
        """Store a value again when it is next taken, unless that is under way."""
        with self._lock:
            if (stored := self._stored.get(value.sha)) is not None and stored.done():
                del self._stored[value.sha]

    def store(self, value: Value, store: S3Prefix, key: str) -> Requests:
        """Have a value lie under a key, and what that took: another call may have stored it, or be about to.

        Raises:
            ClientError: S3 refuses it.
        """
        with self._lock:
            under_way = self._stored.get(value.sha)
            if under_way is None:
                mine = self._stored[value.sha] = Future()
        if under_way is not None:
            under_way.result()
            return Requests()
        try:
            store.put(key, value.content)
        except BaseException as error:
            with self._lock:
                del self._stored[value.sha]
            mine.set_exception(error)
            raise
        mine.set_result(None)
        return writing(len(value.content))
