"""How a flow stands: what is asked, what is in force, how often it was kept, and what is known of each stage."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from shlex import quote
from typing import Any

from prefect_slo.artifacts.forecast import StageForecast, stage_forecasts
from prefect_slo.artifacts.text import dollars_text, seconds_text, share_text
from prefect_slo.attainment import Attainment
from prefect_slo.blocks import SLOProfile
from prefect_slo.errors import UnknownFlow
from prefect_slo.loop.hosts import waiting
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.loop.replanning import plan_digest
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.telemetry.learned import measured
from prefect_slo.telemetry.ledger import Ledger


@dataclass(frozen=True)
class StageReport:
    """What is known of one stage.

    Attributes:
        name: Its name.
        rows: Rows that its model is fitted to.
        settings: Different settings among them.
        borrowed: Rows that were measured elsewhere.
        identified: Whether it can be planned.
        reason: Why, or why not.
        plan: Its part of the plan in force.
        forecast: What the model predicts of it under that plan.
        actual_s: Median wall time of its runs at that setting; ``nan`` before the first.
        actual_runs: How many there were.
    """

    name: str
    rows: int
    settings: int
    borrowed: int
    identified: bool
    reason: str
    plan: StagePlan | None
    forecast: StageForecast | None
    actual_s: float
    actual_runs: int


@dataclass(frozen=True)
class FlowReport:
    """How a flow stands.

    Attributes:
        flow_name: Its name.
        revision: Of its profile.
        slo: What is asked; ``None`` where no decorated run said so yet.
        missing: Why it can't be planned yet; empty when it can.
        plan: The plan in force.
        reason: Why it is.
        waits: Why another plan was made and waits for approval, in words; empty where none does.
        proposal: Names that one.
        lacks: What it takes that the machine of the newest run has not, in words; empty where it has room.
        runs: Completed runs that are known.
        attainment: Of the runs that followed the plan in force and completed or timed out.
        latency_s: Of those of them that completed, oldest first.
        cost_usd: Likewise.
        stages: In the order of the graph.
    """

    flow_name: str
    revision: int
    slo: Slo | None
    missing: str
    plan: Plan | None
    reason: str
    waits: str
    proposal: str
    lacks: str
    runs: int
    attainment: Attainment
    latency_s: tuple[float, ...]
    cost_usd: tuple[float, ...]
    stages: tuple[StageReport, ...]

    def to_document(self) -> dict[str, Any]:
        """All figures, for ``--json``."""
        return {
            "flow": self.flow_name,
            "revision": self.revision,
            "objective": str(self.slo) if self.slo is not None else None,
            "can_be_planned": not self.missing,
            "missing": self.missing,
            "plan": self.plan.to_document() if self.plan is not None else None,
            "reason": self.reason,
            "waits_for_approval": self.waits or None,
            "proposal": self.proposal or None,
            "lacks": self.lacks or None,
            "runs": self.runs,
            "attainment": {
                "met": self.attainment.met,
                "runs": self.attainment.runs,
                "interval_95": list(self.attainment.interval()),
            },
            "actual": {"latency_s": list(self.latency_s), "cost_usd": list(self.cost_usd)},
            "stages": [_stage_document(stage) for stage in self.stages],
        }

    def lines(self) -> tuple[str, ...]:
        """The report in sentences, without its stages."""
        lines = [f"{self.flow_name}: {self.slo or 'no bound is known'}; {self.runs} completed runs are known."]
        if self.missing:
            lines.append(f"It can't be planned yet: {self.missing}.")
        if self.plan is None:
            return (*lines, "No plan is in force.")
        certified = "certified" if self.plan.certificate is not None else "not certified"
        lines.append(f"In force: {self.reason} ({certified}).")
        name = quote(self.flow_name)
        if self.waits:
            lines.append(
                f"Another plan waits for approval: {self.waits}. To put it in force: "
                f"prefect-slo approve {name} {self.proposal}."
            )
        if self.lacks:
            lines.append(
                f"It takes {self.lacks} on the machine of the newest run, which went by a plan of its own. To put one "
                f"in force for that machine: prefect-slo refit {name} --move."
            )
        if (predicted := self.plan.predicted) is not None:
            lines.append(
                f"Predicted: {seconds_text(predicted.latency_s.mean)} on average, "
                f"{seconds_text(predicted.latency_at_percentile_s)} at the percentile, "
                f"{dollars_text(predicted.cost_usd.mean)} a run."
            )
        if self.attainment.runs:
            low, high = self.attainment.interval()
            took = "no run completed; "
            if self.latency_s:
                took = (
                    f"{seconds_text(statistics.fmean(self.latency_s))} on average, at most "
                    f"{seconds_text(max(self.latency_s))}, {dollars_text(statistics.fmean(self.cost_usd))} a run; "
                )
            lines.append(
                f"Actual: {took}{self.attainment.met} of {self.attainment.runs} runs kept the bound "
                f"(95 % interval {share_text(low)} to {share_text(high)})."
            )
        else:
            lines.append("No run has followed it yet.")
        return tuple(lines)


def report(flow_name: str) -> FlowReport:
    """How a flow stands, by its profile.

    Raises:
        UnknownFlow: Nothing is known of it.
        httpx.HTTPError: The API cannot be reached.
    """
    profile = SLOProfile.of_flow(flow_name)
    if profile is None:
        hint = "Check the flow's name (prefect flow ls), run it once, or import its history."
        raise UnknownFlow(flow_name, hint)
    known, slo = Knowledge.of(flow_name, profile), objective_of(profile)
    name = plan_digest(known.plan) if known.plan is not None else ""
    counted = [run for run in known.past if name and run.plan == name]
    followed = [run for run in counted if math.isfinite(run.latency_s) and not run.timed_out]
    reason = str(profile.plan_history[-1]["reason"]) if profile.plan_history else ""
    return FlowReport(
        flow_name=flow_name,
        revision=profile.revision,
        slo=slo,
        missing=known.missing(),
        plan=known.plan,
        reason=reason,
        waits=str(profile.proposal["reason"]) if profile.proposal is not None else "",
        proposal=profile.proposed,
        lacks=_lacks(known, slo),
        runs=sum(not run.timed_out for run in known.past),
        attainment=Attainment(sum(slo is None or run.met(slo) for run in counted), len(counted)),
        latency_s=tuple(run.latency_s for run in followed),
        cost_usd=tuple(run.cost_usd for run in followed),
        stages=_stages(known, profile),
    )


def objective_of(profile: SLOProfile) -> Slo | None:
    """What the flow's decorator asked for when it was learned from last; ``None`` where nobody has asked."""
    asked = profile.objective
    if not asked or (asked.get("latency_s") is None and asked.get("budget_usd") is None):
        return None
    at = (asked["percentile"], asked["confidence"])
    latency, budget = asked.get("latency_s"), asked.get("budget_usd")
    return Slo(
        Latency(latency, *at) if latency is not None else None, Budget(budget, *at) if budget is not None else None
    )


