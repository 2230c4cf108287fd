"""Programs of the machine that are asked for what they know, so that nobody waits for one that hangs.

A driver in trouble makes its own tools hang, at times beyond what a signal ends. So a program is asked in a thread of
its own, and what it says is believed for a while. One that says nothing in time is not asked again for longer and
longer: until then, what holds without an answer holds.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_S = 0.05
_REST_S, _LONGEST_REST_S = 60.0, 3600.0
"""One that hung is left alone for a minute, twice as long after each time more, and an hour at most."""


class Probe(Generic[T]):
    """What a program says.

    Args:
        name: Of the program, for the log.
        ask: Asks it; ``None`` where it fails.
        otherwise: What holds where it fails or hangs; never ``None``.
        meaning: That in words, for the log.
        timeout_s: An answer that takes longer is none, until it comes.
        keep_s: An answer is believed for this long.
        again_s: After a failure it is asked again.
        clock: Seconds that don't go back.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[[], T | None],
        otherwise: T,
        meaning: str,
        *,
        timeout_s: float,
        keep_s: float,
        again_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._ask, self._otherwise, self._meaning = name, ask, otherwise, meaning
        self._timeout_s, self._keep_s, self._again_s, self._clock = timeout_s, keep_s, again_s, clock
        self._changed = threading.Condition()
        self._known, self._until = otherwise, clock()
        self._asked: float | None = None  # since when, where nothing was heard yet
        self._hung = 0  # times in a row
        self._heard = 0  # answers so far

    def look(self) -> T | None:
        """What holds now, without waiting; ``None`` while it is being asked, unless it hung the last time."""
        with self._changed:
            now = self._clock()
            if now < self._until:
                return self._known
            if self._asked is None:
                self._asked = now
                threading.Thread(target=self._run, name=f"prefect-slo-probe-{self._name}", daemon=True).start()
            if now - self._asked >= self._timeout_s:
                self._rest(now)
            elif not self._hung:
                return None
            return self._otherwise

    def get(self) -> T:
        """What holds now; waits for an answer, no longer than ``timeout_s``."""
        heard = self._heard
        while self._heard == heard:
            if (known := self.look()) is not None:
                return known
            with self._changed:
                if self._heard == heard:
                    self._changed.wait(_LOOK_S)
        return self._known  # heard since then, however short it is believed

    def _run(self) -> None:
        answer, hung = None, False
        try:
            answer = self._ask()
        except TimeoutError:
            hung = True
        except Exception as error:
            logger.info("%s could not be asked: %r", self._name, error)
        with self._changed:
            now, self._asked = self._clock(), None
            if not hung:
                self._hung, self._heard = 0, self._heard + 1
                self._known = self._otherwise if answer is None else answer
                self._until = now + (self._again_s if answer is None else self._keep_s)
            elif now >= self._until:  # nobody has noticed yet
                self._rest(now)
            self._changed.notify_all()

    def _rest(self, now: float) -> None:
        """It hangs: do without for a while."""
        rest_s = min(_REST_S * 2.0**self._hung, _LONGEST_REST_S)
        self._hung, self._known, self._until = self._hung + 1, self._otherwise, now + rest_s
        logger.warning(
            "%s has not answered for %g s: %s. It is asked again in %g s.",
            self._name, self._timeout_s, self._meaning, rest_s,
        )  # fmt: skip


def output(command: Sequence[str], timeout_s: float, told: str = "") -> str | None:
    """What a program prints; ``None`` where there is none, or it fails.

    Raises:
        TimeoutError: It took too long, and was ended.
    """
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=timeout_s, check=True)
    except subprocess.TimeoutExpired:
        raise TimeoutError(command[0]) from None
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("%s said nothing: %s", command[0], error)
        return None
    return done.stdout
