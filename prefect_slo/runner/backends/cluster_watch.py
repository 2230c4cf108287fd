"""Looks whether a cluster has workers, while bundles wait for one, and which there were when one was dispatched."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from prefect_slo.runner.notices import Notice

PATIENCE_S, LOOK_S = 60.0, 10.0
"""How long bundles wait on a cluster without workers before the user hears of it, and between two looks at that."""

FRESH_S = 1.0
"""Which workers there are is asked for again after this long: what starts takes longer."""


class Watch:
    """What one flow run knows of a cluster's workers; for the one thread that makes the calls of its client.

    Args:
        vacant: In words that the cluster has no worker; empty where it has one.
        workers: Names of the workers, each for as long as that one lives.
        notice: Tells the user something.
        patience_s: How long bundles wait without workers before the user hears of it.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        vacant: Callable[[], str],
        workers: Callable[[], frozenset[str]],
        notice: Notice,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vacant, self._workers, self._notice, self._patience_s, self._clock = (
            vacant, workers, notice, patience_s, clock,
        )  # fmt: skip
        self._every_s = min(LOOK_S, patience_s)
        self._next = clock() + self._every_s
        self._vacant_since: float | None = None
        self._known: tuple[float, frozenset[str] | None] = (float("-inf"), None)

    def due_s(self) -> float:
        """Seconds until the next look; not above 0 where it is due."""
        return self._next - self._clock()

    def look(self, waiting: int) -> None:
        """Say so, once for each time, where bundles have waited long for a cluster that has no worker.

        Args:
            waiting: Bundles under way.
        """
        try:
            lack = self._vacant() if waiting else ""
        finally:
            now = self._clock()
            self._next = now + self._every_s
        if not lack:
            self._vacant_since = None
        elif self._vacant_since is None:
            self._vacant_since = now
        elif now - self._vacant_since >= self._patience_s:
            self._vacant_since = float("inf")
            self._notice(f"{lack}. Bundles that wait: {waiting}.")

    def there(self) -> frozenset[str] | None:
        """The workers that there are, as of a moment ago; ``None`` where the cluster can't be asked."""
        now = self._clock()
        if now - self._known[0] >= FRESH_S:
            found: frozenset[str] | None = None
            with suppress(Exception):
                found = self._workers()
            self._known = now, found
        return self._known[1]
