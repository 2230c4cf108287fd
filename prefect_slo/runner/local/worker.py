"""The worker process: runs bundles in its main thread, reports on a socket, and ends with its parent.

Messages to it are a ``Birth``, then ``("run", serial, key, program, forget, items, parts)``,
``("adopt", surroundings, vcpus)`` and ``("bye",)``. Frames from it are lists of records: ``("hello", pid,
resident_mb)``, ``("item", item, started, ended, payload, failed, unpicklable, read_s, write_s, parts)``,
``("chatter", serial, payload)``, ``("finished", serial, …)``, ``("unopened", detail)`` and ``("broken", detail)``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from prefect_slo.runner.local.limits import limit_loaded_libraries, threads_of
from prefect_slo.runner.local.page import Page
from prefect_slo.runner.local.setup import Birth
from prefect_slo.runner.local.wire import Decoder, encode, lift, lift_all, send_all

_GATHER_S = 0.003  # records of this long travel together
_GATHER_BYTES = 256 * 1024
_WORTH_SENDING_S = 0.001  # an item of this long is reported at once: the next one may take the worker with it
_LOOK_S = 1.0  # between two looks at the parent's process
_BYE_S = 5.0  # exit handlers of user code may take this long


def main(socket_fd: int, page_fd: int, parent: int) -> None:
    """Serve until told goodbye (returns), or until the parent ends or user code breaks out (never returns).

    Args:
        socket_fd: Stream to the process that uses this one.
        page_fd: Page shared with it.
        parent: Process that is the parent of this one, and ends it by ending.
    """
    for fd in (socket_fd, page_fd):  # not for processes that user code starts
        os.set_inheritable(fd, False)
    sock = socket.socket(fileno=socket_fd)
    sock.setblocking(True)
    decoder, inbox = Decoder(), SimpleQueue[Any]()
    birth = _first(sock, decoder, inbox)
    birth.apply()
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no usable stderr
        faulthandler.enable()
    page = Page(page_fd)
    os.close(page_fd)
    outbox = Outbox(sock)
    threading.Thread(
        target=_listen, args=(sock, decoder, inbox, parent), name="prefect-slo-reader", daemon=True
    ).start()
    outbox.post(("hello", os.getpid(), memory_mb()[1]), now=True)
    code = 1
    try:
        Server(inbox, outbox, page).serve()
        return
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        outbox.post(("broken", "".join(traceback.format_exception(error)[-6:])), now=True)
    # Not sys.exit: threads of user code could hold the interpreter's end up for ever.
    outbox.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class Outbox:
    """Records on their way to the parent: at once when the line was quiet, else gathered over a few milliseconds."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._records: list[tuple[Any, ...]] = []
        self._bytes = 0
        self._sent = 0.0
        self._due = threading.Event()
        threading.Thread(target=self._flush_late, name="prefect-slo-sender", daemon=True).start()

    def post(self, record: tuple[Any, ...], size: int = 0, *, now: bool = False) -> None:
        """Add a record; callable from any thread."""
        with self._lock:
            self._records.append(record)
            self._bytes += size
            if now or self._bytes > _GATHER_BYTES or time.monotonic() - self._sent >= _GATHER_S:
                self._send()
                return
        if not self._due.is_set():
            self._due.set()

    def flush(self) -> None:
        with self._lock:
            self._send()

    def _send(self) -> None:
        if not self._records:
            return
        records, self._records, self._bytes = self._records, [], 0
        try:
            send_all(self._sock, encode(records))
        except OSError:
            end_group()
        self._sent = time.monotonic()

    def _flush_late(self) -> None:
        while True:
            self._due.wait()
            time.sleep(_GATHER_S)
            self._due.clear()
            self.flush()


