"""Fold what runs have left in the API into profiles, fit and plan again; deploy it, or run it once.

It does what ``prefect-slo refit`` does.

``python flows/refit.py`` refits every flow that has telemetry.
"""

from __future__ import annotations

from prefect import flow, get_run_logger

from prefect_slo.loop.guard import Guard
from prefect_slo.loop.learning import refit as learn_again
from prefect_slo.loop.maintenance import for_each


@flow(name="slo-refit")
def refit(
    flow_name: str | None = None,
    rebuild: bool = False,
    min_change: float | None = None,
    max_change: float | None = None,
    move: bool = False,
) -> dict[str, str]:
    """Bring profiles up to date, and put another plan in force where that pays.

    Args:
        flow_name: Name of a flow; all that have telemetry where it is missing.
        rebuild: Learn everything anew from the API, instead of adding what is new.
        min_change: A plan that is better by less than this share doesn't replace the one in force.
        max_change: A plan that changes latency, cost or vCPUs by more than this share is proposed, and not adopted.
        move: A plan in force that the machine of the newest run has no room for gives way to one that it has.

    Returns:
        What became of the plan, by flow name.
    """
    guard = Guard.of(min_change, max_change)
    reasons = for_each(flow_name, lambda name: learn_again(name, rebuild=rebuild, guard=guard, move=move))
    for name, reason in reasons.items():
        get_run_logger().info("%s: %s", name, reason)
    return reasons


if __name__ == "__main__":
    refit()
