"""What a worker can be (a size), and what the planner may choose from (a menu)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from numbers import Integral
from typing import Literal, get_args

from prefect_slo.errors import InvalidValue, InvalidWorkflow
from prefect_slo.placement import Device, Interference, Share, pack
from prefect_slo.pricing import PriceList, price_list
from prefect_slo.units import finite, instances, items, positive, text, whole


@dataclass(frozen=True, order=True)
class Size:
    """What one worker of a stage gets.

    Attributes:
        vcpus: Virtual CPUs; may be a fraction.
        memory_mb: Memory in MB (MiB).
        gpu: Share of a GPU in [0, 1], or a number of whole GPUs.
        hardware: Open name of the kind of machine: ``cpu``, ``gpu``, ``tpu``, ``edge-box``. Models are kept per name.
        gpu_memory_mb: Memory on its GPU, in MB; 0 means as large a part of the device's memory as of its cores.
    """

    vcpus: float
    memory_mb: int
    gpu: float = 0.0
    hardware: str = "cpu"
    gpu_memory_mb: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "vcpus", positive(self.vcpus, "size.vcpus"))
        object.__setattr__(self, "memory_mb", whole(self.memory_mb, "size.memory_mb"))
        if finite(self.gpu, "size.gpu") < 0:
            raise InvalidValue("size.gpu", self.gpu, "0 or more")
        object.__setattr__(self, "gpu", float(self.gpu))
        text(self.hardware, "size.hardware")
        object.__setattr__(self, "gpu_memory_mb", whole(self.gpu_memory_mb, "size.gpu_memory_mb", least=0))
        if self.gpu_memory_mb and not self.gpu:
            raise InvalidValue("size.gpu_memory_mb", self.gpu_memory_mb, "0 where the size has no GPU")
        if self.gpu:
            _ = self.share

    @property
    def share(self) -> Share | None:
        """What it takes of GPUs; ``None`` where it takes none."""
        return Share(self.gpu, float(self.gpu_memory_mb)) if self.gpu else None

    @property
    def kind(self) -> str:
        """What models are kept by: its hardware, and with a part of a GPU, which part: ``gpu:0.25``."""
        return f"{self.hardware}:{self.gpu:g}" if 0 < self.gpu < 1 else self.hardware

    @property
    def without_gpu(self) -> Size:
        """The same on the CPU alone."""
        return replace(self, gpu=0.0, gpu_memory_mb=0, hardware="cpu") if self.gpu else self

    def __str__(self) -> str:
        part = f" ({self.gpu_memory_mb} MB)" if self.gpu_memory_mb else ""
        gpu = f" + {self.gpu:g} {self.hardware}{part}" if self.gpu else ""
        return f"{round(self.vcpus, 3):g} vCPU / {self.memory_mb} MB{gpu}"


HandingOn = Literal["objects", "machine", "workers", "storage", "requests", "calls"]
"""How what a stage makes gets to the next on the same pool, when it is large: as the ``objects`` that they are, in one
process; through memory that all processes of one ``machine`` map; from worker to worker (``workers``); over
``storage``, with the request and the reply while they are small; with ``requests`` and replies alone, which what is
larger does not fit into; or with ``calls`` and results, whatever their size."""


@dataclass(frozen=True)
class Pool:
    """A place where workers run, by name, with its own sizes and prices where they differ from the menu's.

    Attributes:
        name: What a stage plan names; a backend answers to it.
        sizes: Sizes it offers; empty means the menu's.
        prices: Price list; ``None`` means the menu's.
        workers: Worker counts that it offers; empty means the menu's.
        handing_on: What becomes of large results there; ``None`` for what the pools of this machine do by themselves,
            and ``calls`` elsewhere.
        storage: Where they lie that pass over storage: pools that name the same hand them on past the flow's process.
            ``None`` for a place that no other pool has.

    Raises:
        InvalidValue: A size without a GPU on a price list that prices GPUs alone.
    """

    name: str = "default"
    sizes: tuple[Size, ...] = ()
    prices: str | None = None
    workers: tuple[int, ...] = ()
    handing_on: HandingOn | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.handing_on not in (None, *get_args(HandingOn)):
            expected = f"one of {', '.join(get_args(HandingOn))}"
            raise InvalidValue(f"pool.{self.name}.handing_on", self.handing_on, expected)
        text(self.name, "pool.name")
        if self.storage is not None:
            text(self.storage, f"pool.{self.name}.storage")
        object.__setattr__(self, "sizes", instances(Size, self.sizes, f"pool.{self.name}.sizes"))
        counts = items(self.workers, f"pool.{self.name}.workers")
        object.__setattr__(self, "workers", tuple(whole(count, f"pool.{self.name}.workers") for count in counts))
        if self.prices is not None:
            _check_prices(self.prices, self.sizes, f"pool.{self.name}.prices")


@dataclass(frozen=True)
class Option:
    """One point of a stage's menu: everything the planner chooses for it.

    Attributes:
        workers: How many workers run the stage at once.
        size: Size of each.
        pool: Name of the pool they run on.
        batch: Items in one call of a batched task.
        knobs: Values of the task's declared knobs, as sorted ``(name, value)`` pairs.
    """

    workers: int
    size: Size
    pool: str = "default"
    batch: int = 1
    knobs: tuple[tuple[str, object], ...] = ()

    @property
    def vcpus(self) -> float:
        return self.size.vcpus

    @property
    def memory_mb(self) -> int:
        return self.size.memory_mb


BY_MACHINE = ("workers", "vcpus", "memory_mb")
"""Dimensions of a menu that the machine decides where nobody else does."""


@dataclass(frozen=True)
class Menu:
    """The options of a stage.

    Attributes:
        prices: Name of a price list, or path of one (``.toml``).
        workers: Worker counts.
        sizes: Worker sizes.
        pools: Pools; the sizes and worker counts of a pool override the menu's.
        batch: Batch sizes.
        knobs: Declared knobs and their values, e.g. ``{"resolution": (480, 720)}``.
        by_machine: Which of ``workers``, ``vcpus`` and ``memory_mb`` nobody has chosen, and the least that each may be:
            they follow from the machine that the menu was made on, and would be others elsewhere.

    Raises:
        InvalidWorkflow: Nothing to choose from in some dimension.
        InvalidValue: A size without a GPU on a price list that prices GPUs alone.
        UnknownPrices: The price list does not exist.
    """

    prices: str = "local"
    workers: tuple[int, ...] = (1,)
    sizes: tuple[Size, ...] = (Size(1, 1024),)
    pools: tuple[Pool, ...] = (Pool(),)
    batch: tuple[int, ...] = (1,)
    knobs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    by_machine: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_machine", _by_machine(self.by_machine))
        for name in ("workers", "batch"):
            counts = tuple(whole(value, f"menu.{name}") for value in items(getattr(self, name), f"menu.{name}"))
            object.__setattr__(self, name, counts)
        object.__setattr__(self, "sizes", instances(Size, self.sizes, "menu.sizes"))
        object.__setattr__(self, "pools", instances(Pool, self.pools, "menu.pools"))
        object.__setattr__(self, "knobs", _knobs(self.knobs))
        for name in ("workers", "pools", "batch"):
            if not getattr(self, name):
                raise InvalidWorkflow(f"menu.{name}", (), "at least one value")
        if not self.sizes and not all(pool.sizes for pool in self.pools):
            raise InvalidWorkflow("menu.sizes", (), "at least one size")
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise InvalidWorkflow("menu.pools", tuple(names), "pools with different names")
        offered = (size for pool in self.pools if pool.prices is None for size in pool.sizes or self.sizes)
        _check_prices(self.prices, offered, "menu.prices")

    def pool(self, name: str) -> Pool:
        """The pool of that name.

        Raises:
            InvalidValue: The menu has no such pool.
        """
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise InvalidValue("pool", name, f"one of {', '.join(pool.name for pool in self.pools)}")

    def prices_of(self, pool: str) -> PriceList:
        """The price list that holds on a pool."""
        return price_list(self.pool(pool).prices or self.prices)

    @property
    def worker_counts(self) -> frozenset[int]:
        """Worker counts that some pool of the menu offers."""
        return frozenset(count for pool in self.pools for count in pool.workers or self.workers)

    def options(self) -> tuple[Option, ...]:
        """Every point of the menu, duplicates removed, in a fixed order."""
        return tuple(dict.fromkeys(self._points()))

    def offers(self, option: Option) -> bool:
        """Whether an option of this machine's pools is on the menu, or would be on a machine of another size."""
        enough = all(_amount(option, name) >= least for name, least in self.by_machine.items())
        return enough and any(_like(each, option, self.by_machine) == option for each in self.options())

    def pinned(self, **choices: object) -> Menu:
        """A copy with some dimensions held at one value, e.g. ``menu.pinned(workers=4)``.

        Raises:
            InvalidValue: A dimension that the menu does not have.
        """
        pools = (self.pool(str(choices["pool"])),) if "pool" in choices else self.pools
        knobs = dict(self.knobs)
        chosen = {*choices, *(("vcpus", "memory_mb") if "size" in choices else ())}
        left = {name: least for name, least in self.by_machine.items() if name not in chosen}
        changes: dict[str, object] = {"pools": pools, "knobs": knobs, "by_machine": left}
        for name, value in choices.items():
            if name == "size":
                changes["sizes"] = (value,)
                changes["pools"] = pools = tuple(replace(pool, sizes=()) for pool in pools)
            elif name in ("workers", "batch"):
                changes[name] = (whole(value, f"pin.{name}"),)
                if name == "workers":
                    changes["pools"] = pools = tuple(replace(pool, workers=()) for pool in pools)
            elif name in self.knobs:
                knobs[name] = (value,)
            elif name != "pool":
                known = ", ".join(("workers", "size", "pool", "batch", *self.knobs))
                raise InvalidValue("pin", name, f"one of {known}")
        return replace(self, **changes)  # type: ignore[arg-type]

    def _points(self) -> Iterator[Option]:
        names = sorted(self.knobs)
        settings = [tuple(zip(names, values, strict=True)) for values in product(*(self.knobs[n] for n in names))]
        for pool in self.pools:
            sizes, counts = pool.sizes or self.sizes, pool.workers or self.workers
            for size, workers, batch, knobs in product(sizes, counts, self.batch, settings):
                yield Option(workers, size, pool.name, batch, knobs)


