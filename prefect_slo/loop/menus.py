"""What may be chosen for the stages of a flow on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil

from prefect_slo import units
from prefect_slo.declaration import NOTHING, Declaration
from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Capacity, Menu, Pool, Size
from prefect_slo.runner.backends.local import usable_vcpus
from prefect_slo.runner.rules import PROCESS, THREAD
from prefect_slo.workflow import Workflow

_FIELDS = ("workers", "vcpus", "memory_mb", "batch", "prices")


@dataclass(frozen=True)
class MenuSettings:
    """What a user says of every stage's menu; ``None`` leaves it to the machine.

    Attributes:
        workers: Worker counts; by default powers of two up to the machine's vCPUs.
        vcpus: vCPUs of a worker; likewise.
        memory_mb: Memory of a worker; by default its vCPUs' share of the machine's memory.
        batch: Batch sizes of batched tasks.
        prices: Price list.
    """

    workers: tuple[int, ...] | None = None
    vcpus: tuple[float, ...] | None = None
    memory_mb: tuple[int, ...] | None = None
    batch: tuple[int, ...] = (1,)
    prices: str = "local"

    @classmethod
    def of(cls, value: Mapping[str, Any] | MenuSettings | None) -> MenuSettings:
        """Settings from themselves or a mapping of their fields.

        Raises:
            InvalidValue: A field that there isn't.
        """
        if isinstance(value, MenuSettings):
            return value
        settings: dict[str, Any] = {}
        for name, given in (value or {}).items():
            if name not in _FIELDS:
                raise InvalidValue("menu", name, f"one of {', '.join(_FIELDS)}")
            if name == "prices":
                settings[name] = str(given)
                continue
            values = tuple(given) if isinstance(given, (list, tuple, range)) else (given,)
            settings[name] = tuple(units.megabytes(v) for v in values) if name == "memory_mb" else values
        return cls(**settings)


def local_capacity() -> Capacity:
    """What this machine holds."""
    return Capacity(vcpus=float(usable_vcpus()), memory_mb=float(_memory_mb()))


def local_menu(settings: MenuSettings, declared: Declaration = NOTHING, *, on_threads: bool = False) -> Menu:
    """The menu of a stage on this machine.

    Args:
        settings: What the flow's decorator says.
        declared: What the task's own declaration says; it goes before.
        on_threads: Whether the stage is known not to pickle.
    """
    own = replace(
        settings, **{name: MenuSettings.of({name: v}).__getattribute__(name) for name, v in declared.menu.items()}
    )
    pins = declared.pins
    pool = str(pins.get("pool", declared.pool or ""))
    threads = on_threads or pool == THREAD or declared.isolation == THREAD
    n, memory = usable_vcpus(), _memory_mb()
    workers = own.workers or _powers(declared.concurrency or n)
    if declared.concurrency is not None:
        workers = tuple(w for w in workers if w <= declared.concurrency) or (declared.concurrency,)
    vcpus = own.vcpus or tuple(float(v) for v in _powers(n))
    sizes = tuple(Size(v, m) for v in vcpus for m in (own.memory_mb or (max(int(memory * min(v / n, 1.0)), 256),)))
    if declared.memory_mb is not None:
        sizes = tuple(s for s in sizes if s.memory_mb >= declared.memory_mb) or (Size(vcpus[-1], declared.memory_mb),)
    if threads:
        sizes = (Size(1, max(sizes[0].memory_mb, 256), hardware=THREAD),)
    menu = Menu(
        prices=own.prices,
        workers=tuple(workers),
        sizes=sizes,
        pools=(Pool(THREAD if threads else pool or PROCESS),),
        batch=own.batch if declared.batched else (1,),
        knobs=declared.knobs,
    )
    held = {name: pins[name] for name in ("workers", "batch") if name in pins}
    if "vcpus" in pins or "memory_mb" in pins:
        held["size"] = Size(
            float(pins.get("vcpus", sizes[0].vcpus)), units.megabytes(pins.get("memory_mb", sizes[0].memory_mb))
        )
    return menu.pinned(**held) if held else menu


def with_menus(
    workflow: Workflow,
    settings: MenuSettings,
    declarations: Mapping[str, Declaration],
    on_threads: frozenset[str] = frozenset(),
) -> Workflow:
    """The stage graph that a run has shown, with the menu of every stage and this machine's capacity.

    A stage of one item at a time (sequential, or a single call) has one worker on its menu: more would idle.
    """
    stages = []
    for stage in workflow.stages:
        menu = local_menu(settings, declarations.get(stage.name, NOTHING), on_threads=stage.name in on_threads)
        if stage.sequential or stage.items == 1:
            menu = replace(menu, workers=(1,))
        stages.append(replace(stage, menu=menu))
    return replace(workflow, stages=tuple(stages), capacity=local_capacity())


def _powers(n: int) -> tuple[int, ...]:
    """1, 2, 4, … up to ``n``, which is always there."""
    powers = []
    step = 1
    while step < n:
        powers.append(step)
        step *= 2
    return (*powers, max(n, 1))


def _memory_mb() -> int:
    return int(psutil.virtual_memory().total // 2**20)
