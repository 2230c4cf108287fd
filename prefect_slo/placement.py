"""Shares of GPUs, and which device each of them goes on.

A worker asks for a share of one device's cores and for some of its memory, or for several whole devices. What is held
on a device never exceeds it in either, and a share never spans two devices: four devices that are each three quarters
taken have a whole device free between them and no room for a half.

- *Online* (``Occupancy.find``): best fit takes the device that is left with the least; first fit the first that does.
- *Offline* (``pack``, ``devices_needed``): first-fit-decreasing by the larger of the two shares of a device. Where one
  resource binds it needs at most 11/9 · OPT + 6/9 devices (Dósa 2007), with two 7/3 · OPT and a constant (Garey,
  Graham, Johnson and Yao 1976).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from prefect_slo.errors import GpuShareTooLarge, InvalidValue
from prefect_slo.units import finite, positive, text

Fit = Literal["best", "first"]

_SLACK = 1e-9


@dataclass(frozen=True)
class Device:
    """A GPU, or a hardware partition of one.

    Attributes:
        name: What ``CUDA_VISIBLE_DEVICES`` calls it: its UUID, or its index.
        memory_mb: Its memory, in MB (MiB).
        cores: How much of its cores may be given away; 1 is all.
    """

    name: str
    memory_mb: float
    cores: float = 1.0

    def __post_init__(self) -> None:
        text(self.name, "device.name")
        positive(self.memory_mb, "device.memory_mb")
        if not 0 < finite(self.cores, "device.cores") <= 1:
            raise InvalidValue("device.cores", self.cores, "a share in (0, 1]")

    def __str__(self) -> str:
        part = f" and {self.cores:g} of its cores" if self.cores < 1 else ""
        return f"{self.name} with {self.memory_mb:,.0f} MB{part}"


@dataclass(frozen=True, order=True)
class Share:
    """What a worker asks for.

    Attributes:
        gpu: Share of a device's cores in (0, 1], or a number of whole devices.
        memory_mb: Memory on its device, in MB; 0 means as large a part of the device's memory as of its cores.
    """

    gpu: float
    memory_mb: float = 0.0

    def __post_init__(self) -> None:
        gpu = positive(self.gpu, "size.gpu")
        if gpu > 1 and gpu != math.floor(gpu):
            raise InvalidValue("size.gpu", self.gpu, "a share of one GPU in (0, 1], or a number of whole GPUs")
        if finite(self.memory_mb, "size.gpu_memory_mb") < 0:
            raise InvalidValue("size.gpu_memory_mb", self.memory_mb, "0 or more")

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return math.ceil(self.gpu)

    @property
    def cores(self) -> float:
        """Share of the cores of each of its devices."""
        return min(self.gpu, 1.0)

    def memory_on(self, device: Device) -> float:
        """What it takes of a device's memory, in MB."""
        if self.gpu >= 1:
            return max(device.memory_mb, self.memory_mb)
        return self.memory_mb or self.gpu * device.memory_mb

    def weight(self, device: Device) -> float:
        """The larger of its two shares of a device."""
        return max(self.cores / device.cores, self.memory_on(device) / device.memory_mb)

    def __str__(self) -> str:
        memory = f" with {self.memory_mb:,.0f} MB of its memory" if self.memory_mb else ""
        return f"{self.gpu:g} GPU{memory}"


