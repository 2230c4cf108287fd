"""Whether shares of GPUs find their places, whichever stages run at the same time.

A share must fit one device by itself, which no sum over devices shows: the workers of every set of stages that can all
overlap are placed by first-fit-decreasing. Where such sets are too many to be listed, two bounds that hold for all of
them decide, and what neither of them admits is refused. With *m* devices, each share counted by the larger of its two
parts of a device, and a total *W* of the heaviest such set (``overlap.heaviest``), everything finds its place

- where ``W ≤ m`` with every share rounded up to a half, a quarter, an eighth, …: such shares fill devices without gaps;
- where ``W ≤ m − (m − 1)·a`` and no share is larger than *a* < 1: first-fit leaves no more than *a* of a device unused
  where it finds no room (Johnson, Demers, Ullman, Garey and Graham 1974).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from prefect_slo.placement import Device, Share, devices_needed, most_at_once
from prefect_slo.planner.overlap import Order, antichains, heaviest
from prefect_slo.resources import Capacity, Option

_SLACK = 1e-9


@dataclass(eq=False)
class Placing:
    """Shares of GPUs that stages may be given, and the devices that they must go on.

    Attributes:
        order: Which stages can't overlap.
        capacity: What has the devices.
        options: By stage, its options.
        alone: By stage, which options' workers could be placed if no other stage held anything.
    """

    order: Order
    capacity: Capacity
    options: tuple[tuple[Option, ...], ...]
    alone: tuple[NDArray[np.bool_], ...]
    _listed: dict[frozenset[int], list[tuple[int, ...]] | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, order: Order, capacity: Capacity, options: Sequence[Sequence[Option]]) -> Placing | None:
        """That of stages with these options; ``None`` where none takes of a device that is named."""
        if all(capacity.devices_of(option) is None for stage in options for option in stage):
            return None
        alone = tuple(np.array([_placeable(capacity, option) for option in stage]) for stage in options)
        return cls(order, capacity, tuple(map(tuple, options)), alone)

    def restricted(self, kept: Sequence[NDArray[np.intp]]) -> Placing:
        """The same for some of every stage's options, by position."""
        options = tuple(tuple(own[o] for o in index) for own, index in zip(self.options, kept, strict=True))
        return replace(self, options=options, alone=tuple(own[k] for own, k in zip(self.alone, kept, strict=True)))

    def easier(self, at: int) -> NDArray[np.bool_]:
        """``[a, b]``: whether option *a* of a stage can be placed wherever *b* can."""
        own = self.options[at]
        return np.array([[_as_placeable(self.capacity, a, b) for b in own] for a in own])

    def admits(self, choice: Sequence[int]) -> bool:
        """Whether a complete choice finds its places, whatever overlaps."""
        chosen = [self.options[i][o] for i, o in enumerate(choice)]
        held = frozenset(i for i, option in enumerate(chosen) if self.capacity.devices_of(option) is not None)
        sets = self._sets(held) if held else []
        if sets is not None:
            return all(self.capacity.places(*(chosen[i] for i in members)) for members in sets)
        by_pool: defaultdict[str | None, list[int]] = defaultdict(list)
        for i in sorted(held):
            by_pool[chosen[i].pool if chosen[i].pool in self.capacity.pools else None].append(i)
        return all(
            surely_fit(
                [chosen[i] for i in members],
                _among(members, self.order),
                self.capacity.devices_of(chosen[members[0]]) or (),
            )
            for members in by_pool.values()
        )

    def _sets(self, held: frozenset[int]) -> list[tuple[int, ...]] | None:
        """Sets of the stages that hold GPUs which can overlap, every largest one among them; ``None``: too many."""
        if held not in self._listed:
            found, complete = antichains(held, self.order)
            self._listed[held] = found if complete else None
        return self._listed[held]


def surely_fit(options: Sequence[Option], order: Order, devices: Sequence[Device]) -> bool:
    """Whether workers of stages find their places on devices for certain, whichever of them overlap.

    Args:
        options: One a stage, each with a GPU.
        order: Which of them can't overlap, by position.
        devices: The devices.
    """
    shares = [option.size.share or Share(1) for option in options]
    holding = [device for device in devices if all(share.weight(device) <= 1 + _SLACK for share in shares)]
    if not holding:
        return False
    weights = [min(max(share.weight(device) for device in holding), 1.0) for share in shares]
    counts = [option.workers * share.devices for option, share in zip(options, shares, strict=True)]
    rounded = [n * _halved(w) for n, w in zip(counts, weights, strict=True)]
    if heaviest(rounded, order) <= len(holding):
        return True
    largest = max(weights)
    total = heaviest([n * w for n, w in zip(counts, weights, strict=True)], order)
    return largest < 1 and total <= len(holding) - (len(holding) - 1) * largest + _SLACK


def devices_at_once(options: Sequence[Option], order: Order, device: Device) -> int:
    """How many devices of one kind workers of stages need, whichever of them overlap.

    Args:
        options: One a stage.
        order: Which of them can't overlap, by position.
        device: The kind.

    Raises:
        GpuShareTooLarge: A share that one such device could not hold.
    """
    shares = {i: [s] * option.workers for i, option in enumerate(options) if (s := option.size.share) is not None}
    sets, complete = antichains(shares, order)
    if complete:
        return max((devices_needed([s for i in members for s in shares[i]], device) for members in sets), default=0)
    rounded = [0.0] * len(options)
    for i, each in shares.items():
        rounded[i] = len(each) * each[0].devices * _halved(min(each[0].weight(device), 1.0))
    return math.ceil(heaviest(rounded, order))


def _halved(weight: float) -> float:
    """The least of 1, 1/2, 1/4, … that is no smaller."""
    return float(2.0 ** -math.floor(-math.log2(weight) + _SLACK))


def _among(members: Sequence[int], order: Order) -> Order:
    position = {stage: at for at, stage in enumerate(members)}
    return frozenset((position[i], position[j]) for i, j in order if i in position and j in position)


def _placeable(capacity: Capacity, option: Option) -> bool:
    """Whether an option's workers can be placed on empty devices: exact, as they are alike."""
    devices, share = capacity.devices_of(option), option.size.share
    return devices is None or share is None or most_at_once(share, devices) >= option.workers


def _as_placeable(capacity: Capacity, a: Option, b: Option) -> bool:
    """Whether *a* can be placed on devices wherever *b* can: no more workers, none with a larger share."""
    mine, theirs = a.size.share, b.size.share
    if mine is None or (devices := capacity.devices_of(a)) is None:
        return True
    if theirs is None or capacity.devices_of(b) != devices:
        return False
    return a.workers <= b.workers and all(
        mine.gpu <= theirs.gpu and mine.memory_on(device) <= theirs.memory_on(device) for device in devices
    )
