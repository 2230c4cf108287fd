"""What a report of a flow says."""

from __future__ import annotations

from prefect_slo.attainment import Attainment
from prefect_slo.loop.reporting import FlowReport
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Size

BY_HAND = Plan("films", None, {"cut": StagePlan(4, Size(1, 512))})


def reported(plan: Plan | None) -> str:
    """The lines for a flow with that plan in force, another that waits, and too little room."""
    return "\n".join(
        FlowReport(
            flow_name="films", revision=3, slo=None, missing="", plan=plan, reason="approved: by hand",
            waits="it is better", proposal="5eeb2f00d001", lacks="4 vCPUs at once where there are 2", runs=2,
            attainment=Attainment(1, 2), latency_s=(3.0, 5.0), cost_usd=(0.1, 0.1), stages=(),
        ).lines()
    )  # fmt: skip


def test_a_plan_that_nobody_has_predicted_is_in_force_all_the_same() -> None:
    told = reported(BY_HAND)
    for words in ("In force: approved: by hand", "waits for approval", "4 vCPUs at once", "1 of 2 runs kept the bound"):
        assert words in told
    assert "Predicted" not in told
    assert "No plan is in force" not in told


def test_without_a_plan_in_force_nothing_is_said_of_one() -> None:
    assert reported(None).endswith("No plan is in force.")
