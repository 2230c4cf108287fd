"""Who gets a share of a GPU next: in order of arrival, with bounded overtaking.

Strict order leaves devices idle behind a large request; letting whatever fits go first starves that request for ever.
Here a later request may go ahead of an earlier one that does not fit, but of each at most ``overtakes`` do. From then
on nobody behind it is served, what is held drains, and it goes next: if holders give back what they hold, everyone is
served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prefect_slo.errors import InvalidValue
from prefect_slo.placement import Device, Fit, Occupancy, Share, check

OVERTAKES = 16
"""Later requests that may go ahead of one that waits."""


@dataclass
class Waiting:
    """A request that waits.

    Attributes:
        id: Whose it is.
        share: What it asks for.
        overtaken: How many that came later were served before it.
    """

    id: int
    share: Share
    overtaken: int = 0


@dataclass
class DeviceLine:
    """Requests for shares of some devices, and what is held on them.

    Attributes:
        devices: The devices.
        overtakes: How often one that waits may be overtaken.
        fit: Which device a share goes on, of those that it fits.
        occupancy: What is held.
        waiting: Who waits, in order of arrival.
    """

    devices: Sequence[Device]
    overtakes: int = OVERTAKES
    fit: Fit = "best"
    occupancy: Occupancy = field(init=False)
    waiting: list[Waiting] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.occupancy = Occupancy(self.devices)

    def ask(self, id_: int, share: Share) -> None:
        """Get in line.

        Raises:
            GpuShareTooLarge: The devices could never hold it.
            InvalidValue: It waits or holds something already.
        """
        check(share, self.devices)
        if id_ in self.occupancy.held or any(other.id == id_ for other in self.waiting):
            raise InvalidValue("request", id_, "one that neither waits nor holds a share")
        self.waiting.append(Waiting(id_, share))

    def leave(self, id_: int) -> None:
        """Give a share back, or stop waiting for it."""
        self.occupancy.take(id_)
        self.waiting = [other for other in self.waiting if other.id != id_]

    def serve(self, id_: int) -> tuple[int, ...] | None:
        """Give one that waits its share, if it is its turn and there is room; positions of its devices."""
        ahead: list[Waiting] = []
        for request in self.waiting:
            if request.id == id_:
                break
            ahead.append(request)
        else:
            return None
        if any(other.overtaken >= self.overtakes for other in ahead):
            return None
        at = self.occupancy.find(request.share, self.fit)
        if at is None:
            return None
        for other in ahead:
            other.overtaken += 1
        self.waiting.remove(request)
        self.occupancy.put(id_, request.share, at)
        return at

    def advance(self) -> list[tuple[int, tuple[int, ...]]]:
        """Serve everyone whose turn it is, in order; their ids and the positions of their devices."""
        served = []
        for request in tuple(self.waiting):
            at = self.serve(request.id)
            if at is not None:
                served.append((request.id, at))
            elif request.overtaken >= self.overtakes:
                break
        return served
