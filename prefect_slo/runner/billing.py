"""How time on this machine is billed."""

from __future__ import annotations


class Meter:
    """Time as it is billed: slower while more is reserved than the machine has, as n threads on fewer cores do.

    With ``r(t)`` vCPUs reserved of a machine of ``m``, a lease from ``a`` to ``b`` is billed ``∫ min(1, m / r(t)) dt``.
    """

    def __init__(self, vcpus: float) -> None:
        self._vcpus, self._reserved, self._billed_s, self._at = vcpus, 0.0, 0.0, 0.0

    def begin(self, vcpus: float, now: float) -> float:
        """A lease of so many vCPUs begins; returns the billed time so far."""
        billed_s = self._advance(now)
        self._reserved += vcpus
        return billed_s

    def end(self, vcpus: float, now: float) -> float:
        """It ends; returns the billed time so far."""
        billed_s = self._advance(now)
        self._reserved -= vcpus
        return billed_s

    def _advance(self, now: float) -> float:
        passed_s, self._at = max(now - self._at, 0.0), max(now, self._at)
        self._billed_s += passed_s * min(1.0, self._vcpus / max(self._reserved, self._vcpus))
        return self._billed_s
