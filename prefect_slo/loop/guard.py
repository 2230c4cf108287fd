"""A guard over re-plans: an unusually different plan is proposed instead of adopted, for somebody to approve.

A plan that is better by too little doesn't replace the one in force (``min_change``), and one that changes a run's
latency, cost or reserved vCPUs by too much (``max_change``) doesn't either: it waits in the flow's profile, shown as
the artifact ``slo-proposal-<flow>``, until it is approved or another plan comes into force. A flow can be rolled back
to the plan before the one in force; choices that somebody rolled back from are never taken again unasked.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from prefect_slo.artifacts.forecast import stage_forecasts
from prefect_slo.artifacts.publishing import publish_plan, publish_settled
from prefect_slo.artifacts.text import share_text
from prefect_slo.blocks import SLOProfile, plan_from_history, put_in_force
from prefect_slo.errors import InvalidPlan, NothingProposed, OtherPlanProposed
from prefect_slo.loop import policy
from prefect_slo.loop.knowledge import Knowledge, forget
from prefect_slo.loop.replanning import plan_digest, predicted_now
from prefect_slo.plan import Plan
from prefect_slo.runner.notices import flow_run, run_logger
from prefect_slo.settings import SLOSettings
from prefect_slo.units import fraction, positive

UNKNOWN = "Check the flow's name (prefect flow ls), or run it once."

SHORT = 6
"""Characters of a plan's name that stand for it: among 16 million, nobody takes one for another by mistake."""


@dataclass(frozen=True)
class Guard:
    """How different a plan may be that replaces another.

    Attributes:
        min_change: Share by which it has to be better.
        max_change: Share by which it may change latency, cost or vCPUs; 0.5 lets a run be half longer, or take two
            thirds of the time.
    """

    min_change: float = policy.MARGIN
    max_change: float = math.inf

    def __post_init__(self) -> None:
        if self.min_change != 0:
            fraction(self.min_change, "min_change")
        if math.isfinite(self.max_change):
            positive(self.max_change, "max_change")

    @classmethod
    def of(cls, min_change: float | None = None, max_change: float | None = None) -> Self:
        """A guard; what isn't given is as the settings say.

        Raises:
            InvalidValue: A share that can't be.
        """
        settings = SLOSettings()
        most = settings.max_change if max_change is None else max_change
        return cls(settings.min_change if min_change is None else min_change, math.inf if most is None else most)

    def objection(self, before: Plan, after: Plan, declined: Collection[str] = ()) -> str:
        """Why a plan is not adopted in place of another, in words; empty where it is.

        Args:
            before: The plan in force.
            after: The other one.
            declined: Names of choices that somebody rolled back from.
        """
        if plan_digest(after) in declined:
            return "somebody rolled back from it"
        found, what = change(before, after)
        if found > self.max_change:
            by = f"by {share_text(found)}" if math.isfinite(found) else "from or to nothing"
            return f"it changes {what} {by}, and {share_text(self.max_change)} is let through"
        return ""


def change(before: Plan, after: Plan) -> tuple[float, str]:
    """The largest relative change from one plan to another, and of what: latency, cost or reserved vCPUs.

    With ``a`` and ``b`` the two values, a change is ``max(a / b, b / a) − 1``, the same in both directions.
    """
    pairs = {"vCPUs": (_vcpus(before), _vcpus(after))}
    if before.predicted is not None and after.predicted is not None:
        old, new = before.predicted, after.predicted
        pairs["latency"] = (old.latency_at_percentile_s, new.latency_at_percentile_s)
        pairs["cost"] = (old.cost_usd.mean, new.cost_usd.mean)
    return max((_relative(a, b), what) for what, (a, b) in pairs.items())


def _relative(before: float, after: float) -> float:
    """A change from nothing, or to nothing, is without bound; an unknown value changes nothing."""
    if math.isnan(before) or math.isnan(after) or before == after:
        return 0.0
    least, most = sorted((before, after))
    return most / least - 1.0 if least > 0 else math.inf


@dataclass(frozen=True)
class Proposal:
    """A plan that waits for approval.

    Attributes:
        name: Names it: its choices, whatever it predicts.
        reason: Why it was made, and why it waits.
        plan: The plan, as it was predicted when it was made.
    """

    name: str
    reason: str
    plan: Plan


