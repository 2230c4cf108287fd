"""A mailbox: numbered messages in two directions between a flow and one of its jobs, through storage.

Neither side lists anything: each asks for the number that comes next. A message says its own length and checksum, so
that half of one, on storage that shows what is being written, is taken for none.
"""

from __future__ import annotations

import math
import pickle
import struct
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from prefect_slo.runner.workpool.stores import Store

TO_JOB, FROM_JOB = "to", "from"
BEAT = "beat"
"""Where in a box a sign of life is."""

LAZIEST = 10.0
"""A box is looked into less often the longer nothing comes, down to a tenth."""

_HEADER = struct.Struct(">4sQI")
_MAGIC = b"slo1"


def sealed(message: Any) -> bytes:
    """A message as it lies in storage."""
    body = pickle.dumps(message, protocol=5)
    return _HEADER.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def unsealed(data: bytes) -> Any:
    """What ``sealed`` was given; ``None`` where this isn't the whole of it."""
    if len(data) < _HEADER.size:
        return None
    magic, length, checksum = _HEADER.unpack_from(data)
    body = memoryview(data)[_HEADER.size :]
    if magic != _MAGIC or len(body) != length or zlib.crc32(body) != checksum:
        return None
    return pickle.loads(body)


class Outgoing:
    """One direction, for who writes."""

    def __init__(self, store: Store, box: str, lane: str) -> None:
        self._store, self._box, self._lane, self._sent = store, box, lane, 0

    def send(self, message: Any) -> None:
        """Write the next message; one that could not be written is not counted."""
        self._store.write(self._box, _name(self._lane, self._sent + 1), sealed(message))
        self._sent += 1


class Incoming:
    """One direction, for who reads."""

    def __init__(self, store: Store, box: str, lane: str) -> None:
        self._store, self._box, self._lane, self._received = store, box, lane, 0

    def receive(self) -> Any:
        """The next message, or ``None`` where it isn't there yet."""
        name = _name(self._lane, self._received + 1)
        data = self._store.read(self._box, name)
        message = unsealed(data) if data is not None else None
        if message is not None:
            self._received += 1
            with suppress(Exception):  # what stays behind goes with its box; what was read is not lost for it
                self._store.discard(self._box, name)
        return message


def pause_s(store: Store, quiet_s: float) -> float:
    """How long to wait before the next look into a box where nothing has come for ``quiet_s``: it looks lazily then."""
    return max(store.poll_s, min(quiet_s / 50, LAZIEST * store.poll_s))


def _name(lane: str, number: int) -> str:
    return f"{lane}-{number:08d}"


class Heart:
    """Gives a sign of life: writes another one into a box again and again, from a thread of its own.

    Args:
        store: Where the box is.
        box: Its name.
        every_s: Between two signs.
        missed: Told why none can be written, once for as long as that lasts.
    """

    def __init__(self, store: Store, box: str, every_s: float, *, missed: Callable[[Exception], None]) -> None:
        self._store, self._box, self._every_s, self._missed = store, box, every_s, missed
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="prefect-slo-heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give no further sign."""
        self._stopped.set()

    def join(self, patience_s: float) -> None:
        """Wait until the last one is written, for so long at most."""
        self._thread.join(patience_s)

    def _beat(self) -> None:
        told = ""
        for number in count(1):
            try:
                self._store.write(self._box, BEAT, f"{number}".encode())
                told = ""
            except Exception as error:
                if repr(error) != told:
                    self._missed(error)
                told = repr(error)
            if self._stopped.wait(self._every_s):
                return


class Pulse:
    """How long a sign of life has not changed, by the reader's own clock: no two clocks are compared."""

    def __init__(self, now: float) -> None:
        self._last: bytes | None = None
        self._changed = now

    def silent_s(self, sign: bytes | None, now: float) -> float:
        """Take in what was read now; seconds since it was last something else."""
        if sign is not None and sign != self._last:
            self._last, self._changed = sign, now
        return now - self._changed


@dataclass
class Offset:
    """What has to be added to the job's clock to have ours, from messages that can't arrive before they are sent.

    A job on this machine has our clock, and then 0 is never excluded.
    """

    least: float = -math.inf
    most: float = math.inf

    def sent(self, here: float, received_there: float) -> None:
        """A message that left here at ``here`` was received there at that instant of the job's clock."""
        self.least = max(self.least, here - received_there)

    def received(self, here: float, sent_there: float) -> None:
        """A message that left there at that instant arrived here at ``here``."""
        self.most = min(self.most, here - sent_there)

    @property
    def seconds(self) -> float:
        """The best guess."""
        if self.least <= 0.0 <= self.most:
            return 0.0
        if math.isinf(self.least) or math.isinf(self.most):
            return self.most if math.isinf(self.least) else self.least
        return (self.least + self.most) / 2
