"""Queues of schedulers that are others': which waiting there was for others' work, and which for a run's own.

From outside nobody sees whose work holds a cluster. But while some of a run's own bundles ran there, the next may have
waited for those: that is what the stage takes where there is no more room. While none did, others held it, unless it
was for so short a time that a bundle, with what it takes, may just have been on its way; or unless it then ran on a
worker that was not there before, which it has waited for: that is a start.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

HAND_OVER_S = 1.0
"""A bundle may take this long to get to its worker: 3-18 ms on Dask and Ray, 0.5 s where it is the first of a worker of
Ray's, which imports what runs it before anything can be told."""

SLOW_LINK = 50e6
"""Bytes per second at which its arguments get there at least, from this process or from worker to worker: half of what
a link of a gigabit carries, as it may be shared. A cluster's workers fetch them before they run anything."""


def way_s(weight: int) -> float:
    """How long the way to a worker may take for so many bytes."""
    return HAND_OVER_S + weight / SLOW_LINK


class Queue:
    """The queue of one pool, as the bundles of one run have seen it."""

    def __init__(self) -> None:
        self._ran: list[tuple[float, float]] = []
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._before: list[float] = []

    def ran(self, began: float, ended: float) -> None:
        """A bundle of the run ran there."""
        self._ran.append((began, ended))
        self._begins = []

    def waited_s(self, since: float, until: float, way_s: float = HAND_OVER_S) -> float:
        """Seconds of a wait in which no bundle of the run ran there; 0 for no more than the way may have taken."""
        if until <= since:
            return 0.0
        if not self._begins:
            self._merge()
        apart_s = (until - since) - (self._ran_s(until) - self._ran_s(since))
        return apart_s if apart_s > way_s else 0.0

    def _merge(self) -> None:
        """Spans in which any bundle ran, and how long some had run before each."""
        self._begins, self._ends = [], []
        for began, ended in sorted(self._ran):
            if self._ends and began <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], ended)
            else:
                self._begins.append(began)
                self._ends.append(ended)
        spans = zip(self._begins, self._ends, strict=True)
        self._before = list(accumulate((ended - began for began, ended in spans), initial=0.0))

    def _ran_s(self, at: float) -> float:
        """How long some bundle had run until an instant."""
        span = bisect_right(self._begins, at) - 1
        if span < 0:
            return 0.0
        return self._before[span] + min(at, self._ends[span]) - self._begins[span]
