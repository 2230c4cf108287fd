"""One thread that looks at whatever is at work: dozens of waiting threads that each look would take a core."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

WATCH_S = 0.02


class Watch:
    """Calls functions every 20 ms for as long as they are wanted; its thread is there while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looks: dict[object, Callable[[], None]] = {}
        self._running = False

    def begin(self, key: object, look: Callable[[], None]) -> None:
        """From now on ``look`` is called; it must be quick and never raise."""
        with self._lock:
            self._looks[key] = look
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="prefect-slo-watch", daemon=True).start()

    def end(self, key: object) -> None:
        """No longer; a call that is under way may still end."""
        with self._lock:
            self._looks.pop(key, None)

    def _run(self) -> None:
        while True:
            time.sleep(WATCH_S)
            with self._lock:
                looks = list(self._looks.values())
                if not looks:
                    self._running = False
                    return
            for look in looks:
                look()
