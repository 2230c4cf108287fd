"""What a worker can be (a size), and what the planner may choose from (a menu)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from prefect_slo.errors import InvalidValue, InvalidWorkflow
from prefect_slo.pricing import PriceList, price_list
from prefect_slo.units import finite, positive, whole


@dataclass(frozen=True, order=True)
class Size:
    """What one worker of a stage gets.

    Attributes:
        vcpus: Virtual CPUs; may be a fraction.
        memory_mb: Memory in MB (MiB).
        gpu: Share of a GPU in [0, 1], or a number of whole GPUs.
        hardware: Open name of the kind of machine: ``cpu``, ``gpu``, ``tpu``, ``edge-box``. Models are kept per name.
    """

    vcpus: float
    memory_mb: int
    gpu: float = 0.0
    hardware: str = "cpu"

    def __post_init__(self) -> None:
        positive(self.vcpus, "size.vcpus")
        whole(self.memory_mb, "size.memory_mb")
        if finite(self.gpu, "size.gpu") < 0:
            raise InvalidValue("size.gpu", self.gpu, "0 or more")
        if not self.hardware:
            raise InvalidValue("size.hardware", self.hardware, "a name such as 'cpu' or 'gpu'")

    def __str__(self) -> str:
        gpu = f" + {self.gpu:g} {self.hardware}" if self.gpu else ""
        return f"{self.vcpus:g} vCPU / {self.memory_mb} MB{gpu}"


@dataclass(frozen=True)
class Pool:
    """A place where workers run, by name, with its own sizes and prices where they differ from the menu's.

    Attributes:
        name: What a stage plan names; a backend answers to it.
        sizes: Sizes it offers; empty means the menu's.
        prices: Price list; ``None`` means the menu's.
    """

    name: str = "default"
    sizes: tuple[Size, ...] = ()
    prices: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidValue("pool.name", self.name, "a name")


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


@dataclass(frozen=True)
class Menu:
    """The options of a stage.

    Attributes:
        prices: Name of a price list, or path of one (``.toml``).
        workers: Worker counts.
        sizes: Worker sizes.
        pools: Pools; the sizes of a pool override the menu's.
        batch: Batch sizes.
        knobs: Declared knobs and their values, e.g. ``{"resolution": (480, 720)}``.

    Raises:
        InvalidWorkflow: Nothing to choose from in some dimension.
        UnknownPrices: The price list does not exist.
    """

    prices: str = "local"
    workers: tuple[int, ...] = (1,)
    sizes: tuple[Size, ...] = (Size(1, 1024),)
    pools: tuple[Pool, ...] = (Pool(),)
    batch: tuple[int, ...] = (1,)
    knobs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("workers", "batch"):
            for value in getattr(self, name):
                whole(value, f"menu.{name}")
        for name in ("workers", "pools", "batch"):
            if not getattr(self, name):
                raise InvalidWorkflow(f"menu.{name}", (), "at least one value")
        if not self.sizes and not all(pool.sizes for pool in self.pools):
            raise InvalidWorkflow("menu.sizes", (), "at least one size")
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise InvalidWorkflow("menu.pools", tuple(names), "pools with different names")
        for knob, values in self.knobs.items():
            if not values:
                raise InvalidWorkflow(f"menu.knobs.{knob}", values, "at least one value")
        price_list(self.prices)

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

    def options(self) -> tuple[Option, ...]:
        """Every point of the menu, duplicates removed, in a fixed order."""
        return tuple(dict.fromkeys(self._points()))

    def pinned(self, **choices: object) -> Menu:
        """A copy with some dimensions held at one value, e.g. ``menu.pinned(workers=4)``.

        Raises:
            InvalidValue: A dimension that the menu does not have.
        """
        changes: dict[str, object] = {}
        for name, value in choices.items():
            if name == "pool":
                changes["pools"] = (self.pool(str(value)),)
            elif name == "size":
                changes["sizes"] = (value,)
                changes["pools"] = tuple(replace(pool, sizes=()) for pool in self.pools)
            elif name in ("workers", "batch"):
                changes[name] = (whole(value, f"pin.{name}"),)
            elif name in self.knobs:
                changes["knobs"] = {**self.knobs, name: (value,)}
            else:
                raise InvalidValue(
                    "pin", name, f"one of workers, size, pool, batch{''.join(', ' + k for k in self.knobs)}"
                )
        return replace(self, **changes)  # type: ignore[arg-type]

    def _points(self) -> Iterator[Option]:
        names = sorted(self.knobs)
        settings = [tuple(zip(names, values, strict=True)) for values in product(*(self.knobs[n] for n in names))]
        for pool in self.pools:
            for size, workers, batch, knobs in product(pool.sizes or self.sizes, self.workers, self.batch, settings):
                yield Option(workers, size, pool.name, batch, knobs)


@dataclass(frozen=True)
class Capacity:
    """What the machine or the account holds at once; ``None`` means no limit.

    Attributes:
        vcpus: Σ over concurrent workers of their vCPUs.
        memory_mb: Σ of their memory.
        workers: Concurrent workers (AWS: account concurrency).
        gpu: Σ of their GPU shares.
    """

    vcpus: float | None = None
    memory_mb: float | None = None
    workers: int | None = None
    gpu: float | None = None

    def __post_init__(self) -> None:
        for name in ("vcpus", "memory_mb", "workers", "gpu"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"capacity.{name}")

    def fits(self, *options: Option) -> bool:
        """Whether the workers of these options can all be held at once."""
        used = {
            "vcpus": sum(option.workers * option.size.vcpus for option in options),
            "memory_mb": sum(option.workers * option.size.memory_mb for option in options),
            "workers": sum(option.workers for option in options),
            "gpu": sum(option.workers * option.size.gpu for option in options),
        }
        limits = {name: getattr(self, name) for name in used}
        return all(limit is None or used[name] <= limit * (1 + 1e-9) for name, limit in limits.items())
