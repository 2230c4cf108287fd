"""What may be chosen for the stages of a flow: on this machine, and on the pools that it was given."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prefect_slo import units
from prefect_slo.declaration import NOTHING, Declaration, dimension
from prefect_slo.errors import InvalidValue
from prefect_slo.placement import Device
from prefect_slo.pricing import price_list
from prefect_slo.resources import Capacity, Menu, Pool, Size
from prefect_slo.runner.backends.local import usable_gpus, usable_memory_mb, usable_vcpus
from prefect_slo.runner.pools import PROCESS, THREAD, Pools, lacks_gpus, resolved
from prefect_slo.settings import SLOSettings
from prefect_slo.workflow import Workflow

if TYPE_CHECKING:
    from prefect_slo.observation import StageRuns
    from prefect_slo.plan import Plan

MOVED_SHARE, MOVED_BYTES = 0.1, 1e6
"""Threads go on the menu of a stage that spends this share of its busy time on moving bytes, and moves this many."""

GPU = "gpu"
"""Hardware of sizes with a share of one of this machine's GPUs."""

_FIELDS = ("workers", "vcpus", "memory_mb", "batch", "gpu", "gpu_memory_mb", "prices", "pools")
_read: dict[str, MenuSettings] = {}


@dataclass(frozen=True)
class MenuSettings:
    """What a user says of every stage's menu; ``None`` leaves it to the machine.

    Attributes:
        workers: Worker counts; by default powers of two up to the machine's vCPUs.
        vcpus: vCPUs of a worker; likewise.
        memory_mb: Memory of a worker; by default its vCPUs' share of the machine's memory.
        batch: Batch sizes of batched tasks.
        gpu: Shares of a GPU, or whole ones, of a worker process on this machine; 0 is none. By default none.
        gpu_memory_mb: Memory on it; by default as large a part as of its cores.
        prices: Price list: one of the package's, or a path to a ``.toml`` file.
        pools: Pools of tasks that declare none; by default worker processes. A pool that was given to the decorator
            has sizes, worker counts and prices of its own.
        sizes: Sizes of a worker, in place of ``vcpus`` and ``memory_mb``.
        block: Name of a stored ``slo-menu`` block that says all of this; read when a run first needs it.

    Raises:
        InvalidValue: A count or size that can't be, or nothing to choose from.
        UnknownPrices: The price list does not exist.
    """

    workers: tuple[int, ...] | None = None
    vcpus: tuple[float, ...] | None = None
    memory_mb: tuple[int, ...] | None = None
    batch: tuple[int, ...] = (1,)
    gpu: tuple[float, ...] = (0.0,)
    gpu_memory_mb: tuple[int, ...] | None = None
    prices: str = "local"
    pools: tuple[str, ...] | None = None
    sizes: tuple[Size, ...] | None = None
    block: str = ""

    def __post_init__(self) -> None:
        for name in ("workers", "vcpus", "memory_mb", "batch", "gpu", "gpu_memory_mb"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, dimension(name, values, "menu"))
        if self.pools is not None:
            if not self.pools:
                raise InvalidValue("menu.pools", self.pools, "at least one value")
            object.__setattr__(self, "pools", tuple(units.text(name, "menu.pools") for name in self.pools))
        price_list(self.prices)

    @classmethod
    def of(cls, value: Mapping[str, Any] | MenuSettings | str | None) -> MenuSettings:
        """Settings from themselves, a mapping of their fields, or the name of a stored menu.

        Raises:
            InvalidValue: A field that there isn't.
        """
        if isinstance(value, MenuSettings):
            return value
        if isinstance(value, str):
            return cls(block=units.text(value, "menu"))
        return cls().updated(value or {})

    def resolved(self) -> MenuSettings:
        """These settings, or what the block says that they name; that is read once per process.

        Raises:
            InvalidValue: There is no such block, or it says what holds for single tasks only.
            httpx.HTTPError: The API cannot be reached.
        """
        if not self.block:
            return self
        if self.block not in _read:
            _read[self.block] = _stored(self.block)
        return _read[self.block]

    def updated(self, fields: Mapping[str, Any]) -> MenuSettings:
        """A copy with some fields replaced; single values stand for lists of one.

        Raises:
            InvalidValue: A field that there isn't, or a value that it may not hold.
        """
        if not isinstance(fields, Mapping):
            raise InvalidValue("menu", fields, f"a mapping with some of {', '.join(_FIELDS)}")
        changes: dict[str, Any] = {}
        for name, given in fields.items():
            if name not in _FIELDS:
                raise InvalidValue("menu", name, f"one of {', '.join(_FIELDS)}")
            several = isinstance(given, (list, tuple, range)) or name == "prices"
            changes[name] = given if name == "prices" else tuple(given) if several else (given,)
        if "vcpus" in changes or "memory_mb" in changes:
            changes["sizes"] = None
        return replace(self, **changes)


