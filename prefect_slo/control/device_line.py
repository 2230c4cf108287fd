"""Who gets a share of a GPU next: in order of arrival, with bounded overtaking.

Strict order leaves devices idle behind a large request; letting whatever fits go first starves that request for ever.
Here a later request may go ahead of an earlier one that does not fit, but of each at most ``overtakes`` do. From then
on nobody behind it is served, what is held drains, and it goes next: if holders give back what they hold, everyone is
served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prefect_slo.placement import Device, Occupancy, Share

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
        occupancy: What is held.
        waiting: Who waits, in order of arrival.
    """

    devices: Sequence[Device]
    overtakes: int = OVERTAKES
    occupancy: Occupancy = field(init=False)
    waiting: list[Waiting] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.occupancy = Occupancy(self.devices)

    def serve(self, id_: int) -> tuple[int, ...] | None:
        """Give one that waits its share, if it is its turn and there is room; positions of its devices."""
        place = next((place for place, request in enumerate(self.waiting) if request.id == id_), None)
        if place is None or any(ahead.overtaken >= self.overtakes for ahead in self.waiting[:place]):
            return None
        at = self.occupancy.find(self.waiting[place].share)
        if at is None:
            return None
        for ahead in self.waiting[:place]:
            ahead.overtaken += 1
        self.occupancy.put(self.waiting.pop(place).share, at)
        return at
