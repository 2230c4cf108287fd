"""What it costs that this machine has no GPU: how the plan that would use one differs from the one that runs."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan, Prediction
from prefect_slo.runner.pools import PROCESS


def wanted(known: Knowledge, slo: Slo, *, seed: int) -> Plan | None:
    """The plan that there would be if this machine had as many GPUs as anyone asks for, where that one uses some.

    ``None`` where the machine has a GPU, no menu has one, or nothing was measured on one.
    """
    from prefect_slo.loop.replanning import fastest, surest

    model, workflow = known.model, known.workflow
    if model is None or workflow is None or workflow.capacity.gpu_devices != ():
        return None
    measured = {stage.name: set(model.history(stage.name).hardware.tolist()) for stage in workflow.stages}
    if not any(o.size.gpu and o.size.kind in measured[s.name] for s in workflow.stages for o in s.menu.options()):
        return None
    richer = copy(model)
    richer.workflow = replace(workflow, capacity=replace(workflow.capacity, gpu_devices=None))
    try:
        plan = surest(richer, slo, seed=seed)
    except InfeasibleSlo:
        plan = fastest(richer, slo, seed)
    return plan if here(plan) else None


def here(plan: Plan) -> tuple[str, ...]:
    """Stages that a plan gives a GPU of this machine."""
    return tuple(name for name, stage in plan.stages.items() if stage.size.gpu and stage.pool == PROCESS)


def price(wished: Plan, made: Plan) -> str:
    """In words, what it costs to do without: ``""`` where the two plans are alike."""
    stages = ", ".join(repr(name) for name in here(wished))
    if wished.predicted is None or made.predicted is None or not stages:
        return ""
    return (
        f"GPU wanted for {stages}, and none is here: it runs on the CPU, predicted {_said(made.predicted)} a run in "
        f"place of {_said(wished.predicted)} ({_more(wished.predicted, made.predicted)})."
    )


def _said(prediction: Prediction) -> str:
    return f"{prediction.latency_s.mean:.3g} s and ${prediction.cost_usd.mean:.3g}"


def _more(wished: Prediction, made: Prediction) -> str:
    seconds = made.latency_s.mean - wished.latency_s.mean
    dollars = made.cost_usd.mean - wished.cost_usd.mean
    return f"{seconds:+.3g} s, {'-' if dollars < 0 else '+'}${abs(dollars):.3g}"
