"""The machine's GPUs, shared by everything of one user that runs on it: who holds what share of which, who waits.

Entries of its book: granted claims are ``[id, pid, start, gpu, memory_mb, devices]``, those that wait ``[id, pid,
start, gpu, memory_mb, devices, overtaken]`` with the devices that they may go on. Work of other users and programs that
ask nobody are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect_slo.control.device_line import OVERTAKES, DeviceLine, Waiting
from prefect_slo.placement import Device, Share, check
from prefect_slo.runner.local.account import Account
from prefect_slo.runner.local.book import Book, Entries, bury, machine_book


@dataclass
class GpuClaim:
    """A share, granted or waited for.

    Attributes:
        id: Its number in the book; from 1.
        share: How much.
        devices: Devices granted; empty while it waits.
    """

    id: int
    share: Share
    devices: tuple[Device, ...] = ()

    @property
    def granted(self) -> bool:
        return bool(self.devices)


class GpuLedger(Account[GpuClaim]):
    """Grants shares of devices, in order of arrival with bounded overtaking.

    Args:
        devices: What may be granted.
        book: Where entries are kept; by default the user's file, or memory where that can't be written.
        overtakes: How often a claim that waits may be overtaken.
    """

    def __init__(self, devices: Sequence[Device], book: Book | None = None, *, overtakes: int = OVERTAKES) -> None:
        super().__init__(machine_book("gpus") if book is None else book)
        self.devices = tuple(devices)
        self._overtakes = overtakes
        self._position = {device.name: at for at, device in enumerate(self.devices)}

    def claim(self, share: Share) -> GpuClaim:
        """Ask for a share: granted at once when it is this claim's turn and there is room, else queued.

        Raises:
            GpuShareTooLarge: The devices could never hold it, so that waiting would never end.
        """
        check(share, self.devices)
        return self._claimed(GpuClaim(0, share))

    def used(self) -> dict[str, tuple[float, float]]:
        """By device, the share of its cores and the MB of its memory that are held, by processes that live."""
        with self._book.edit() as entries:
            bury(entries)
            occupancy = self._line(entries).occupancy
            return {device.name: occupancy.used(at) for at, device in enumerate(self.devices)}

    def _asked(self, claim: GpuClaim) -> list[Any]:
        return [claim.share.gpu, claim.share.memory_mb, [device.name for device in self.devices], 0]

    def _grant(self, entries: Entries, claim: GpuClaim) -> list[Any] | None:
        line = self._line(entries)
        at = line.serve(claim.id)
        if at is None:
            return None
        claim.devices = tuple(self.devices[position] for position in at)
        overtaken = {request.id: request.overtaken for request in line.waiting}
        entries.queue = [[*e[:6], overtaken.get(e[0], e[6])] for e in entries.queue]
        return [claim.share.gpu, claim.share.memory_mb, [device.name for device in claim.devices]]

    def _returned(self, claim: GpuClaim) -> None:
        claim.devices = ()

    def _line(self, entries: Entries) -> DeviceLine:
        """What concerns the devices of this ledger: another process may use others of the machine."""
        line = DeviceLine(self.devices, self._overtakes)
        for _, _, _, gpu, memory_mb, names in entries.held:
            at = tuple(self._position[name] for name in names if name in self._position)
            line.occupancy.put(Share(gpu, memory_mb), at)
        line.waiting = [
            Waiting(id_, Share(gpu, memory_mb), overtaken)
            for id_, _, _, gpu, memory_mb, names, overtaken in entries.queue
            if not self._position.keys().isdisjoint(names)
        ]
        return line
