"""What the I/O thread waits on: sockets of workers, notices of launchers, and a wake-up call from other threads."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Iterator
from typing import Any, Protocol


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Line:
    """A selector that other threads can wake."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        for sock in (self._woken, self._waker):
            sock.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)

    def add(self, source: HasFileno, owner: object) -> None:
        """Wait for ``source`` to be readable, on behalf of ``owner``."""
        self._selector.register(source, selectors.EVENT_READ, owner)

    def want_write(self, source: HasFileno, owner: object, wanted: bool) -> None:
        """Wait for ``source`` to be writable too, or no longer."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        self._selector.modify(source, events, owner)

    def remove(self, source: HasFileno) -> None:
        self._selector.unregister(source)

    def wait(self, timeout_s: float | None) -> Iterator[tuple[Any, bool, bool]]:
        """Owners with something to do: ``(owner, readable, writable)``."""
        for key, events in self._selector.select(timeout_s):
            if key.data is not None:
                yield key.data, bool(events & selectors.EVENT_READ), bool(events & selectors.EVENT_WRITE)
                continue
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)

    def wake(self) -> None:
        """End the wait; callable from any thread."""
        with contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
            self._waker.send(b"\0")

    def close(self) -> None:
        self._selector.close()
        self._woken.close()
        self._waker.close()
