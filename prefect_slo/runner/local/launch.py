"""Starting, ending and reaping worker processes: by a zygote where forking one is possible, else one by one.

Everything here runs in the pool's I/O thread, and does not fork the process that asks: ``subprocess`` starts a fresh
interpreter, and the zygote forks itself. A process that has a single thread can make a fork of itself a zygote, for the
pool that it will have.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import psutil

from prefect_slo.runner.local.limits import thread_environment
from prefect_slo.runner.local.setup import Surroundings, end

StartMethod = Literal["auto", "zygote", "spawn"]
_END_S = 5.0
_LARGEST = 64 * 1024


@dataclass(frozen=True)
class Ended:
    """A worker process has ended and was reaped; ``status`` is a wait status, or ``None`` where nobody can tell."""

    token: int
    status: int | None


@dataclass(frozen=True)
class Unstarted:
    """A worker could not be started; ``elsewhere`` it may."""

    token: int
    detail: str
    elsewhere: bool


Notice = Ended | Unstarted


class Launcher(Protocol):
    """Starts and ends workers. Notices come from ``receive``, to be called when ``fileno`` is readable."""

    def spawn(self, token: int, socket_fd: int, page_fd: int, surroundings: Surroundings) -> None:
        """Start a worker with these descriptors."""
        ...

    def kill(self, token: int) -> Notice | None:
        """End a worker and its process group at once. A notice follows, or is returned where none was started yet."""
        ...

    def fileno(self) -> int: ...

    def receive(self) -> list[Notice]: ...

    def close(self) -> None:
        """End what is left."""
        ...


def zygote_possible() -> bool:
    """Whether this system lets a process fork another and pass descriptors in packets (Linux)."""
    return hasattr(os, "fork") and hasattr(socket, "SOCK_SEQPACKET") and os.path.exists("/proc/self/task")


def python(entry: str, arguments: Sequence[object], path: Sequence[str]) -> list[str]:
    """Command of a fresh interpreter with our ``sys.path`` that calls ``entry`` (``module:function``).

    Not ``-m``: the module path has to be in place before anything is imported, and only then.
    """
    module, function = entry.split(":")
    code = (
        f"import sys; sys.path[:] = {list(path)!r}; from {module} import {function}; {function}(*{tuple(arguments)!r})"
    )
    return [sys.executable, "-u", "-c", code]


class Spawner:
    """Starts each worker as an interpreter of its own."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._waiters: dict[int, threading.Thread] = {}
        self._ended, self._notify = socket.socketpair()
        self._ended.setblocking(False)
        self._lock = threading.Lock()  # an id may be signalled only until it is reaped

    def spawn(self, token: int, socket_fd: int, page_fd: int, surroundings: Surroundings) -> None:
        process = subprocess.Popen(
            python("prefect_slo.runner.local.worker:main", (socket_fd, page_fd, os.getpid()), surroundings.path),
            pass_fds=(socket_fd, page_fd),
            env=surroundings.environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._processes[token] = process
        # A thread each: the one way to wait that every system has.
        waiter = threading.Thread(target=self._wait, args=(token, process), name="prefect-slo-wait", daemon=True)
        self._waiters[token] = waiter
        waiter.start()

    def kill(self, token: int) -> Notice | None:
        with self._lock:
            if (process := self._processes.get(token)) is not None and process.returncode is None:
                end(process.pid)
        return None

    def fileno(self) -> int:
        return self._ended.fileno()

    def receive(self) -> list[Notice]:
        notices: list[Notice] = []
        with contextlib.suppress(BlockingIOError):
            while data := self._ended.recv(16):
                for at in range(0, len(data), 8):
                    token = int.from_bytes(data[at : at + 8], "little")
                    self._waiters.pop(token).join()
                    notices.append(Ended(token, _wait_status(self._processes.pop(token).returncode)))
        return notices

    def close(self) -> None:
        for token in list(self._processes):
            self.kill(token)
        for waiter in self._waiters.values():
            waiter.join(_END_S)
        self._notify.close()
        self._ended.close()

    def _wait(self, token: int, process: subprocess.Popen[bytes]) -> None:
        if hasattr(os, "waitid"):
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        with self._lock:
            with contextlib.suppress(OSError):  # what it left behind in its group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with contextlib.suppress(OSError):  # closed meanwhile
            self._notify.send(token.to_bytes(8, "little"))


class Forker:
    """Asks a zygote for each worker.

    Args:
        modules: What the zygote imports first.
        control: Packet socket to it.
        process: Its process, a child of this one.

    Attributes:
        modules: The same.
        reason: Why it can't fork; empty when it can, ``None`` until it has said so.
        alive: Whether its process was there when last heard of.
    """

    def __init__(
        self, modules: tuple[str, ...], control: socket.socket, process: subprocess.Popen[bytes] | psutil.Process
    ) -> None:
        self.modules = modules
        self.reason: str | None = None
        self.alive = True
        self._waiting: list[tuple[int, int, int]] = []
        self._pids: dict[int, int] = {}
        self._control, self._process = control, process

    @classmethod
    def started(cls, modules: tuple[str, ...], surroundings: Surroundings) -> Self:
        """With a zygote that is an interpreter of its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                python(
                    "prefect_slo.runner.local.zygote:main", (theirs.fileno(), os.getpid(), modules), surroundings.path
                ),
                pass_fds=(theirs.fileno(),),
                env=surroundings.environ | thread_environment(1),  # a pool of native threads would not survive a fork
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return cls(modules, ours, process)

    @classmethod
    def forked(cls, modules: tuple[str, ...], forget: Callable[[], None]) -> Self | None:
        """With a zygote that is a fork of this process, where that is safe; see ``fork_here``."""
        from prefect_slo.runner.local.zygote import fork_here

        made = fork_here(modules, forget) if zygote_possible() else None
        return cls(modules, made[1], psutil.Process(made[0])) if made is not None else None

    def spawn(self, token: int, socket_fd: int, page_fd: int, surroundings: Surroundings) -> None:
        request = (token, os.dup(socket_fd), os.dup(page_fd))
        if self.reason is None:
            self._waiting.append(request)
        else:
            self._ask(request)

    def kill(self, token: int) -> Notice | None:
        for request in self._waiting:
            if request[0] == token:
                self._waiting.remove(request)
                _close(request)
                return Ended(token, signal.SIGKILL)
        with contextlib.suppress(OSError):  # it is gone, and its workers with it
            self._control.send(pickle.dumps(("kill", token)))
        return None

    def fileno(self) -> int:
        return self._control.fileno()

    def receive(self) -> list[Notice]:
        """Notices; once the zygote is gone, one for every worker it had."""
        try:
            data = self._control.recv(_LARGEST)
        except OSError:
            data = b""
        if not data:
            return self._gone()
        match pickle.loads(data):
            case ("ready", reason):
                self.reason = reason
                if reason:
                    return self._refuse()
                waiting, self._waiting = self._waiting, []
                for request in waiting:
                    self._ask(request)
            case ("born", token, pid):
                self._pids[token] = pid
            case ("unborn", token, detail):
                self._pids.pop(token, None)
                return [Unstarted(token, detail, elsewhere=False)]
            case ("exit", token, status):
                self._pids.pop(token, None)
                return [Ended(token, status)]
        return []

    def close(self) -> None:
        self._refuse()
        self._control.close()
        if self.reason is None:  # still importing: it has no workers yet, and would take its time to notice
            self._process.kill()
        try:
            self._process.wait(_END_S)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _ask(self, request: tuple[int, int, int]) -> None:
        token, socket_fd, page_fd = request
        self._pids[token] = 0
        with contextlib.suppress(OSError):  # it is gone: `receive` says so next
            socket.send_fds(self._control, [pickle.dumps(("spawn", token))], [socket_fd, page_fd])
        _close(request)

    def _gone(self) -> list[Notice]:
        self.reason = self.reason or "it ended"
        self.alive = False
        tokens, self._pids = list(self._pids), {}
        return [*self._refuse(), *(Ended(token, None) for token in tokens)]

    def _refuse(self) -> list[Notice]:
        """Answer the requests that it never got."""
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            _close(request)
        return [Unstarted(token, self.reason or "closed", elsewhere=True) for token, _, _ in waiting]


def _close(request: tuple[int, int, int]) -> None:
    for fd in request[1:]:
        os.close(fd)


def _wait_status(returncode: int) -> int:
    return -returncode if returncode < 0 else returncode << 8
