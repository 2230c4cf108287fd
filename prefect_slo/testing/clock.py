"""A clock that stands still until it is told to go on."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from prefect_slo.errors import InvalidValue


class FakeClock:
    """Virtual time: what is to happen later happens when the clock is moved there, in order, at once.

    Args:
        now: Where it starts, in seconds.

    Example:
        >>> clock, rung = FakeClock(), []
        >>> clock.call_later(5, lambda: rung.append(clock.now))
        >>> clock.advance(10)
        >>> rung, clock.now
        ([5.0], 10.0)
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = float(now)
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    @property
    def now(self) -> float:
        """Seconds."""
        return self._now

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have something called once so much time has gone by; calls of one instant in the order of asking."""
        if not delay_s >= 0:
            raise InvalidValue("delay_s", delay_s, "0 or more: a clock doesn't go back")
        heapq.heappush(self._later, (self._now + delay_s, next(self._order), call))

    def advance(self, seconds: float) -> None:
        """Move on, and call what falls due on the way."""
        if not seconds >= 0:
            raise InvalidValue("seconds", seconds, "0 or more: a clock doesn't go back")
        until = self._now + seconds
        while self._later and self._later[0][0] <= until:
            self.step()
        self._now = until

    def step(self) -> bool:
        """Move on to the next thing that is due and call it; ``False`` where there is none."""
        if not self._later:
            return False
        self._now, _, call = heapq.heappop(self._later)
        call()
        return True
