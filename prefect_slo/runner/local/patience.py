"""How long a pool waits for its share of the machine before it says so, and before it goes without one.

Whoever holds the machine may wait, in turn, for what this pool is to run: a task that waits for another flow run. That
can't be seen from here, so no wait is for ever. One lease goes without a share, and then patience begins anew.
"""

from __future__ import annotations

from typing import Literal

SAY_S = 10.0
"""A wait of this long is said."""


class Patience:
    """Of one pool, on any clock that doesn't go back.

    Args:
        patience_s: How long the first lease in line waits at most.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s, self._last, self._said = patience_s, 0.0, False

    def look(self, asked: float, now: float) -> Literal["wait", "say", "go"]:
        """What to do about the first lease in line, which has waited since ``asked``."""
        waited_s = now - max(asked, self._last)
        if waited_s >= self._patience_s:
            return "go"
        if waited_s >= min(SAY_S, self._patience_s / 2) and not self._said:
            self._said = True
            return "say"
        return "wait"

    def served(self, now: float) -> None:
        """The first lease in line has its share, or goes without."""
        self._last, self._said = now, False
