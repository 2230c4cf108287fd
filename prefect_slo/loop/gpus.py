"""What it costs that a place has no GPU: how the plan that would use one differs from the one that runs.

A profile, and a plan in force, may come from a machine or from a time with other GPUs: what is there now decides.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import replace

from prefect_slo.errors import InfeasibleSlo, SloError
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.loop.menus import gpu_places, gpus_now, with_gpus
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan, Prediction
from prefect_slo.resources import Capacity
from prefect_slo.runner.pools import PROCESS, Pools, on_cpu


def now(known: Knowledge, pools: Pools) -> Knowledge:
    """What is known of a flow, with the GPUs that are there now where its menus offer some."""
    if known.workflow is None:
        return known
    there = gpus_now(gpu_places(known.workflow), pools)
    workflow = replace(known.workflow, capacity=with_gpus(known.workflow.capacity, there))
    if workflow.capacity == known.workflow.capacity:
        return known
    key = tuple(sorted(there.items()))
    if key not in known.elsewhere:
        fitted = known.fitted.on(workflow) if known.fitted is not None else None
        known.elsewhere[key] = replace(known, workflow=workflow, fitted=fitted, made={})
    return known.elsewhere[key]


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
    if workflow is None or not (bare := lacking(workflow.capacity)) or (model := known.model) is None:
        return None
    measured = {stage.name: set(model.history(stage.name).hardware.tolist()) for stage in workflow.stages}
    offered = ((s.name, o) for s in workflow.stages for o in s.menu.options() if o.size.gpu and o.pool in bare)
    if not any(option.size.kind in measured[name] for name, option in offered):
        return None
    richer = copy(model)
    richer.workflow = replace(workflow, capacity=with_gpus(workflow.capacity, dict.fromkeys(bare)))
    try:
        plan = surest(richer, slo, seed=seed)
    except InfeasibleSlo:
        plan = fastest(richer, slo, seed)
    return plan if using(plan, bare) else None


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


def without_now(known: Knowledge, plan: Plan, pools: Pools) -> tuple[Plan, str]:
    """A plan as it can be run with the GPUs that are there now, and what that costs in words; itself and nothing."""
    from prefect_slo.loop.replanning import predicted

    asked = {stage.pool for stage in plan.stages.values() if stage.size.gpu}
    bare = {place for place, devices in gpus_now(asked, pools).items() if devices == ()}
    if not using(plan, bare):
        return plan, ""
    made = without(plan, bare, pools)
    try:
        if known.model is not None:
            plan, made = predicted(known.model, plan), predicted(known.model, made)
    except SloError:  # nothing was measured there
        made = replace(made, predicted=None)
    return made, price(plan, made, bare)


def price(wished: Plan, made: Plan, places: Collection[str]) -> str:
    """In words, what it costs to do without at these places: ``""`` where the plan would use none there."""
    if not (names := using(wished, places)):
        return ""
    lacks = sorted({wished[name].pool for name in names})
    none = " and ".join("none is here" if place == PROCESS else f"pool {place!r} has none" for place in lacks)
    on = "it runs" if len(names) == 1 else "they run"
    told = f"GPU wanted for {', '.join(map(repr, names))}, and {none}: {on} on the CPU"
    if wished.predicted is None or made.predicted is None:
        return f"{told}, where nothing was measured: how long it takes there, and what it costs, is not known."
    return (
        f"{told}, predicted {_said(made.predicted)} a run in place of {_said(wished.predicted)} "
        f"({_more(wished.predicted, made.predicted)})."
    )


def _said(prediction: Prediction) -> str:
    return f"{prediction.latency_s.mean:.3g} s and ${prediction.cost_usd.mean:.3g}"


def _more(wished: Prediction, made: Prediction) -> str:
    seconds = made.latency_s.mean - wished.latency_s.mean
    dollars = made.cost_usd.mean - wished.cost_usd.mean
    return f"{seconds:+.3g} s, {'-' if dollars < 0 else '+'}${abs(dollars):.3g}"
