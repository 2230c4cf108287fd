"""Whether a pilot is worth starting, or one that runs gets free before it would be up."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable

KEPT = 32
"""Newest starts and holds that count: what a pool is like changes over the day."""


class Starts:
    """How long pilots have taken to start, and leases of each stage have held them; what to expect of the next ones."""

    def __init__(self) -> None:
        self._starts_s: deque[float] = deque(maxlen=KEPT)
        self._holds_s: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))

    def started(self, took_s: float) -> None:
        """A pilot took so long to start."""
        self._starts_s.append(took_s)

    def held(self, stage: str, seconds: float) -> None:
        """A lease of a stage has held a pilot that was up for so long."""
        self._holds_s[stage].append(seconds)

    @property
    def start_s(self) -> float:
        """The median of starts; ``nan`` before the first."""
        return statistics.median(self._starts_s) if self._starts_s else math.nan

    def left_s(self, stage: str, age_s: float) -> float:
        """How long a lease of a stage that has held its pilot for ``age_s`` is expected to hold it still.

        The mean residual life of the stage's past holds, ``E[H − a | H > a]``; infinite where none was as long.
        """
        longer = [hold - age_s for hold in self._holds_s.get(stage, ()) if hold > age_s]
        return statistics.fmean(longer) if longer else math.inf

    def worth_it(self, waited_s: float, held: Iterable[tuple[str, float]], ahead: int = 0) -> bool:
        """Whether starting a pilot is worth it for a lease that waits.

        It is unless a pilot that runs is expected back before a new one would be up. However that comes out, a lease
        waits no longer for it than a start takes: at most twice what one would wait who knew the future.

        Args:
            waited_s: How long it has done without a start already.
            held: By which stage each pilot that could serve it is held, and for how long so far.
            ahead: How many leases wait for such a pilot before it.
        """
        if not waited_s < self.start_s:  # nan: nothing was measured
            return True
        back_s = sorted(self.left_s(stage, age_s) for stage, age_s in held)
        return ahead >= len(back_s) or not back_s[ahead] < self.start_s
