"""Messages on a stream socket: a small header, a pickle, and large payloads beside it, never copied into it.

A frame is ``total, meta, n`` (bytes of the frame after this header, bytes of the pickle, number of payloads), the ``n``
lengths, the pickle, the payloads. Pickle protocol 5 takes payloads of 64 KiB and more out of band.
"""

from __future__ import annotations

import mmap
import pickle
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

_HEADER = struct.Struct("<QQI")
_LENGTH = struct.Struct("<Q")
_OUT_OF_BAND = 64 * 1024
_CHUNK = 256 * 1024
_VECTORS = 64  # buffers a sendmsg; the kernel's own limit is 1024

Buffer = bytes | bytearray | memoryview


def lift(payload: bytes) -> bytes:
    """``payload``, marked to travel beside the pickle when it is large. It arrives as plain bytes."""
    return payload if len(payload) < _OUT_OF_BAND else cast(bytes, pickle.PickleBuffer(payload))


def lift_all(payloads: Iterable[bytes]) -> tuple[bytes, ...]:
    """Each of some payloads, marked likewise."""
    return tuple(map(lift, payloads))


def encode(message: object) -> list[Buffer]:
    """The buffers of one frame, in order."""
    aside: list[pickle.PickleBuffer] = []
    meta = pickle.dumps(message, protocol=5, buffer_callback=aside.append)
    payloads = [buffer.raw() for buffer in aside]
    lengths = b"".join(_LENGTH.pack(payload.nbytes) for payload in payloads)
    total = len(lengths) + len(meta) + sum(payload.nbytes for payload in payloads)
    return [_HEADER.pack(total, len(meta), len(payloads)) + lengths + meta, *payloads]


def send_all(sock: socket.socket, buffers: Iterable[Buffer]) -> None:
    """Write whole frames to a blocking socket."""
    backlog = Backlog()
    backlog.extend(buffers)
    while backlog:
        backlog.send(sock)


class Backlog:
    """Bytes that still have to be written to a socket, in order."""

    def __init__(self) -> None:
        self._views: deque[memoryview] = deque()

    def __bool__(self) -> bool:
        return bool(self._views)

    def extend(self, buffers: Iterable[Buffer]) -> None:
        self._views.extend(memoryview(buffer) for buffer in buffers if len(buffer))

    def send(self, sock: socket.socket) -> None:
        """Write once, as much as the socket takes; raises ``BlockingIOError`` when it takes nothing."""
        views = self._views
        sent = sock.sendmsg([views[i] for i in range(min(len(views), _VECTORS))])
        while sent:
            head = views[0]
            if sent < len(head):
                views[0] = head[sent:]
                return
            sent -= len(head)
            views.popleft()


class Decoder:
    """Turns what a socket delivers into messages, whatever the pieces it comes in."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._large: memoryview | None = None  # one big frame, filled in place
        self._filled = 0

    def receive(self, sock: socket.socket) -> list[Any] | None:
        """Read once; the messages completed by it, or ``None`` at the end of the stream."""
        if self._large is not None:
            return self._receive_large(sock, self._large)
        data = sock.recv(_CHUNK)
        if not data:
            return None
        self._bytes += data
        messages = []
        while (message := self._next()) is not _INCOMPLETE:
            messages.append(message)
        return messages

    def _receive_large(self, sock: socket.socket, target: memoryview) -> list[Any] | None:
        got = sock.recv_into(target[self._filled : self._filled + 4 * _CHUNK])
        if not got:
            return None
        self._filled += got
        if self._filled < len(target):
            return []
        self._large, self._filled = None, 0
        return [_decode(target)]

    def _next(self) -> Any:
        """The first whole message of what was read, or a marker that there is none yet."""
        data = self._bytes
        if len(data) < _HEADER.size:
            return _INCOMPLETE
        end = _HEADER.size + _HEADER.unpack_from(data)[0]
        if len(data) >= end:
            with memoryview(data) as view:
                message = _decode(view[:end])
            del data[:end]
            return message
        if end - len(data) > _CHUNK:
            # An anonymous map, since a bytearray would first be filled with zeros under the interpreter's lock.
            self._large = memoryview(mmap.mmap(-1, end))
            self._filled = len(data)
            self._large[: len(data)] = data
            self._bytes = bytearray()
        return _INCOMPLETE


_INCOMPLETE = object()


def _decode(frame: memoryview) -> Any:
    with frame:
        _, meta, count = _HEADER.unpack_from(frame)
        lengths = [_LENGTH.unpack_from(frame, _HEADER.size + i * _LENGTH.size)[0] for i in range(count)]
        start = _HEADER.size + count * _LENGTH.size
        take: Callable[[int, int], bytes] = lambda at, size: bytes(frame[at : at + size])  # noqa: E731
        payloads, at = [], start + meta
        for length in lengths:
            payloads.append(take(at, length))
            at += length
        return pickle.loads(take(start, meta), buffers=payloads)