def _lacks(known: Knowledge, slo: Slo | None) -> str:
    if known.plan is None or known.workflow is None or slo is None:
        return ""
    return waiting(known.plan, known.workflow, slo)


def _stages(known: Knowledge, profile: SLOProfile) -> tuple[StageReport, ...]:
    if known.workflow is None:
        return ()
    plan, model, coverage, ledger = known.plan, known.model, profile.coverage(), profile.ledger()
    order = known.workflow.order
    planned = {name: plan.stages[name] for name in order if plan is not None and name in plan.stages}
    forecasts = (
        stage_forecasts(model, plan) if model is not None and plan is not None and len(planned) == len(order) else {}
    )
    found = []
    for name in order:
        verdict = known.fitted.verdict(name) if known.fitted is not None else None
        actual_s, runs = _actual(ledger, name, planned.get(name))
        found.append(
            StageReport(
                name=name,
                rows=coverage[name].rows,
                settings=coverage[name].settings,
                borrowed=coverage[name].borrowed,
                identified=verdict is not None and verdict.identified,
                reason=verdict.reason if verdict is not None else profile.fit_note,
                plan=planned.get(name),
                forecast=forecasts.get(name),
                actual_s=actual_s,
                actual_runs=runs,
            )
        )
    return tuple(found)


def _actual(ledger: Ledger, stage: str, plan: StagePlan | None) -> tuple[float, int]:
    """Median wall time of a stage at the setting of its plan, and the number of runs behind it."""
    if plan is None:
        return math.nan, 0
    wanted = (plan.workers, float(plan.size.memory_mb), float(plan.size.vcpus), plan.size.kind)
    moments = [known.moments for setting, known in measured(ledger, stage).items() if setting[:4] == wanted]
    runs = sum(m.rows for m in moments)
    return (sum(m.rows * m.median_wall_s for m in moments) / runs, runs) if runs else (math.nan, 0)


def _stage_document(stage: StageReport) -> dict[str, Any]:
    forecast = stage.forecast
    return {
        "stage": stage.name,
        "rows": stage.rows,
        "settings": stage.settings,
        "borrowed": stage.borrowed,
        "identified": stage.identified,
        "reason": stage.reason,
        "predicted_mean_s": forecast.mean_s if forecast is not None else None,
        "predicted_p95_s": forecast.p95_s if forecast is not None else None,
        "actual_median_s": stage.actual_s,
        "actual_runs": stage.actual_runs,
    }
