"""Results that stay on S3, and values that many calls take: stored once, and read by whoever needs them.

A result that is too large for a reply lies on S3 already. It stays there: the flow's process gets a reference, fetches
the value when it is read, and sends the reference to calls that take it on a pool of the same bucket, whose workers
fetch it themselves. What comes from the flow's process and is taken by several calls is stored under its content.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from decimal import Decimal
from typing import Any, NamedTuple

from prefect_slo.aws.s3 import KNOWN_S, S3Prefix
from prefect_slo.aws.storage import Requests, reading, writing

KEEP_BYTES = 2**20
"""Of a result that fits into no reply, values of at least this size stay; arguments of that size are stored once. To
fetch one takes a worker 10 to 30 ms."""

EXCUSED = 1
"""How often a stored value may be found to be gone before that tells against the workers that look for it."""

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


_PLACES: dict[str, Place] = {}
_LOCK = threading.Lock()


def place_of(store: S3Prefix) -> Place:
    """The place of a bucket and folder: one for all pools that were given the same, under the same encryption."""
    with _LOCK:
        return _PLACES.setdefault(place_name(store), Place(store))


def place_name(store: S3Prefix) -> str:
    """What the place of a bucket and folder is called: the same for all that share it, and for no others."""
    details = {"endpoint": store.endpoint, "kms_key": store.kms_key, "sse": store.sse}
    said = [f"{name}={value}" for name, value in details.items() if value]
    return " ".join([f"s3://{store.bucket}/{store.prefix.strip('/')}", *said])


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

    What one call alone has taken so far, and fits into its request, goes in there. A value that was stored long ago is
    stored again when it is next taken, before a rule of the bucket deletes it.

    Args:
        clock: Seconds that pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._seen: set[str] = set()
        self._stored: dict[str, _Write] = {}
        self._losses: Counter[str] = Counter()
        self._lock = threading.Lock()

    def travels(self, value: Value, room: int) -> bool:
        """Whether a value goes into the request of a call that has so much room."""
        with self._lock:
            first = value.sha not in self._seen and value.sha not in self._stored
            self._seen.add(value.sha)
        return first and len(value.content) <= room

    def lose(self, value: Value, sent: float) -> bool:
        """A call that was sent then did not find a value: it is stored again when it is next taken.

        Returns:
            Whether that may help. Where it happens again, to what was stored anew, the workers can't see it there.
        """
        with self._lock:
            write = self._stored.get(value.sha)
            if write is not None and write.begun <= sent:
                del self._stored[value.sha]
                self._losses[value.sha] += 1
            return self._losses[value.sha] <= EXCUSED

    def store(self, value: Value, store: S3Prefix, key: str) -> Requests:
        """Have a value lie under a key, and what that took: another call may have stored it, or be about to.

        Raises:
            ClientError: S3 refuses it.
        """
        with self._lock:
            now, write = self.clock(), self._stored.get(value.sha)
            mine = write is None or (write.done.done() and now - write.begun >= KNOWN_S)
            if mine:
                write = self._stored[value.sha] = _Write(now, Future())
        assert write is not None
        if not mine:
            write.done.result()
            return Requests()
        try:
            store.put(key, value.content)
        except BaseException as error:
            with self._lock:
                if self._stored.get(value.sha) is write:
                    del self._stored[value.sha]
            write.done.set_exception(error)
            raise
        write.done.set_result(None)
        return writing(len(value.content))


class _Write(NamedTuple):
    """When a value was last being stored, and whether it is."""

    begun: float
    done: Future[None]
