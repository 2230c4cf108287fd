"""The zygote: one process that imports what workers need while it has a single thread, then forks workers on request.

Forking it is safe, as it is ours and has one thread; the user's process is never forked. It reaps its workers, ends
what they left behind in their process groups, and tells the parent how each ended. It ends them all with the parent.

Requests are ``("spawn", token)`` with two descriptors (socket, page) and ``("kill", token)``. Answers are
``("ready", reason)`` (an empty reason: it can fork), ``("born", token, pid)`` and ``("exit", token, status)`` with a
wait status.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes  # noqa: F401  # loaded here once, for all workers
import gc
import os
import pickle
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from prefect_slo.runner.local import worker
from prefect_slo.runner.local.limits import thread_environment
from prefect_slo.runner.local.setup import die_with, end, preload

_LARGEST = 64 * 1024


def main(control_fd: int, parent: int, modules: tuple[str, ...]) -> None:
    """Serve ``parent`` until it closes the control socket or ends."""
    os.set_inheritable(control_fd, False)
    zygote = Zygote(socket.socket(fileno=control_fd), parent)
    preload(modules)
    zygote.serve()


def fork_here(modules: tuple[str, ...], forget: Callable[[], None]) -> tuple[int, socket.socket] | None:
    """Fork this process into a zygote of its own; its id and our end of its control socket.

    What this process has imported the zygote has, too: it is there in milliseconds, where one that is an interpreter of
    its own takes a second. ``None`` where the fork would not be safe: outside the main thread, or beside other threads.

    Args:
        modules: What the zygote imports beside that.
        forget: Called in it first: lets go of what only this process may use.
    """
    if threading.current_thread() is not threading.main_thread() or unsafe_to_fork():
        return None
    parent = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        ours.close()
        _serve_from_here(theirs, parent, modules, forget)
    theirs.close()
    return pid, ours


class Zygote:
    """Forks, watches and reaps workers.

    Args:
        control: Packet socket to the parent.
        parent: Its process id.
    """

    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control, self._parent = control, parent
        self._tokens: dict[int, int] = {}  # pid -> token of every worker that isn't reaped
        self._own_fds: list[int] = []  # that workers have no use for

    def serve(self) -> None:
        reason = unsafe_to_fork()
        gc.collect()
        gc.freeze()  # the collector would write to, and so copy, every page that workers share
        wake, children = os.pipe()
        self._own_fds += [wake, children]
        for fd in self._own_fds:
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(children, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(wake, select.POLLIN)
        # The parent's children may hold its end of the socket, which then outlives it; its process can't be held.
        with contextlib.suppress(OSError, AttributeError):
            self._own_fds.append(os.pidfd_open(self._parent))
            poll.register(self._own_fds[-1], select.POLLIN)
        self._answer("ready", reason)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
            self._reap()
            if self._control.fileno() in ready:
                if not self._request():
                    break
            elif ready - {wake}:
                break
        for pid in self._tokens:
            end(pid)

    def _request(self) -> bool:
        """Obey one request; ``False`` at the end of the stream."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, _LARGEST, 2)
        except OSError:
            return False
        if not data:
            return False
        match pickle.loads(data):
            case ("spawn", token):
                self._fork(token, *fds)
            case ("kill", token):
                for pid, known in self._tokens.items():
                    if known == token:
                        end(pid)
        return True

    def _fork(self, token: int, socket_fd: int, page_fd: int) -> None:
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            pid = -1
            self._answer("unborn", token, str(error))
        if pid:
            os.close(socket_fd)
            os.close(page_fd)
            if pid > 0:
                self._tokens[pid] = token
                self._answer("born", token, pid)
            return
        die_with(zygote)
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._control.close()
        for fd in self._own_fds:
            os.close(fd)
        worker.main(socket_fd, page_fd, zygote)
        raise SystemExit(0)

    def _reap(self) -> None:
        """Reap what has ended; a group is ended while its leader's id is still taken."""
        while self._tokens and (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            end(ended.si_pid)
            _, status = os.waitpid(ended.si_pid, 0)
            if (token := self._tokens.pop(ended.si_pid, None)) is not None:
                self._answer("exit", token, status)

    def _answer(self, *message: object) -> None:
        with contextlib.suppress(OSError):  # the parent is gone: the next poll says so
            self._control.send(pickle.dumps(message))


def _serve_from_here(
    control: socket.socket, parent: int, modules: tuple[str, ...], forget: Callable[[], None]
) -> NoReturn:
    """Be a zygote, and end without going back: what this was called from is the parent's stack."""
    code: object = 1
    try:
        os.setsid()
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.environ.update(thread_environment(1))  # a pool of native threads would not survive the next fork
        forget()
        preload(modules)
        Zygote(control, parent).serve()
        code = 0
    except SystemExit as ended:  # of a worker that has said goodbye
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    try:  # exit handlers of what ran here, as multiprocessing does it
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def unsafe_to_fork() -> str:
    """Why this process must not be forked; empty when it may."""
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        return f"a preloaded module started threads: {names}"
    if (native := len(os.listdir("/proc/self/task"))) > 1:
        return f"a preloaded module started {native - 1} native threads"
    return ""
