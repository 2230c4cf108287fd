"""Where workers come from: a zygote that has imported what they need, else a bare one, else an interpreter each."""

from __future__ import annotations

import logging
import os
import socket
import time

from prefect_slo.runner.local.launch import Forker, Launcher, Notice, Spawner, StartMethod, zygote_possible
from prefect_slo.runner.local.line import Line
from prefect_slo.runner.local.member import Lease, Worker
from prefect_slo.runner.local.page import Page
from prefect_slo.runner.local.setup import Surroundings

logger = logging.getLogger(__name__)

_ZYGOTES = 3  # lost ones before workers are started one by one


class Nursery:
    """Starts workers, ends them, and says how they ended.

    Args:
        start: ``zygote``, ``spawn`` or ``auto``. A zygote that can't fork, as what it imported started threads, makes
            room for one that imports nothing; where there can be none, each worker is an interpreter of its own.
        preload: Modules that workers find imported.
        line: Where launchers are waited for.
        zygote: One that is there already, with these modules.
    """

    def __init__(self, start: StartMethod, preload: tuple[str, ...], line: Line, zygote: Forker | None = None) -> None:
        self._modules, self._line = preload, line
        self._zygotes_left = 0 if start == "spawn" or not zygote_possible() else _ZYGOTES
        self._forker = zygote
        if zygote is not None:
            line.add(zygote, zygote)
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

    def bear(self, token: int, lease: Lease, surroundings: Surroundings, cores: tuple[int, ...]) -> Worker:
        """A worker for a lease, started, with a socket and a page of its own.

        Raises:
            OSError: None could be started.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            page_fd = Page.allocate()
            worker = Worker(
                token, lease.size, ours, Page(page_fd), time.monotonic(), surroundings, cores,
                lease=lease, gpus=lease.gpus,
            )  # fmt: skip
            try:
                self.start(token, theirs.fileno(), page_fd, surroundings)
            finally:
                os.close(page_fd)
        lease.worker = worker
        return worker

    def kill(self, token: int) -> Notice | None:
        """End a worker and its process group; a notice follows, or is returned where none was started yet."""
        launcher = self._launchers.get(token)
        return launcher.kill(token) if launcher is not None else None

    def receive(self, launcher: Launcher) -> list[Notice]:
        """What a launcher has to say, now that it is readable."""
        notices = launcher.receive()
        for notice in notices:
            self._launchers.pop(notice.token, None)
        if isinstance(launcher, Forker) and (launcher.reason or not launcher.alive):
            self._replace(launcher)
        return notices

    def close(self) -> None:
        """End what is left, launchers included."""
        for launcher in (self._forker, self._spawner):
            if launcher is not None:
                self._line.remove(launcher)
                launcher.close()
        self._forker = self._spawner = None

    def _replace(self, forker: Forker) -> None:
        """A zygote ended or can't fork: the next one imports nothing, where that was why."""
        logger.info("Workers can't be forked from this zygote: %s.", forker.reason)
        self._line.remove(forker)
        forker.close()
        self._forker = None
        if forker.alive and forker.modules:
            self._modules = ()
        else:
            self._zygotes_left = 0 if forker.alive else self._zygotes_left - 1

    def _launcher(self, surroundings: Surroundings) -> Launcher:
        if self._zygotes_left:
            if self._forker is None:
                self._forker = Forker.started(self._modules, surroundings)
                self._line.add(self._forker, self._forker)
            return self._forker
        if self._spawner is None:
            self._spawner = Spawner()
            self._line.add(self._spawner, self._spawner)
        return self._spawner