class Occupancy:
    """What is held on every device.

    Args:
        devices: The devices, in the order in which they are tried.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self.devices = devices
        self._cores = [0.0] * len(devices)
        self._memory_mb = [0.0] * len(devices)
        self._sharers = [0] * len(devices)

    def find(self, share: Share, fit: Fit = "best") -> tuple[int, ...] | None:
        """Positions of the devices that a share would go on now; ``None`` where it has to wait."""
        fitting: Iterator[int] = (at for at in range(len(self.devices)) if self._takes(at, share))
        if fit == "best":
            fitting = iter(sorted(fitting, key=lambda at: (self._left(at, share), at)))
        found = tuple(islice(fitting, share.devices))
        return tuple(sorted(found)) if len(found) == share.devices else None

    def put(self, share: Share, at: Iterable[int]) -> None:
        """Hold a share on the devices at these positions, as ``find`` has said."""
        for position in at:
            self._sharers[position] += 1
            self._cores[position] += share.cores
            self._memory_mb[position] += share.memory_on(self.devices[position])

    def used(self, at: int) -> tuple[float, float]:
        """Share of the cores and MB of the memory that are held on a device."""
        return self._cores[at], self._memory_mb[at]

    def _takes(self, at: int, share: Share) -> bool:
        device = self.devices[at]
        if share.gpu >= 1 and self._sharers[at]:
            return False
        cores, memory_mb = self._cores[at] + share.cores, self._memory_mb[at] + share.memory_on(device)
        return cores <= device.cores + _SLACK and memory_mb <= device.memory_mb * (1 + _SLACK)

    def _left(self, at: int, share: Share) -> float:
        """What is left of a device beside a share, by the resource that is shorter."""
        device = self.devices[at]
        cores = 1 - (self._cores[at] + share.cores) / device.cores
        return min(cores, 1 - (self._memory_mb[at] + share.memory_on(device)) / device.memory_mb)


def check(share: Share, devices: Sequence[Device]) -> None:
    """That a share could go on these devices if nobody held any.

    It is refused rather than cut down to what there is: work that was given less than it asked for fails later, and
    elsewhere.

    Raises:
        GpuShareTooLarge: It could not.
    """
    if Occupancy(devices).find(share) is None:
        raise GpuShareTooLarge(str(share), tuple(str(device) for device in devices))


def pack(shares: Sequence[Share], devices: Sequence[Device]) -> list[tuple[int, ...]] | None:
    """Positions of devices for every share, all held at once, by first-fit-decreasing; ``None`` where it finds none.

    It may find none where there is one: the search for the best packing is NP-hard.
    """
    if not shares:
        return []
    if not devices:
        return None
    largest = max(devices, key=lambda device: (device.cores, device.memory_mb))
    occupancy = Occupancy(devices)
    placed: list[tuple[int, ...]] = [()] * len(shares)
    for k in sorted(range(len(shares)), key=lambda k: (-shares[k].devices, -shares[k].weight(largest), k)):
        at = occupancy.find(shares[k], "first")
        if at is None:
            return None
        occupancy.put(shares[k], at)
        placed[k] = at
    return placed


def devices_needed(shares: Sequence[Share], device: Device) -> int:
    """How many devices of one kind first-fit-decreasing takes for shares that are held at once.

    Raises:
        GpuShareTooLarge: A share that one such device could not hold.
    """
    wholes, parts = [s for s in shares if s.gpu >= 1], [s for s in shares if s.gpu < 1]
    for share in parts:
        check(share, (device,))
    if not parts:
        return sum(share.devices for share in wholes)
    positions = pack(parts, (device,) * len(parts))
    assert positions is not None  # a device for each would do
    return sum(share.devices for share in wholes) + 1 + max(at[0] for at in positions)


def most_at_once(share: Share, devices: Iterable[Device]) -> int:
    """How many workers of one share the devices hold at once: exact, as equal shares fill each device alike."""
    counts = []
    for device in devices:
        if Occupancy((device,)).find(Share(share.cores, share.memory_mb)) is None:
            continue
        by_cores = math.floor(device.cores / share.cores + _SLACK)
        by_memory = math.floor(device.memory_mb / share.memory_on(device) * (1 + _SLACK))
        counts.append(min(by_cores, by_memory))
    return len(counts) // share.devices if share.gpu >= 1 else sum(counts)


@dataclass(frozen=True)
class Interference:
    """How much slower work on a device becomes by what it shares the device with.

    Shares divide the cores; caches, memory bandwidth and copy engines stay common. With *k* sharers of 1/k each, work
    takes ``slowdown[k]`` times what it takes alone on the whole device. It is measured, never assumed: where nothing
    was measured it is 1.

    Attributes:
        slowdown: Factor by number of sharers, at least 1 and not decreasing.
    """

    slowdown: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        factors, last = {}, 1.0
        for sharers, factor in sorted((int(k), v) for k, v in dict(self.slowdown).items()):
            if sharers < 1 or finite(factor, f"gpu_slowdown.{sharers}") < last - _SLACK:
                raise InvalidValue(f"gpu_slowdown.{sharers}", factor, f"at least {last:g}, and at least 1 sharer")
            factors[sharers] = last = max(float(factor), last)
        object.__setattr__(self, "slowdown", factors)

    def of(self, sharers: float) -> float:
        """The factor of so many sharers: linear between those measured, and on beyond the last two."""
        known = {1: 1.0, **self.slowdown}
        at = sorted(known)
        if len(at) == 1 or sharers <= 1:
            return known[1]
        above = next((k for k, count in enumerate(at) if count >= sharers), len(at) - 1)
        low, high = at[above - 1], at[above]
        slope = (known[high] - known[low]) / (high - low)
        return known[low] + slope * (sharers - low)

    def at(self, gpu: float) -> float:
        """The factor of a share: its device is taken to be full of shares like it."""
        return self.of(math.floor(1 / gpu + _SLACK)) if 0 < gpu < 1 else 1.0
