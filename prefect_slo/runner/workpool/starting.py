"""Whether a pilot is worth starting, or one that runs gets free before it would be up."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

KEPT = 32
"""Newest starts and holds that count: what a pool is like changes over the day."""


class Starts:
    """How long pilots have taken to start, and how long leases have held them; what to expect of the next ones."""

    def __init__(self) -> None:
        self._starts_s: deque[float] = deque(maxlen=KEPT)
        self._holds_s: deque[float] = deque(maxlen=KEPT)

    def started(self, took_s: float) -> None:
        """A pilot took so long to start."""
        self._starts_s.append(took_s)

    def held(self, seconds: float) -> None:
        """A lease has held a pilot that was up for so long."""
        self._holds_s.append(seconds)

    @property
    def start_s(self) -> float:
        """The median of starts; ``nan`` before the first."""
        return statistics.median(self._starts_s) if self._starts_s else math.nan

    def left_s(self, age_s: float) -> float:
        """How long a lease that has held its pilot for ``age_s`` is expected to hold it still.

        The mean residual life of past holds, ``E[H − a | H > a]``; infinite where none was as long.
        """
        longer = [hold - age_s for hold in self._holds_s if hold > age_s]
        return statistics.fmean(longer) if longer else math.inf

    def worth_it(self, waited_s: float, ages_s: Iterable[float], ahead: int = 0) -> bool:
        """Whether starting a pilot is worth it for a lease that waits.

        It is unless a pilot that runs is expected back before a new one would be up. However that comes out, a lease
        waits no longer for it than a start takes: at most twice what one would wait who knew the future.

        Args:
            waited_s: How long it has waited already.
            ages_s: For how long each pilot that could serve it has been held so far.
            ahead: How many leases wait for such a pilot before it.
        """
        if not waited_s < self.start_s:  # nan: nothing was measured
            return True
        back_s = sorted(self.left_s(age_s) for age_s in ages_s)
        return ahead >= len(back_s) or not back_s[ahead] < self.start_s