def proposal(flow_name: str) -> Proposal:
    """The plan that waits for approval.

    Raises:
        NothingProposed: None does.
        httpx.HTTPError: The API cannot be reached.
    """
    return _proposal(_profile(flow_name))


def approve(flow_name: str, seen: str = "", *, timeout_s: float | None = None) -> Plan:
    """Put the proposed plan in force, as it is predicted now, and return it.

    Args:
        flow_name: Name of the flow.
        seen: Name of the plan that was looked at, or the first characters of it; empty takes the one that waits.
        timeout_s: How long to wait for another writer; by default as long as the settings say.

    Raises:
        NothingProposed: No plan waits for approval.
        OtherPlanProposed: It is not the one that was seen: another one waits by now.
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached.
    """
    profile = _profile(flow_name)
    waits = _proposal(profile)
    if seen and not (waits.name == seen or (len(seen) >= SHORT and waits.name.startswith(seen))):
        raise OtherPlanProposed(flow_name, seen, waits.name)
    known = Knowledge.of(flow_name, profile)
    plan = predicted_now(known, waits.plan)
    written = put_in_force(
        flow_name, plan, f"approved: {waits.reason}", timeout_s=_patience_s(timeout_s), proposal=waits.name,
        accept=[plan_digest(plan)],
    )  # fmt: skip
    if written.plan != plan.to_document():  # somebody was faster
        raise OtherPlanProposed(flow_name, waits.name, written.proposed)
    publish_settled(flow_name, "was approved and is in force", flow_run_id=flow_run())
    _shown(known, plan)
    return plan


def roll_back(flow_name: str, *, timeout_s: float | None = None) -> Plan:
    """Put the plan back in force that was before the one that is, as it is predicted now, and return it.

    Raises:
        NothingProposed: There was no other plan before, or it is gone.
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached.
    """
    profile = _profile(flow_name)
    current = profile.plan_in_force()
    for entry in reversed(profile.plan_history[:-1]):
        try:
            plan = plan_from_history(entry)
        except InvalidPlan:
            continue
        if plan is None or (current is not None and plan_digest(plan) == plan_digest(current)):
            continue
        known = Knowledge.of(flow_name, profile)
        plan = predicted_now(known, plan)
        declined = [plan_digest(current)] if current is not None else []
        why = f"rolled back by hand to the plan of revision {entry['revision']}"
        put_in_force(
            flow_name, plan, why, timeout_s=_patience_s(timeout_s), decline=declined, accept=[plan_digest(plan)]
        )
        if profile.proposal is not None:
            publish_settled(flow_name, "was left: somebody rolled back to another one", flow_run_id=flow_run())
        _shown(known, plan)
        return plan
    raise NothingProposed(
        flow_name, "no other plan was in force before", "Only a plan that was in force can come back."
    )


def _profile(flow_name: str) -> SLOProfile:
    """What is stored of a flow.

    Raises:
        NothingProposed: Nothing is.
    """
    profile = SLOProfile.of_flow(flow_name)
    if profile is None:
        raise NothingProposed(flow_name, "nothing is known of it", UNKNOWN)
    return profile


def _proposal(profile: SLOProfile) -> Proposal:
    if profile.proposal is None:
        then = "A plan does once a re-plan (prefect-slo refit) makes one that the guard lets no further."
        raise NothingProposed(profile.flow_name, "no plan waits for approval", then)
    kept = profile.proposal
    return Proposal(profile.proposed, str(kept["reason"]), Plan.from_document(kept["plan"]))


def _shown(known: Knowledge, plan: Plan) -> None:
    """Show a plan that has come into force by hand, to whoever looks and to the next run, as far as that can be."""
    forget(known.flow_name)
    if known.workflow is not None and plan.predicted is not None:
        forecasts = None
        try:
            forecasts = stage_forecasts(known.model, plan) if known.model is not None else None
        except Exception as error:
            run_logger().warning("%s: no forecast of its stages is shown (%r)", known.flow_name, error)
        publish_plan(known.flow_name, plan, workflow=known.workflow, forecasts=forecasts)


def _patience_s(timeout_s: float | None) -> float:
    return SLOSettings().fold_timeout_s if timeout_s is None else timeout_s


def _vcpus(plan: Plan) -> float:
    return sum(stage.workers * stage.size.vcpus for stage in plan.stages.values())
