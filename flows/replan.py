"""Plan flows again by the models that their profiles hold; deploy it on a schedule, or run it once.

It learns nothing: after a new price list or a new version of the package a plan may pay that didn't before.

``python flows/replan.py`` plans every flow that has telemetry and a bound.
"""

from __future__ import annotations

from prefect import flow, get_run_logger

from prefect_slo.loop.learning import replan_flow
from prefect_slo.telemetry.store import observed_flows


@flow(name="slo-replan")
def replan(flow_name: str | None = None) -> dict[str, str]:
    """Put another plan in force where that pays.

    Args:
        flow_name: Name of a flow; all that have telemetry where it is missing.

    Returns:
        What became of the plan, by flow name.
    """
    reasons = {}
    for name in (flow_name,) if flow_name else observed_flows():
        reasons[name] = replan_flow(name)
        get_run_logger().info("%s: %s", name, reasons[name])
    return reasons


if __name__ == "__main__":
    replan()
