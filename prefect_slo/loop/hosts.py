"""The machine that a run is on, which may be smaller than the one that the plan in force was made on.

A profile, and a plan in force, may come from another machine, or from a time with other GPUs: what is here now decides
what a run does, and only for itself. The plan in force stays for machines that hold it.
"""

from __future__ import annotations

from dataclasses import replace

from prefect_slo.loop import gpus
from prefect_slo.loop.comparison import compared
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.loop.menus import gpu_places, gpus_now, on_machine, with_gpus
from prefect_slo.loop.replanning import fits, predicted_now
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Capacity, Option, Size
from prefect_slo.runner.pools import LOCAL, PROCESS, Pools
from prefect_slo.workflow import Workflow

STAYS = "The plan in force stays, for machines that hold it."
NO_GPUS = "GPUs that are not there"


def seen_from_here(known: Knowledge, pools: Pools) -> Knowledge:
    """What is known of a flow, with this machine's capacity, and with the GPUs that are there now where menus have any.

    Args:
        known: What is known.
        pools: The flow's pools beyond this machine's.
    """
    if known.workflow is None:
        return known
    there = gpus_now(gpu_places(known.workflow), pools)
    here = with_gpus(on_machine(known.workflow.capacity), there)
    if here == known.workflow.capacity:
        return known
    key = here.vcpus, here.memory_mb, here.workers, *sorted(there.items())
    if key not in known.elsewhere:
        workflow = replace(known.workflow, capacity=here)
        fitted = known.fitted.on(workflow) if known.fitted is not None else None
        known.elsewhere[key] = replace(known, workflow=workflow, fitted=fitted, made={})
    return known.elsewhere[key]


def waiting(plan: Plan, workflow: Workflow, slo: Slo) -> str:
    """What keeps a plan from being followed on a machine, in words, where nothing else does; empty where it fits.

    Args:
        plan: The plan in force.
        workflow: The graph, with the capacity of that machine.
        slo: What is asked.
    """
    capacity = workflow.capacity
    free = replace(capacity, vcpus=None, memory_mb=None, workers=None, gpu=None)
    anywhere = with_gpus(free, dict.fromkeys({PROCESS, *gpus.lacking(capacity)}))
    if fits(plan, workflow, slo) or not fits(plan, replace(workflow, capacity=anywhere), slo):
        return ""
    return _lacks_room(plan, workflow) or NO_GPUS


def in_place_of(known: Knowledge, made: Plan, slo: Slo, *, gpus_told: bool) -> str:
    """In words, why a run goes by another plan than the one in force; empty where that isn't for its machine.

    Args:
        known: What is known of the flow, as seen from this machine.
        made: The plan that it goes by.
        slo: What is asked.
        gpus_told: Whether the user hears already what it costs that there is no GPU.
    """
    wished, workflow = known.plan, known.workflow
    if wished is None or workflow is None:
        return ""
    lack = waiting(wished, workflow, slo)
    if not lack or (gpus_told and lack == NO_GPUS):
        return ""
    told = compared(predicted_now(known, wished), made)
    return f"The plan in force takes {lack}: this run goes by a plan of its own{told and ', '}{told}. {STAYS}"


def for_here(known: Knowledge, plan: Plan, pools: Pools) -> tuple[Plan, str]:
    """A plan as it can be run on this machine, and what that costs in words; itself and nothing.

    Args:
        known: What is known of the flow.
        plan: The plan that it is to run by.
        pools: The flow's pools beyond this machine's.
    """
    asked = {stage.pool for stage in plan.stages.values() if stage.size.gpu}
    lacking = {place for place, devices in gpus_now(asked, pools).items() if devices == ()}
    here = on_machine(Capacity())
    cut = {name: _cut(stage.size, here) for name, stage in plan.stages.items() if not _holds(here, stage)}
    made = gpus.without(plan, lacking, pools)
    for name, size in cut.items():
        made = made.with_stage(name, size=replace(made[name].size, vcpus=size.vcpus, memory_mb=size.memory_mb))
    if made is plan:
        return plan, ""
    made = made.passing_as(plan)
    plan, made = predicted_now(known, plan), predicted_now(known, made)
    told = [gpus.price(plan, made, lacking)]
    if cut:
        workers = "; ".join(f"{name!r}: {plan[name].size}" for name in cut)
        costs = compared(plan, made)
        told.append(
            f"Its workers are larger than this machine ({workers}), which has {here.vcpus:g} vCPUs and "
            f"{here.memory_mb:.0f} MB: they are cut down to that{costs and ', '}{costs}."
        )
    return made, " ".join(filter(None, told))


def _holds(here: Capacity, stage: StagePlan) -> bool:
    """Whether a worker process of a stage has room on this machine at all."""
    return LOCAL.get(stage.pool) != PROCESS or here.fits(Option(1, stage.size))


def _cut(size: Size, here: Capacity) -> Size:
    vcpus, memory_mb = here.vcpus or size.vcpus, here.memory_mb or size.memory_mb
    return replace(size, vcpus=min(size.vcpus, vcpus), memory_mb=min(size.memory_mb, int(memory_mb)))


def _lacks_room(plan: Plan, workflow: Workflow) -> str:
    from prefect_slo.planner.overlap import heaviest, waits

    capacity, order = workflow.capacity, waits(workflow)
    options = [plan[name].option for name in workflow.order]
    told = []
    for resource, unit in (("vcpus", "vCPUs"), ("memory_mb", "MB"), ("workers", "workers")):
        limit = capacity.limit(resource)
        taken = heaviest([capacity.held(option, None, resource) for option in options], order)
        if limit is not None and taken > limit * (1 + 1e-9):
            told.append(f"{taken:,.6g} {unit} at once where there are {limit:,.6g}")
    return " and ".join(told)
