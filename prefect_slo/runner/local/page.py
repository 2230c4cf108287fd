"""A page of memory that a worker and its parent share: which item runs, and since when, even after SIGKILL."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import NamedTuple

_SERIAL, _STARTED, _ENDED, _INSTANT = range(4)


class Reading(NamedTuple):
    """What a page says.

    Attributes:
        started: Items of the bundle that were started.
        ended: Of these, how many ended.
        instant: When the last one was started (monotonic seconds).
    """

    started: int
    ended: int
    instant: float

    @property
    def running(self) -> bool:
        return self.started > self.ended


class Page:
    """Four aligned words, each written by one store, so that a reader never sees half of one."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, mmap.PAGESIZE)
        self._words = memoryview(self._map).cast("q")
        self._seconds = memoryview(self._map).cast("d")

    @staticmethod
    def allocate() -> int:
        """A file descriptor of a fresh page that no path leads to."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("prefect-slo-page")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, mmap.PAGESIZE)
        return fd

    def bundle(self, serial: int) -> None:
        """A bundle begins; none of its items is started."""
        words = self._words
        words[_STARTED] = words[_ENDED] = 0
        words[_SERIAL] = serial

    def start(self, index: int, instant: float) -> None:
        """Item ``index`` of the bundle starts."""
        self._seconds[_INSTANT] = instant
        self._words[_STARTED] = index + 1

    def end(self, index: int) -> None:
        """Item ``index`` of the bundle has ended."""
        self._words[_ENDED] = index + 1

    def read(self, serial: int) -> Reading:
        """Where bundle ``serial`` stands; nothing started while the page still speaks of an earlier one."""
        words = self._words
        if words[_SERIAL] != serial:
            return Reading(0, 0, 0.0)
        ended, started = words[_ENDED], words[_STARTED]
        instant = self._seconds[_INSTANT]
        if words[_STARTED] != started:  # it moved on meanwhile
            ended, started, instant = words[_ENDED], words[_STARTED], self._seconds[_INSTANT]
        return Reading(started, ended, instant)

    def close(self) -> None:
        self._words.release()
        self._seconds.release()
        self._map.close()