RESOURCES = ("vcpus", "memory_mb", "workers", "gpu")
"""What a capacity may limit."""


@dataclass(frozen=True)
class Capacity:
    """What the machine or the account holds at once; ``None`` means no limit.

    Attributes:
        vcpus: Σ over concurrent workers of their vCPUs.
        memory_mb: Σ of their memory.
        workers: Concurrent workers (AWS: account concurrency).
        gpu: Σ of their GPU shares.
        gpu_devices: The GPUs: shares must go on these, none across two; empty means that there are none.
        gpu_slowdown: How much slower sharers of a device become, as measured; neutral by default.
        pools: By name, pools with a capacity of their own: their workers count there and nowhere else.
    """

    vcpus: float | None = None
    memory_mb: float | None = None
    workers: int | None = None
    gpu: float | None = None
    pools: Mapping[str, Capacity] = field(default_factory=dict)
    gpu_devices: tuple[Device, ...] | None = None
    gpu_slowdown: Interference = Interference()

    def __post_init__(self) -> None:
        if self.gpu_devices is not None:
            object.__setattr__(self, "gpu_devices", instances(Device, self.gpu_devices, "capacity.gpu_devices"))
        for name in RESOURCES:
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"capacity.{name}")
        if self.workers is not None:
            whole(self.workers, "capacity.workers")
        if not isinstance(self.pools, Mapping):
            raise InvalidValue("capacity.pools", self.pools, "a table of capacities by pool")
        for pool, own in self.pools.items():
            if not isinstance(own, Capacity) or own.pools:
                raise InvalidValue(f"capacity.pools.{pool}", own, "a capacity without pools of its own")
        object.__setattr__(self, "pools", dict(self.pools))

    def of(self, pool: str) -> Capacity:
        """What a pool's workers count against."""
        return self.pools.get(pool, self)

    def limits(self) -> dict[tuple[str | None, str], float]:
        """Every limit, by pool (``None``: all that have no capacity of their own) and resource."""
        places: list[tuple[str | None, Capacity]] = [(None, self), *self.pools.items()]
        return {
            (pool, resource): float(limit)
            for pool, capacity in places
            for resource in RESOURCES
            if (limit := capacity.limit(resource)) is not None
        }

    def limit(self, resource: str) -> float | None:
        """The limit of a resource; of GPUs, no more than the devices have."""
        limit: float | None = getattr(self, resource)
        if resource == "gpu" and self.gpu_devices is not None:
            there = sum(device.cores for device in self.gpu_devices)
            return there if limit is None else min(limit, there)
        return limit

    def devices_of(self, option: Option) -> tuple[Device, ...] | None:
        """The GPUs that an option's workers go on; ``None`` where they take none, or none are named."""
        return self.of(option.pool).gpu_devices if option.size.gpu else None

    def places(self, *options: Option) -> bool:
        """Whether the workers of these options can be placed on the devices at once, by first-fit-decreasing."""
        shares: dict[str | None, list[Share]] = {}
        for option in options:
            if option.size.share is not None:
                pool = option.pool if option.pool in self.pools else None
                shares.setdefault(pool, []).extend([option.size.share] * option.workers)
        for pool, asked in shares.items():
            devices = (self if pool is None else self.pools[pool]).gpu_devices
            if devices is not None and pack(asked, devices) is None:
                return False
        return True

    def held(self, option: Option, pool: str | None, resource: str) -> float:
        """What an option's workers hold of a resource, where they count against that pool's capacity."""
        if (option.pool if option.pool in self.pools else None) != pool:
            return 0.0
        return option.workers * (1.0 if resource == "workers" else float(getattr(option.size, resource)))

    def fits(self, *options: Option) -> bool:
        """Whether the workers of these options can all be held at once."""
        return self.places(*options) and all(
            sum(self.held(option, pool, resource) for option in options) <= limit * (1 + 1e-9)
            for (pool, resource), limit in self.limits().items()
        )


