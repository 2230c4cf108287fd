"""Accounts of what this machine has: claims on it are granted or wait, and are kept in a book that its processes share.

An account says how much there is and who is next; this says how a claim gets in line, is asked for again, and is given
back. Whoever holds or awaits anything is written down as ``[id, process id, start time]``, with what the account adds.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

from prefect_slo.runner.local.book import Book, Entries, bury, identity


class Numbered(Protocol):
    """A claim.

    Attributes:
        id: Its number in the book, from 1; 0 for one that no book knows of.
    """

    id: int

    @property
    def granted(self) -> bool:
        """Whether it is; else it waits."""
        ...


ClaimT = TypeVar("ClaimT", bound=Numbered)


class Account(ABC, Generic[ClaimT]):
    """Grants claims in the order that it says.

    Args:
        book: Where entries are kept.
    """

    def __init__(self, book: Book) -> None:
        self._book = book

    def retry(self, claim: ClaimT) -> bool:
        """Whether a claim that waited is granted now. Meant to be asked every 20 ms or so."""
        if not claim.granted:
            with self._book.edit() as entries:
                if all(waiting[:3] != _mine(claim) for waiting in entries.queue):  # the book was begun anew
                    entries.next = max(entries.next, claim.id + 1)
                    self._queue(entries, claim)
                self._advance(entries, claim)
        return claim.granted

    def release(self, claim: ClaimT) -> None:
        """Give a share back, or stop waiting for it. Harmless where that was done before."""
        if claim.id:
            with self._book.edit() as entries:
                mine = _mine(claim)
                entries.held = [entry for entry in entries.held if entry[:3] != mine]
                entries.queue = [entry for entry in entries.queue if entry[:3] != mine]
        self._returned(claim)

    def _claimed(self, claim: ClaimT) -> ClaimT:
        """A new claim with its number: granted at once when it is its turn and there is room, else queued."""
        with self._book.edit() as entries:
            claim.id, entries.next = entries.next, entries.next + 1
            self._queue(entries, claim)
            self._advance(entries, claim)
        return claim

    def _queue(self, entries: Entries, claim: ClaimT) -> None:
        entries.queue.append([*_mine(claim), *self._asked(claim)])

    def _advance(self, entries: Entries, claim: ClaimT) -> None:
        """Grant a claim that waits, if it may be, once the dead are out of the way."""
        bury(entries)
        held = self._grant(entries, claim)
        if held is not None:
            mine = _mine(claim)
            entries.queue = [entry for entry in entries.queue if entry[:3] != mine]
            entries.held.append([*mine, *held])

    @abstractmethod
    def _asked(self, claim: ClaimT) -> list[Any]:
        """What is written down of a claim that waits."""

    @abstractmethod
    def _grant(self, entries: Entries, claim: ClaimT) -> list[Any] | None:
        """Grant a claim if it is its turn and there is room: what is written down of that; ``None`` where it waits."""

    @abstractmethod
    def _returned(self, claim: ClaimT) -> None:
        """A claim is not granted any more."""


def _mine(claim: Numbered) -> list[Any]:
    return [claim.id, *identity(os.getpid())]
