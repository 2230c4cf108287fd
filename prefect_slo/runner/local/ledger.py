"""The machine's vCPUs, shared by everything of one user that runs on it: who holds which cores, who waits.

Entries of its book: granted claims are ``[id, pid, start, vcpus, cores]``, those that wait ``[id, pid, start]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefect_slo.errors import InvalidValue
from prefect_slo.runner.local.account import Account
from prefect_slo.runner.local.book import Book, Entries, FileBook, MemoryBook, bury, machine_book
from prefect_slo.runner.local.limits import machine_vcpus, own_cores
from prefect_slo.units import positive

__all__ = ["Claim", "FileBook", "Ledger", "MemoryBook", "default_book", "place"]

_SLACK = 1e-9


@dataclass
class Claim:
    """A share of the machine, granted or waited for.

    Attributes:
        id: Its number in the book; from 1.
        vcpus: How much.
        cores: Cores granted; empty while it waits.
        granted: Whether it is.
    """

    id: int
    vcpus: float
    cores: tuple[int, ...] = ()
    granted: bool = False

    @classmethod
    def unaccounted(cls, vcpus: float) -> Claim:
        """A share that no book knows of."""
        return cls(0, vcpus, granted=True)


class Ledger(Account[Claim]):
    """Grants shares of the machine, first come first served.

    Args:
        book: Where entries are kept; by default the user's file, or memory where that can't be written.
        cores: Cores that may be granted; by default those of this process.
        vcpus: How many of them at once; by default all, or the quota of the control group.
    """

    def __init__(
        self, book: Book | None = None, *, cores: Sequence[int] | None = None, vcpus: float | None = None
    ) -> None:
        super().__init__(default_book() if book is None else book)
        self._cores = tuple(own_cores() if cores is None else cores)
        if not self._cores:
            raise InvalidValue("ledger.cores", self._cores, "at least one core")
        limit = machine_vcpus() if vcpus is None else positive(vcpus, "ledger.vcpus")
        self.capacity = min(limit, float(len(self._cores)))

    def claim(self, vcpus: float) -> Claim:
        """Ask for ``vcpus``: granted at once when nobody waits and they are free, else queued.

        Raises:
            InvalidValue: More than the machine has, so that waiting would never end.
        """
        if positive(vcpus, "vcpus") > self.capacity + _SLACK:
            raise InvalidValue("vcpus", vcpus, f"at most {self.capacity:g}, which is what this machine offers")
        return self._claimed(Claim(0, vcpus))

    def used(self) -> float:
        """vCPUs held now on the cores of this ledger, by processes that live."""
        with self._book.edit() as entries:
            bury(entries)
            return sum(self._loads(entries).values())

    def _asked(self, claim: Claim) -> list[Any]:
        return []

    def _grant(self, entries: Entries, claim: Claim) -> list[Any] | None:
        if entries.queue[0][0] != claim.id:
            return None
        loads = self._loads(entries)
        if sum(loads.values()) + claim.vcpus > self.capacity + _SLACK:
            return None
        claim.cores, claim.granted = place(loads, claim.vcpus), True
        return [claim.vcpus, list(claim.cores)]

    def _returned(self, claim: Claim) -> None:
        if claim.id:
            claim.cores, claim.granted = (), False

    def _loads(self, entries: Entries) -> dict[int, float]:
        loads = dict.fromkeys(self._cores, 0.0)
        for _, _, _, vcpus, cores in entries.held:
            for index, core in enumerate(cores):
                if core in loads:
                    loads[core] += min(1.0, vcpus - index)
        return loads


def place(loads: Mapping[int, float], vcpus: float) -> tuple[int, ...]:
    """⌈vcpus⌉ cores for a claim: whole vCPUs on the emptiest cores, a fraction on the fullest core that still takes it.

    Args:
        loads: vCPUs held on each core already.
        vcpus: How much to place.
    """
    whole = math.floor(vcpus + _SLACK)
    fraction = vcpus - whole
    by_load = sorted(loads, key=lambda core: (loads[core], core))
    cores, rest = by_load[:whole], by_load[whole:]
    if fraction > _SLACK:
        fitting = [core for core in rest if loads[core] + fraction <= 1 + _SLACK]
        cores.append(max(fitting, key=lambda core: (loads[core], -core)) if fitting else rest[0])
    return tuple(cores)


def default_book() -> Book:
    """The user's book of this machine; the book of this process where no file can be written."""
    return machine_book("vcpus")