def _like(option: Option, other: Option, names: Collection[str]) -> Option:
    """An option with some dimensions of another."""
    of_size = {name: getattr(other.size, name) for name in ("vcpus", "memory_mb") if name in names}
    workers = other.workers if "workers" in names else option.workers
    return replace(option, workers=workers, size=replace(option.size, **of_size) if of_size else option.size)


def _amount(option: Option, name: str) -> float:
    return float(option.workers if name == "workers" else getattr(option.size, name))


def _by_machine(least: object) -> dict[str, float]:
    if not isinstance(least, Mapping):
        raise InvalidWorkflow("menu.by_machine", least, "a table of the least of each dimension that is by machine")
    for name in least:
        if name not in BY_MACHINE:
            raise InvalidWorkflow("menu.by_machine", name, f"some of {', '.join(BY_MACHINE)}")
    return {name: finite(value, f"menu.by_machine.{name}") for name, value in least.items()}


def _check_prices(name: str, sizes: Iterable[Size], where: str) -> None:
    """Read a price list, and refuse sizes that would look free by it, though their machine is paid for."""
    prices = price_list(name)
    for size in sizes:
        if not size.gpu and prices.is_by_gpu(size.hardware):
            expected = (
                f"a list with prices of vCPUs or memory for {size}, which would look free: this one prices machines by "
                "their GPU. Put sizes without one into a pool of their own, with prices such as 'aws-ec2-cpu'"
            )
            raise InvalidValue(where, name, expected)


def _knobs(knobs: object) -> dict[str, tuple[object, ...]]:
    """Knob values as tuples of what a plan file can hold: texts, finite numbers, true and false."""
    if not isinstance(knobs, Mapping):
        raise InvalidWorkflow("menu.knobs", knobs, "a table of lists")
    read: dict[str, tuple[object, ...]] = {}
    for knob, values in knobs.items():
        where = f"menu.knobs.{knob}"
        if text(knob, "menu.knobs") in ("workers", "size", "pool", "batch"):
            raise InvalidWorkflow("menu.knobs", knob, "a name that no other dimension of the menu has")
        read[knob] = tuple(knob_value(value, where) for value in items(values, where))
        if not read[knob]:
            raise InvalidWorkflow(where, values, "at least one value")
    return read


def knob_value(value: object, where: str) -> str | bool | int | float:
    """``value`` when a plan file can hold it and give it back: a text, true or false, or a finite number.

    Raises:
        InvalidValue: Anything else.
    """
    if isinstance(value, (str, bool)):
        return value
    return int(value) if isinstance(value, Integral) else finite(value, where)
