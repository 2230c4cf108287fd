"""Pools beyond the two of this machine: what one is, and how a flow's are looked up by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import cloudpickle

from prefect_slo.errors import InvalidValue, UnknownPool
from prefect_slo.resources import Capacity, Pool, Size
from prefect_slo.runner.backends.protocol import Backend
from prefect_slo.units import instances, items, whole

PROCESS, THREAD = "process", "thread"
LOCAL = {"default": PROCESS, PROCESS: PROCESS, THREAD: THREAD}
"""The pools that are always there; ``default`` is what a menu has that names none."""


@runtime_checkable
class PoolDefinition(Protocol):
    """A place where workers run. Must be picklable: it travels with the flow, and is opened once per flow run.

    Its ``pool`` names it and says which sizes and worker counts it offers, and at which prices. ``hardware`` of its
    sizes keeps what is measured there apart from what is measured elsewhere. Give definitions to
    ``SLOTaskRunner(pools=[...])`` or ``@slo(pools=[...])``; tasks, menus and plans then name them.
    """

    @property
    def pool(self) -> Pool:
        """Its name, sizes, worker counts and prices, for menus."""
        ...

    @property
    def capacity(self) -> Capacity:
        """What it holds at once, apart from this machine."""
        ...

    def backend(self, client: Any) -> Backend:
        """A backend for one flow run; ``client`` is that run's API client, or ``None``. Shut down when the run ends."""
        ...


@runtime_checkable
class KnowsGpus(Protocol):
    """A definition that can tell whether its workers may have GPUs now; of others it is taken that they may."""

    def lacks_gpus(self) -> str:
        """Why they can have none now, in words; empty where they may, or nobody can tell. May ask, and take a while."""
        ...


Pools = Mapping[str, PoolDefinition]


def by_name(pools: Iterable[PoolDefinition]) -> dict[str, PoolDefinition]:
    """Definitions by the name of their pool.

    Raises:
        InvalidValue: Something that is not a definition, offers no sizes, does not pickle, or has a name that is taken.
    """
    named: dict[str, PoolDefinition] = {}
    for definition in pools:
        if isinstance(definition, type) or not isinstance(definition, PoolDefinition):
            raise InvalidValue("pools", definition, "pool definitions, such as LambdaPool(...)")
        name = definition.pool.name
        if name in LOCAL or name in named:
            raise InvalidValue("pools", name, f"names that differ from each other and from {', '.join(LOCAL)}")
        if not definition.pool.sizes:
            raise InvalidValue(f"pools.{name}.sizes", (), "at least one size that the pool offers")
        try:
            cloudpickle.dumps(definition)
        except Exception as error:
            raise InvalidValue(f"pools.{name}", definition, f"a definition that pickles ({error})") from None
        named[name] = definition
    return named


def sizes_on(hardware: str, sizes: object, where: str) -> tuple[Size, ...]:
    """The sizes that a pool offers, each once; those that name no hardware of their own are on the pool's.

    What is measured on a kind of hardware is kept apart from what is measured on others, and so is what is measured
    without a GPU in a pool that also has some.

    Raises:
        InvalidValue: No sizes.
    """
    found = instances(Size, sizes, f"{where}.sizes")
    if not found:
        raise InvalidValue(f"{where}.sizes", sizes, "at least one size")
    mixed = any(size.gpu and size.hardware in ("cpu", hardware) for size in found)

    def named(size: Size) -> Size:
        if size.hardware != "cpu":
            return size
        return replace(size, hardware=_cpu_kind(hardware) if mixed and not size.gpu else hardware)

    return tuple(dict.fromkeys(map(named, found)))


def lacks_gpus(pool: str, pools: Pools) -> str:
    """Why workers of a pool beyond this machine's can have no GPU now; empty where they may, or nobody can tell."""
    definition = pools.get(pool)
    return definition.lacks_gpus() if isinstance(definition, KnowsGpus) else ""


def on_cpu(size: Size, pool: str, pools: Pools) -> Size:
    """What to run at in place of a size with a GPU: the pool's least without one that holds as much, else the same."""
    if not size.gpu or pool not in pools:
        return size.without_gpu
    offered = (each for each in pools[pool].pool.sizes if not each.gpu)
    enough = [each for each in offered if each.vcpus >= size.vcpus and each.memory_mb >= size.memory_mb]
    return min(enough) if enough else without_gpu(size)


def without_gpu(size: Size) -> Size:
    """A size with a GPU on machines of its kind that have none."""
    return replace(size.without_gpu, hardware=_cpu_kind(size.hardware))


def _cpu_kind(hardware: str) -> str:
    """Name of machines of a kind without their GPUs: what is measured there is kept apart."""
    return f"{hardware}-cpu"


def worker_counts(counts: object, concurrency: int, where: str) -> tuple[int, ...]:
    """The worker counts that a pool offers; by default powers of four up to its concurrency, and that.

    Raises:
        InvalidValue: The concurrency or a count can't be, or a count is above it.
    """
    whole(concurrency, f"{where}.concurrency")
    given = items(counts, f"{where}.workers")
    most = [4**k for k in range(10) if 4**k < concurrency]
    chosen = tuple(sorted({whole(count, f"{where}.workers") for count in given or (*most, concurrency)}))
    if max(chosen) > concurrency:
        raise InvalidValue(f"{where}.workers", counts, f"at most the concurrency of {concurrency}")
    return chosen


def resolved(name: str, pools: Pools, *, stage: str = "") -> str:
    """The pool that a name means.

    Raises:
        UnknownPool: There is none of that name.
    """
    if name in pools:
        return name
    if name not in LOCAL:
        raise UnknownPool(name, (*LOCAL, *pools), stage)
    return LOCAL[name]