def capacity_of(pools: Pools = MappingProxyType({}), *, gpus_at: Collection[str] = ()) -> Capacity:
    """What this machine holds, and apart from it each of the pools.

    Args:
        pools: The pools.
        gpus_at: Where GPUs matter, ``process`` for this machine's: they are looked for there alone.
    """
    elsewhere = {name: definition.capacity for name, definition in pools.items()}
    return with_gpus(on_machine(Capacity(pools=elsewhere)), gpus_now(gpus_at, pools))


def on_machine(capacity: Capacity) -> Capacity:
    """A capacity with the vCPUs, the memory and the number of workers of this machine."""
    return replace(
        capacity,
        vcpus=usable_vcpus(),
        memory_mb=float(usable_memory_mb()),
        workers=SLOSettings().capacity_workers,
    )


Gpus = Mapping[str, tuple[Device, ...] | None]
"""By pool, the GPUs of its workers; ``None`` where nobody can name them, and they may have some."""


def gpus_now(places: Collection[str], pools: Pools) -> Gpus:
    """The GPUs that workers may have now in some pools, ``process`` being this machine."""
    there = {
        name: () if lacks_gpus(name, pools) else pools[name].capacity.gpu_devices for name in places if name in pools
    }
    return {**there, PROCESS: usable_gpus()} if PROCESS in places else there


def with_gpus(capacity: Capacity, gpus: Gpus) -> Capacity:
    """A capacity with these GPUs."""
    own = {
        name: replace(each, gpu_devices=gpus[name]) if name in gpus else each for name, each in capacity.pools.items()
    }
    return replace(capacity, pools=own, gpu_devices=gpus.get(PROCESS, capacity.gpu_devices))


def gpu_places(workflow: Workflow) -> frozenset[str]:
    """Pools where some menu offers a GPU."""
    menus = (stage.menu for stage in workflow.stages)
    return frozenset(p.name for m in menus for p in m.pools if any(size.gpu for size in p.sizes or m.sizes))


def _stored(name: str) -> MenuSettings:
    from prefect_slo.blocks import MenuBlock

    try:
        menu = MenuBlock.load(name, _sync=True).menu  # type: ignore[call-arg, union-attr]
    except ValueError as error:
        expected = f"the name of an slo-menu block ({error}); 'python blocks/register.py' stores some"
        raise InvalidValue("menu", name, expected) from None
    if menu.knobs or menu.pools != (Pool(),):
        raise InvalidValue("menu", name, "a block without pools and knobs: those are declared by task, with slo_task")
    return MenuSettings(workers=menu.workers, batch=menu.batch, prices=menu.prices, sizes=menu.sizes)


