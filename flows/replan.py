"""Plan flows again by the models that their profiles hold; deploy it on a schedule, or run it once.

It learns nothing: after a new price list or a new version of the package a plan may pay that didn't before. A plan that
is unusually different is proposed and not adopted; this flow also approves it, or goes back to the plan before.

``python flows/replan.py`` plans every flow that has telemetry and a bound.
"""

from __future__ import annotations

from prefect import flow, get_run_logger

from prefect_slo.errors import InvalidValue
from prefect_slo.loop.guard import Guard
from prefect_slo.loop.guard import approve as approve_plan
from prefect_slo.loop.guard import roll_back as back
from prefect_slo.loop.learning import replan_flow
from prefect_slo.loop.maintenance import for_each
from prefect_slo.loop.replanning import plan_digest
from prefect_slo.plan import Plan


@flow(name="slo-replan")
def replan(
    flow_name: str | None = None,
    min_change: float | None = None,
    max_change: float | None = None,
    approve: bool = False,
    proposal: str = "",
    roll_back: bool = False,
    move: bool = False,
) -> dict[str, str]:
    """Put another plan in force where that pays.

    Args:
        flow_name: Name of a flow; all that have telemetry where it is missing.
        min_change: A plan that is better by less than this share doesn't replace the one in force.
        max_change: A plan that changes latency, cost or vCPUs by more than this share is proposed, and not adopted.
        approve: Put the plan of this flow in force that waits for approval; nothing is planned.
        proposal: Name of the plan that is approved, as its artifact has it; refused where another one waits by now.
        roll_back: Put the plan of this flow back in force that was before the one that is; nothing is planned.
        move: A plan in force that the machine of the newest run has no room for gives way to one that it has.

    Returns:
        What became of the plan, by flow name.
    """
    if proposal and not approve:
        raise InvalidValue("proposal", proposal, "given together with approve")
    if approve or roll_back:
        if flow_name is None or approve == roll_back:
            raise InvalidValue("flow_name", flow_name, "one flow, to approve its plan or to roll it back")
        plan, became = (approve_plan(flow_name, proposal), "approved") if approve else (back(flow_name), "rolled back")
        get_run_logger().info("%s: %s, in force now: %s", flow_name, became, _words(plan))
        return {flow_name: became}
    guard = Guard.of(min_change, max_change)
    reasons = for_each(flow_name, lambda name: replan_flow(name, guard=guard, move=move))
    for name, reason in reasons.items():
        get_run_logger().info("%s: %s", name, reason)
    return reasons


def _words(plan: Plan) -> str:
    stages = "; ".join(f"{name} {stage.workers} × {stage.size}" for name, stage in plan.stages.items())
    return f"plan {plan_digest(plan)}, {stages}"


if __name__ == "__main__":
    replan()
