"""What it costs that a place has no GPU: how the plan that would use one differs from the one that runs."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import replace

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.loop.comparison import compared
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.loop.menus import with_gpus
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan
from prefect_slo.resources import Capacity
from prefect_slo.runner.pools import PROCESS, Pools, on_cpu


def lacking(capacity: Capacity) -> frozenset[str]:
    """Places that are known to have no GPU; ``process`` for this machine."""
    own = {name for name, pool in capacity.pools.items() if pool.gpu_devices == ()}
    return frozenset(own | ({PROCESS} if capacity.gpu_devices == () else set()))


def wanted(known: Knowledge, slo: Slo, *, seed: int) -> Plan | None:
    """The plan that there would be if every place had as many GPUs as anyone asks for, where that one uses some.

    ``None`` where no place lacks any, no menu has one there, or nothing was measured on one.
    """
    from prefect_slo.loop.replanning import fastest, surest

    workflow = known.workflow
    if workflow is None or not (places := lacking(workflow.capacity)) or (model := known.model) is None:
        return None
    measured = {stage.name: set(model.history(stage.name).hardware.tolist()) for stage in workflow.stages}
    offered = ((s.name, o) for s in workflow.stages for o in s.menu.options() if o.size.gpu and o.pool in places)
    if not any(option.size.kind in measured[name] for name, option in offered):
        return None
    richer = copy(model)
    richer.workflow = replace(workflow, capacity=with_gpus(workflow.capacity, dict.fromkeys(places)))
    try:
        plan = surest(richer, slo, seed=seed)
    except InfeasibleSlo:
        plan = fastest(richer, slo, seed)
    return plan if using(plan, places) else None


def using(plan: Plan, places: Collection[str]) -> tuple[str, ...]:
    """Stages that a plan gives a GPU at some of these places."""
    return tuple(name for name, stage in plan.stages.items() if stage.size.gpu and stage.pool in places)


def without(plan: Plan, places: Collection[str], pools: Pools) -> Plan:
    """A plan with stages on the CPU that it gives a GPU at these places; it is not predicted, nor certified."""
    made = plan
    for name in using(plan, places):
        stage = plan[name]
        made = made.with_stage(name, size=on_cpu(stage.size, stage.pool, pools))
    return made.passing_as(plan)


def price(wished: Plan, made: Plan, places: Collection[str]) -> str:
    """In words, what it costs to do without at these places: ``""`` where the plan would use none there."""
    if not (names := using(wished, places)):
        return ""
    lacks = sorted({wished[name].pool for name in names})
    none = " and ".join("none is here" if place == PROCESS else f"pool {place!r} has none" for place in lacks)
    on = "it runs" if len(names) == 1 else "they run"
    told = f"GPU wanted for {', '.join(map(repr, names))}, and {none}: {on} on the CPU"
    unknown = "where nothing was measured: how long it takes there, and what it costs, is not known"
    return f"{told}, {compared(wished, made) or unknown}."
