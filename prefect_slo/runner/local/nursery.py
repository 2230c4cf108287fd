"""Where workers come from: the zygote while there is one to be had, else an interpreter each."""

from __future__ import annotations

import logging
import os
import socket

from prefect_slo.runner.local.launch import Ended, Forker, Launcher, Notice, Spawner, StartMethod, Unstarted
from prefect_slo.runner.local.line import Line
from prefect_slo.runner.local.setup import Surroundings

logger = logging.getLogger(__name__)

_ZYGOTES = 3  # lost ones before workers are started one by one


class Nursery:
    """Starts workers, ends them, and says how they ended.

    Args:
        start: ``zygote``, ``spawn`` or ``auto``; the zygote falls back to spawning where it can't fork.
        preload: Modules that workers find imported.
        line: Where launchers are waited for.
    """

    def __init__(self, start: StartMethod, preload: tuple[str, ...], line: Line) -> None:
        self._preload, self._line = preload, line
        self._zygotes_left = 0 if start == "spawn" or not zygote_possible() else _ZYGOTES
        self._forker: Forker | None = None
        self._spawner: Spawner | None = None
        self._launchers: dict[int, Launcher] = {}

    def start(self, token: int, socket_fd: int, page_fd: int, surroundings: Surroundings) -> None:
        """Start a worker with these descriptors.

        Raises:
            OSError: No process could be started.
        """
        launcher = self._launcher(surroundings)
        launcher.spawn(token, socket_fd, page_fd, surroundings)
        self._launchers[token] = launcher

    def kill(self, token: int) -> Notice | None:
        """End a worker and its process group; a notice follows, or is returned where none was started yet."""
        launcher = self._launchers.get(token)
        return launcher.kill(token) if launcher is not None else None

    def receive(self, launcher: Launcher) -> list[Notice]:
        """What a launcher has to say, now that it is readable."""
        notices = launcher.receive()
        for notice in notices:
            self._launchers.pop(notice.token, None)
            if isinstance(notice, Unstarted):
                logger.info("Workers can't be forked from a zygote (%s); each starts by itself.", notice.detail)
                self._zygotes_left = 0
        if isinstance(launcher, Forker) and not launcher.alive:
            self._line.remove(launcher)
            launcher.close()
            self._forker = None
            self._zygotes_left = max(0, self._zygotes_left - 1)
        return notices

    def close(self) -> None:
        """End what is left, launchers included."""
        for launcher in (self._forker, self._spawner):
            if launcher is not None:
                self._line.remove(launcher)
                launcher.close()
        self._forker = self._spawner = None

    def _launcher(self, surroundings: Surroundings) -> Launcher:
        if self._zygotes_left:
            if self._forker is None:
                self._forker = Forker(self._preload, surroundings)
                self._line.add(self._forker, self._forker)
            return self._forker
        if self._spawner is None:
            self._spawner = Spawner()
            self._line.add(self._spawner, self._spawner)
        return self._spawner


def zygote_possible() -> bool:
    """Whether this system lets a process fork another and pass descriptors in packets (Linux)."""
    return hasattr(os, "fork") and hasattr(socket, "SOCK_SEQPACKET") and os.path.exists("/proc/self/task")


__all__ = ["Ended", "Notice", "Nursery", "Unstarted", "zygote_possible"]
