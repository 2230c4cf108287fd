"""Plan flows again on what is known of them now; deploy it on a schedule, or run it once.

``python flows/replan.py`` plans every flow that has telemetry and a bound.
"""

from __future__ import annotations

from prefect import flow, get_run_logger

from prefect_slo.loop.learning import refit
from prefect_slo.telemetry.store import observed_flows


@flow(name="slo-replan")
def replan(flow_name: str | None = None) -> dict[str, str]:
    """Fold in what is new, fit, and put another plan in force where that pays.

    Args:
        flow_name: Name of a flow; all that have telemetry where it is missing.

    Returns:
        What became of the plan, by flow name.
    """
    reasons = {}
    for name in (flow_name,) if flow_name else observed_flows():
        reasons[name] = refit(name)
        get_run_logger().info("%s: %s", name, reasons[name])
    return reasons


if __name__ == "__main__":
    replan()