def stage_menu(
    settings: MenuSettings,
    declared: Declaration = NOTHING,
    *,
    on_threads: bool = False,
    or_threads: bool = False,
    pools: Pools = MappingProxyType({}),
) -> Menu:
    """The menu of a stage.

    Args:
        settings: What the flow's decorator says.
        declared: What the task's own declaration says; it goes before.
        on_threads: Whether the stage is known not to pickle.
        or_threads: Whether threads are offered beside worker processes, where the task leaves that open.
        pools: Pools beyond this machine's.

    Raises:
        UnknownPool: A pool that there isn't.
    """
    own = settings.resolved().updated(declared.menu)
    pins = declared.pins
    names = tuple(dict.fromkeys(resolved(n, pools) for n in declared.pools or own.pools or (PROCESS,)))
    if or_threads and declared.isolation == "auto" and "pool" not in pins and names == (PROCESS,):
        names = (PROCESS, THREAD)
    threads = on_threads or names == (THREAD,) or declared.isolation == THREAD
    machine, memory = usable_vcpus(), usable_memory_mb()
    n = max(int(machine), 1)
    workers = own.workers or _powers(declared.concurrency or n)
    if declared.concurrency is not None:
        workers = _at_most(workers, declared.concurrency)
    vcpus = own.vcpus or tuple(min(float(v), machine) for v in _powers(n))
    sizes = own.sizes or tuple(
        Size(v, m) for v in vcpus for m in (own.memory_mb or (max(int(memory * min(v / machine, 1.0)), 256),))
    )
    if own.gpu != (0.0,):
        sizes = tuple(with_gpu for size in sizes for with_gpu in _with_gpus(size, own.gpu, own.gpu_memory_mb or (0,)))
    if declared.memory_mb is not None:
        sizes = tuple(s for s in sizes if s.memory_mb >= declared.memory_mb) or (Size(vcpus[-1], declared.memory_mb),)
    if threads:
        sizes = (Size(1, max(sizes[0].memory_mb, 256), hardware=THREAD),)
    menu = Menu(
        prices=own.prices,
        workers=tuple(workers),
        sizes=sizes,
        pools=(Pool(THREAD),) if threads else tuple(_offer(name, declared, sizes, pools) for name in names),
        batch=own.batch if declared.batched else (1,),
        knobs=declared.knobs,
        by_machine=_by_machine(own, declared),
    )
    held = {name: pins[name] for name in ("workers", "batch") if name in pins}
    if not pins.keys().isdisjoint(("vcpus", "memory_mb", "gpu", "gpu_memory_mb")):
        resized = (replace(p, sizes=(_pinned(p.sizes, pins),)) if p.sizes else p for p in menu.pools)
        menu = replace(menu, sizes=(_pinned(sizes, pins),), pools=tuple(resized))
    return menu.pinned(**held) if held else menu


def _by_machine(own: MenuSettings, declared: Declaration) -> dict[str, float]:
    """Dimensions of a menu that neither the flow nor the task decides, with the least that the task asks for."""
    decided = {"workers": own.workers or declared.concurrency, "vcpus": own.vcpus or own.sizes}
    decided["memory_mb"] = own.memory_mb or own.sizes
    least = {"memory_mb": float(declared.memory_mb or 0)}
    return {name: least.get(name, 0.0) for name, by in decided.items() if not by and name not in declared.pins}


def with_menus(
    workflow: Workflow,
    settings: MenuSettings,
    declarations: Mapping[str, Declaration],
    on_threads: frozenset[str] = frozenset(),
    pools: Pools = MappingProxyType({}),
    *,
    or_threads: frozenset[str] = frozenset(),
) -> Workflow:
    """The stage graph that a run has shown, with the menu of every stage and the capacity of machine and pools.

    A stage of one item at a time (sequential, or a single call) has one worker on its menu: more would idle.

    Args:
        workflow: The graph.
        settings: What the flow's decorator says.
        declarations: What tasks declare, by stage.
        on_threads: Stages that are known not to pickle.
        pools: Pools beyond this machine's.
        or_threads: Stages that threads may serve better than worker processes; see ``moving_much``.
    """
    stages = []
    for stage in workflow.stages:
        declared = declarations.get(stage.name, NOTHING)
        on, beside = stage.name in on_threads, stage.name in or_threads
        menu = stage_menu(settings, declared, on_threads=on, or_threads=beside, pools=pools)
        if stage.sequential or stage.items == 1:
            menu = menu.pinned(workers=1)
        stages.append(replace(stage, menu=menu))
    workflow = replace(workflow, stages=tuple(stages))
    return replace(workflow, capacity=capacity_of(pools, gpus_at=gpu_places(workflow)))


