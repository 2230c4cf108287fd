"""What happens when a run has ended: it is written down, compared with its plan, and learned from when it is time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.logging import get_logger

from prefect_slo.artifacts.forecast import RunActual, StageForecast
from prefect_slo.artifacts.publishing import publish_attainment, publish_plan
from prefect_slo.attainment import Attainment
from prefect_slo.blocks import fold_in, put_in_force
from prefect_slo.loop import policy
from prefect_slo.loop.knowledge import Knowledge, knowledge, remember
from prefect_slo.loop.menus import with_menus
from prefect_slo.loop.planning import Decision, plan_digest, replan
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan
from prefect_slo.runner.recipe import ObservedRun
from prefect_slo.settings import SLOSettings
from prefect_slo.telemetry import RunLog, StageKey, Status
from prefect_slo.telemetry.store import publish_log, sweep_orphans

if TYPE_CHECKING:
    from prefect_slo.loop.director import LoopDirector


class Learner:
    """Takes in one ended run of a decorated flow.

    Args:
        director: The flow's director.
        decision: How the run was run.
    """

    def __init__(self, director: LoopDirector, decision: Decision) -> None:
        self._director, self._decision = director, decision

    def take(self, run: ObservedRun, log: RunLog | None, *, learn: bool) -> None:
        """Write the run down, show it, and learn where it is time. Never raises for an API that is down."""
        met = self._met(run)
        if log is not None:
            self._write(run, log, met)
            publish_log(log)
        if not learn:
            return
        self._show(run, met)
        try:
            self._learn(run)
        except Exception as error:
            get_logger("slo").warning(
                "%s: nothing was learned from this run yet (%s: %s); a later one will.",
                run.flow_name, type(error).__name__, error,
            )  # fmt: skip

    def _write(self, run: ObservedRun, log: RunLog, met: bool) -> None:
        on_threads = sorted(name for name, seen in run.stages.items() if seen.pickles is False)
        if run.workflow is not None:
            declarations = run.declarations
            workflow = with_menus(run.workflow, self._director.menu, declarations, frozenset(on_threads))
            log.workflow(workflow.to_document())
        features = self._features(run)
        for row in run.stage_runs:
            seen = run.stages[row.stage]
            planned = self._decision.plan.stages.get(row.stage) if self._decision.plan is not None else None
            key = StageKey(seen.key, seen.source, row.hardware)
            log.stage_run(row, key, knobs=dict(planned.knobs) if planned is not None else None, features=features)
        status: Status = "completed" if run.clean else "failed"
        log.end(status, latency_s=run.latency_s, met=met, cost_usd=run.cost_usd, on_threads=on_threads)

    def _features(self, run: ObservedRun) -> dict[str, float]:
        if self._director.features is None:
            return {}
        try:
            return {name: float(value) for name, value in self._director.features(run.parameters).items()}
        except Exception as error:
            get_logger("slo").warning("%s: features failed (%s: %s).", run.flow_name, type(error).__name__, error)
            return {}

    def _met(self, run: ObservedRun) -> bool:
        slo = self._director.slo
        latency = slo.latency is None or not run.latency_s > slo.latency.bound_s
        return latency and (slo.budget is None or run.cost_usd <= slo.budget.bound_usd)

    def _show(self, run: ObservedRun, met: bool) -> None:
        """Predicted against actual, as an artifact of the run."""
        plan = self._decision.plan
        if plan is None or plan.predicted is None or not run.clean or not math.isfinite(run.latency_s):
            return
        known = knowledge(run.flow_name)
        name = plan_digest(plan)
        earlier = [past for past in known.past if past.plan == name]
        attainment = Attainment(sum(past.met for past in earlier) + met, len(earlier) + 1)
        actual = RunActual(run.latency_s, run.cost_usd, {row.stage: row.wall_s for row in run.stage_runs})
        publish_attainment(
            run.flow_name,
            plan,
            actual,
            attainment=attainment,
            forecasts=forecasts(known.model, plan) if known.model is not None else None,
            history=[RunActual(past.latency_s) for past in earlier if math.isfinite(past.latency_s)],
            flow_run_id=_uuid(run.run_id),
        )

    def _learn(self, run: ObservedRun) -> None:
        known = knowledge(run.flow_name)
        seen = known.past
        latest = policy.PastRun(self._decision.digest, run.latency_s, self._predicted(), met=self._met(run))
        waiting = _waiting.setdefault(run.flow_name, [])
        if run.clean:
            waiting.append(latest)
        off = policy.drifting([*seen, *waiting])
        if not policy.due(len(waiting), len(seen), drifting=off):
            return
        learn(run.flow_name, self._director.slo, seed=self._director.seed)

    def _predicted(self) -> float:
        plan = self._decision.plan
        return plan.predicted.latency_s.mean if plan is not None and plan.predicted is not None else math.nan


_waiting: dict[str, list[policy.PastRun]] = {}
"""Runs of this process that are stored but not folded in, by flow: what says when it is time."""


def learn(flow_name: str, slo: Slo, *, seed: int = 0, refit: bool = False) -> Knowledge:
    """Fold new runs in, fit, plan again where that pays, and put the plan in force.

    Args:
        flow_name: Name of the flow.
        slo: What is asked.
        seed: Of the planner's draws.
        refit: Fit even where no run is new.

    Raises:
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached.
    """
    sweep_orphans_here()
    profile = fold_in(flow_name, objective=_objective(slo), refit=refit)
    _waiting.pop(flow_name, None)
    known = remember(flow_name, profile)
    plan, reason = replan(known, slo, seed=seed)
    if plan is None or (known.plan is not None and reason == "kept"):
        return known
    known = remember(flow_name, put_in_force(flow_name, plan, reason))
    assert known.workflow is not None
    publish_plan(
        flow_name,
        plan,
        workflow=known.workflow,
        forecasts=forecasts(known.model, plan) if known.model is not None else None,
    )
    return known


def sweep_orphans_here() -> None:
    """Pick up logs that crashed or offline runs of this machine have left."""
    sweep_orphans(SLOSettings().telemetry_directory)


def forecasts(model: WorkflowModel, plan: Plan) -> dict[str, StageForecast]:
    """What the model says of each stage under a plan."""
    samples = model.predict(plan, n_samples=4000, seed=plan.seed).samples
    found = {}
    for name, latency in samples.stage_latency_s.items():
        p95 = float(sorted(latency)[int(0.95 * len(latency))])
        found[name] = StageForecast(float(latency.mean()), p95, float(samples.stage_cost_usd[name].mean()))
    return found


def _objective(slo: Slo) -> dict[str, Any]:
    return {
        "latency_s": slo.latency.bound_s if slo.latency else None,
        "budget_usd": slo.budget.bound_usd if slo.budget else None,
        "percentile": slo.percentile,
        "confidence": slo.confidence,
    }


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
