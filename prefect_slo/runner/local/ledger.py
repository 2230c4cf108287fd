"""The machine's vCPUs, shared by everything of one user that runs on it: who holds which cores, who waits.

Entries of its book: granted claims are ``[id, pid, start, vcpus, cores]``, those that wait ``[id, pid, start]``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefect_slo.errors import InvalidValue
from prefect_slo.runner.local.book import Book, Entries, FileBook, MemoryBook, bury, identity, machine_book
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


class Ledger:
    """Grants shares of the machine, first come first served.

    Args:
        book: Where entries are kept; by default the user's file, or memory where that can't be written.
        cores: Cores that may be granted; by default those of this process.
        vcpus: How many of them at once; by default all, or the quota of the control group.
    """

    def __init__(
        self, book: Book | None = None, *, cores: Sequence[int] | None = None, vcpus: float | None = None
    ) -> None:
        self._book = default_book() if book is None else book
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
        with self._book.edit() as entries:
            claim = Claim(entries.next, vcpus)
            entries.next += 1
            if entries.queue or not self._grant(entries, claim):
                entries.queue.append([claim.id, *identity(os.getpid())])
                self._advance(entries, claim)
            return claim

    def retry(self, claim: Claim) -> bool:
        """Whether a claim that waited is granted now. Meant to be asked every 20 ms or so."""
        if not claim.granted:
            with self._book.edit() as entries:
                if all(waiting[0] != claim.id for waiting in entries.queue):  # the book was begun anew
                    entries.next = max(entries.next, claim.id + 1)
                    entries.queue.append([claim.id, *identity(os.getpid())])
                self._advance(entries, claim)
        return claim.granted

    def release(self, claim: Claim) -> None:
        """Give a share back, or stop waiting for it."""
        if not claim.id:
            return
        with self._book.edit() as entries:
            mine = [claim.id, *identity(os.getpid())]
            entries.held = [entry for entry in entries.held if entry[:3] != mine]
            entries.queue = [entry for entry in entries.queue if entry[:3] != mine]
        claim.cores, claim.granted = (), False

    def used(self) -> float:
        """vCPUs held now on the cores of this ledger, by processes that live."""
        with self._book.edit() as entries:
            bury(entries)
            return sum(self._loads(entries).values())

    def _advance(self, entries: Entries, claim: Claim) -> None:
        """Grant ``claim`` if it has come to the head of the queue and fits, once the dead are out of the way."""
        bury(entries)
        if entries.queue[0][0] == claim.id and self._grant(entries, claim):
            del entries.queue[0]

    def _grant(self, entries: Entries, claim: Claim) -> bool:
        loads = self._loads(entries)
        if sum(loads.values()) + claim.vcpus > self.capacity + _SLACK:
            return False
        claim.cores, claim.granted = place(loads, claim.vcpus), True
        entries.held.append([claim.id, *identity(os.getpid()), claim.vcpus, list(claim.cores)])
        return True

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