def moving_much(rows: StageRuns, plan: Plan | None = None) -> frozenset[str]:
    """Stages that threads of the flow's own process may serve better: moving their arguments and results takes long.

    Args:
        rows: Stage runs; those of processes say how long moving took, and how much was moved.
        plan: What the runs were run by: a stage that is on threads shows nothing of what that saves, and stays.
    """
    kept = {name for name, stage in plan.stages.items() if stage.pool == THREAD} if plan is not None else set()
    rows = rows.select((rows["hardware"] != THREAD) & (rows["bytes_in"] + rows["bytes_out"] >= MOVED_BYTES))
    moved_s = rows["read_s"] + rows["write_s"]
    shares = (moved_s / (moved_s + rows["compute_s"] + 1e-12)).tolist()
    by_stage: dict[str, list[float]] = {}
    for name, share in zip(rows["stage"].tolist(), shares, strict=True):
        if not math.isnan(share):  # a run that did not time its steps says nothing
            by_stage.setdefault(str(name), []).append(share)
    heavy = {name for name, found in by_stage.items() if median(found) > MOVED_SHARE}
    return frozenset(heavy | kept)


def _offer(name: str, declared: Declaration, local: tuple[Size, ...], pools: Pools) -> Pool:
    """What a pool offers a stage: the menu's own sizes in worker processes, one size in threads, else its own."""
    if name == PROCESS:
        return Pool(PROCESS)
    if name == THREAD:
        return Pool(THREAD, (Size(1, max(local[0].memory_mb, 256), hardware=THREAD),))
    offered = pools[name].pool
    floor, counts = declared.memory_mb or 0, offered.workers
    if counts and declared.concurrency is not None:
        counts = _at_most(counts, declared.concurrency)
    sizes = tuple(size for size in offered.sizes if size.memory_mb >= floor) or (max(offered.sizes),)
    return replace(offered, sizes=sizes, workers=counts)


def _at_most(counts: Sequence[int], most: int) -> tuple[int, ...]:
    return tuple(count for count in counts if count <= most) or (most,)


def _pinned(sizes: tuple[Size, ...], pins: Mapping[str, Any]) -> Size:
    """The size that pins ask for: what they leave open is that of the first size on the menu that fits them."""
    vcpus = float(pins["vcpus"]) if "vcpus" in pins else None
    memory_mb = units.megabytes(pins["memory_mb"]) if "memory_mb" in pins else None
    gpu = float(pins["gpu"]) if "gpu" in pins else None
    fitting = (
        s for s in sizes if vcpus in (None, s.vcpus) and memory_mb in (None, s.memory_mb) and gpu in (None, s.gpu)
    )
    like = next(fitting, sizes[0])
    like = replace(like, vcpus=vcpus or like.vcpus, memory_mb=memory_mb or like.memory_mb)
    if gpu is None and "gpu_memory_mb" not in pins:
        return like
    on_gpu = units.megabytes(pins["gpu_memory_mb"]) if "gpu_memory_mb" in pins else like.gpu_memory_mb
    share = like.gpu if gpu is None else gpu
    if not share:
        return like.without_gpu
    return replace(like, gpu=share, gpu_memory_mb=on_gpu, hardware=like.hardware if like.gpu else GPU)


def _with_gpus(size: Size, shares: Sequence[float], memory_mb: Sequence[int]) -> list[Size]:
    """A size with each share of a GPU: on hardware ``gpu``, which is measured apart from the machine without."""
    on_gpu = [replace(size, gpu=g, hardware=GPU, gpu_memory_mb=m) for g, m in product(shares, memory_mb) if g]
    return [size, *on_gpu] if 0.0 in shares else on_gpu


def _powers(n: int) -> tuple[int, ...]:
    """1, 2, 4, … up to ``n``, which is always there."""
    powers = []
    step = 1
    while step < n:
        powers.append(step)
        step *= 2
    return (*powers, max(n, 1))