class Server:
    """Runs bundles one after another.

    Args:
        inbox: Messages from the parent, in order, each with the instant of its arrival.
        outbox: Where records go.
        page: Where the running item is published.
    """

    def __init__(self, inbox: SimpleQueue[Any], outbox: Outbox, page: Page) -> None:
        self._inbox, self._outbox, self._page = inbox, outbox, page
        self._programs: dict[str, Callable[[int, Any], Any]] = {}
        self._serial = 0

    def serve(self) -> None:
        while True:
            received, message = self._inbox.get()
            match message:
                case ("run", *rest):
                    self._run(received, *rest)
                case ("adopt", surroundings, vcpus):
                    surroundings.adopt()
                    limit_loaded_libraries(threads_of(vcpus))
                case ("bye",):
                    return

    def _run(
        self,
        received: float,
        serial: int,
        key: str,
        program: bytes | None,
        forget: tuple[str, ...],
        items: tuple[tuple[int, bytes], ...],
        parts: tuple[bytes, ...],
    ) -> None:
        cpu, sizes = _cpu_s(), [0, 0]
        page, outbox, clock = self._page, self._outbox, time.monotonic
        reset_peak()
        page.bundle(serial)
        self._serial = serial
        for gone in forget:
            self._programs.pop(gone, None)
        run_item, open_s = self._open(key, program)
        for index, (item, payload) in enumerate(items):
            started = clock()
            page.start(index, started)
            outcome = run_item(item, (payload, parts) if parts else payload)
            ended = clock()
            page.end(index)
            size = len(outcome.payload) + sum(map(len, outcome.parts))
            sizes[0] += len(payload) + outcome.mapped
            sizes[1] += size
            told = (outcome.failed, outcome.unpicklable, outcome.read_s, outcome.write_s, lift_all(outcome.parts))
            outbox.post(
                ("item", item, started, ended, lift(outcome.payload), *told),
                size,
                now=ended - started >= _WORTH_SENDING_S,
            )
            del outcome  # it may be large
        ended, used = clock(), _cpu_s() - cpu
        peak_mb, left_mb = memory_mb()
        outbox.post(("finished", serial, left_mb, received, ended, open_s, used, peak_mb, *sizes), now=True)

    def _open(self, key: str, program: bytes | None) -> tuple[Callable[[int, Any], Any], float]:
        if (run_item := self._programs.get(key)) is not None:
            return run_item, 0.0
        begun = time.monotonic()
        try:
            if program is None:
                raise LookupError(f"program {key!r} was never sent")
            run_item = pickle.loads(program).open(self._emit)
        except Exception as error:
            detail = "".join(traceback.format_exception(error))
            self._outbox.post(("unopened", f"its program could not be opened: {error!r}\n{detail}"), now=True)
            os._exit(1)
        self._programs[key] = run_item
        return run_item, time.monotonic() - begun

    def _emit(self, payload: bytes) -> None:
        self._outbox.post(("chatter", self._serial, lift(payload)), len(payload))


def _first(sock: socket.socket, decoder: Decoder, inbox: SimpleQueue[Any]) -> Birth:
    """Wait for the birth message; what arrives with it waits in ``inbox``."""
    while True:
        messages = decoder.receive(sock)
        if messages is None:
            end_group()
            raise SystemExit(1)
        if messages:
            for message in messages[1:]:
                inbox.put((time.monotonic(), message))
            birth: Birth = messages[0]
            return birth


def _listen(sock: socket.socket, decoder: Decoder, inbox: SimpleQueue[Any], parent: int) -> None:
    """Reader thread: hands messages to the main thread; the end of the stream is the parent's end, hence ours.

    A fork of the parent may keep the stream open, so its process is looked at too.
    """
    leaving, poll = False, select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        try:
            while not poll.poll(1000 * _LOOK_S):
                if os.getppid() != parent:
                    end_group()
            messages = decoder.receive(sock)
        except OSError:
            messages = None
        if messages is None:
            if leaving:
                time.sleep(_BYE_S)
            end_group()
            return
        received = time.monotonic()
        for message in messages:
            leaving = leaving or message[0] == "bye"
            inbox.put((received, message))


def end_group() -> None:
    """End this process and all it has started, at once."""
    with contextlib.suppress(OSError):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def reset_peak() -> None:
    """Begin a new high-water mark (Linux 4.0; elsewhere the mark is that of the process' life)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "wb", buffering=0) as file:
        file.write(b"5")


def memory_mb() -> tuple[float, float]:
    """Resident memory of this process, in MB: its high-water mark since ``reset_peak``, and now."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", "rb", buffering=0) as file:
        status = file.read(4096)
        return _field(status, b"VmHWM:"), _field(status, b"VmRSS:")
    import psutil

    now = float(psutil.Process().memory_info().rss) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return max(peak, now), now


def _field(status: bytes, name: bytes) -> float:
    at = status.index(name) + len(name)
    return int(status[at : status.index(b"kB", at)]) / 1024


def _cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
