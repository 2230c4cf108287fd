"""Learning of runs that are stored: they are folded in, the model is fitted, and planned by where that pays."""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

from prefect_slo.artifacts.forecast import stage_forecasts
from prefect_slo.artifacts.publishing import key, publish_plan, publish_proposal, publish_settled
from prefect_slo.blocks import (
    SLOProfile,
    fold_in,
    plan_from_history,
    propose,
    put_in_force,
    rebuild_profile,
    update_profile,
)
from prefect_slo.errors import InvalidPlan
from prefect_slo.loop import hosts
from prefect_slo.loop.guard import Guard
from prefect_slo.loop.knowledge import Knowledge, remember, remember_plan
from prefect_slo.loop.policy import PastRun
from prefect_slo.loop.replanning import CHANGED, KEPT, fits, plan_digest, predicted_now, replan
from prefect_slo.loop.reporting import objective_of
from prefect_slo.loop.saying import say_once
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan
from prefect_slo.runner.notices import flow_run
from prefect_slo.settings import SLOSettings
from prefect_slo.telemetry.store import sweep_orphans
from prefect_slo.transform import with_passing

MOVED = 0.02
"""A plan that is kept gets its new prediction stored where that has moved by 2 %."""

SUPERSEDED = "another run has written to the profile meanwhile, and plans by what it has seen"


class _Unlearned:
    """Runs of this process that are stored but not folded in, by flow: what says when it is time to learn."""

    def __init__(self) -> None:
        self._runs: defaultdict[str, list[PastRun]] = defaultdict(list)
        self._lock = threading.Lock()

    def add(self, flow_name: str, run: PastRun) -> None:
        with self._lock:
            self._runs[flow_name].append(run)

    def of(self, flow_name: str) -> tuple[PastRun, ...]:
        with self._lock:
            return tuple(self._runs[flow_name])

    def learned(self, flow_name: str, runs: int) -> None:
        """So many of them, the oldest, are folded in."""
        with self._lock:
            del self._runs[flow_name][:runs]


UNLEARNED = _Unlearned()


def learn(flow_name: str, slo: Slo, *, seed: int = 0, refit: bool = False, timeout_s: float | None = None) -> Knowledge:
    """Fold new runs in, fit, plan again where that pays, and put the plan in force.

    Args:
        flow_name: Name of the flow.
        slo: What is asked.
        seed: Of the planner's draws.
        refit: Fit even where no run is new.
        timeout_s: How long to wait for another writer; by default as long as the settings say.

    Raises:
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached.
    """
    settings = SLOSettings()
    wait_s = settings.fold_timeout_s if timeout_s is None else timeout_s
    sweep_orphans(settings.telemetry_directory)
    waiting = len(UNLEARNED.of(flow_name))
    profile = fold_in(flow_name, objective=_objective(slo), refit=refit, timeout_s=wait_s)
    UNLEARNED.learned(flow_name, waiting)
    return _planned_again(remember(flow_name, profile), slo, seed, wait_s, profile)[0]


def refit(
    flow_name: str, *, rebuild: bool = False, seed: int = 0, guard: Guard | None = None, move: bool = False
) -> str:
    """Bring a flow's model and plan up to date from what the API holds, without a run; says what became of the plan.

    Args:
        flow_name: Name of the flow.
        rebuild: Learn everything anew, instead of adding what is new.
        seed: Of the planner's draws.
        guard: How different a plan may be that comes into force; by default as the settings say.
        move: Whether a plan that the machine of the newest run has no room for gives way to one that it has.

    Raises:
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached.
    """
    settings = SLOSettings()
    sweep_orphans(settings.telemetry_directory)
    timeout_s = settings.fold_timeout_s
    if rebuild:
        profile = rebuild_profile(flow_name, timeout_s=timeout_s)
    else:
        profile = fold_in(flow_name, refit=True, timeout_s=timeout_s)
    return _replanned(flow_name, profile, seed, guard, move=move)


def replan_flow(flow_name: str, *, seed: int = 0, guard: Guard | None = None, move: bool = False) -> str:
    """Plan a flow again by the model that its profile holds, without learning; says what became of the plan.

    Args:
        flow_name: Name of the flow.
        seed: Of the planner's draws.
        guard: As of ``refit``.
        move: Likewise.

    Raises:
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached.
    """
    profile = SLOProfile.of_flow(flow_name)
    if profile is None:
        return "it has no profile yet"
    return _replanned(flow_name, profile, seed, guard, move=move)


def _replanned(flow_name: str, profile: SLOProfile, seed: int, guard: Guard | None, *, move: bool) -> str:
    known, slo = remember(flow_name, profile), objective_of(profile)
    if slo is None:
        return "no bound is known"
    return _planned_again(known, slo, seed, SLOSettings().fold_timeout_s, profile, guard, move=move)[1]


def _planned_again(
    known: Knowledge, slo: Slo, seed: int, timeout_s: float, learned: SLOProfile, guard: Guard | None = None,
    *, move: bool = False,
) -> tuple[Knowledge, str]:  # fmt: skip
    """Put another plan in force where that pays, or propose it where the guard objects; what is known then, and why.

    Where somebody has written to the profile since it was read, theirs counts: they have seen at least as much, and
    plan themselves. A plan that lacks nothing but room or GPUs on the machine of the newest run stays in force for
    machines that have them; that one makes a plan of its own for its runs (``decide``).
    """
    lack = _lack(known, slo)
    if lack and not move:
        return known, f"{KEPT} for machines that hold it: it takes {lack} on the machine of the newest run"
    flow_name, guard = known.flow_name, guard or Guard.of()
    unfit = f"moved: it took {lack}" if lack else CHANGED
    plan, reason = replan(known, slo, seed=seed, earlier=earlier_plans(known), margin=guard.min_change, unfit=unfit)
    if plan is not None and known.workflow is not None and (training := learned.training()) is not None:
        plan = with_passing(plan, known.workflow, training.stage_runs)
    if plan is None or known.workflow is None or (reason == KEPT and not _moved(known.plan, plan)):
        return known, reason
    if reason != KEPT and (objection := _objection(known, plan, slo, guard, learned.declined)):
        return _proposed(known, plan, reason, objection, timeout_s, learned)
    if reason == KEPT:
        document = plan.to_document()
        profile = update_profile(
            flow_name,
            lambda p: p.model_copy(update={"plan": document}) if p.revision == known.revision else p,
            timeout_s=timeout_s,
        )
    else:
        profile = put_in_force(flow_name, plan, reason, timeout_s=timeout_s, revision=known.revision)
    if profile.revision != known.revision + 1 or profile.plan != plan.to_document():
        return remember(flow_name, profile), SUPERSEDED
    if known.model is not None:
        known.forecasts[plan_digest(plan)] = stage_forecasts(known.model, plan)
    if learned.proposal is not None and reason != KEPT:
        publish_settled(flow_name, f"gave way to another that is in force ({reason})", flow_run_id=flow_run())
    publish_plan(flow_name, plan, workflow=known.workflow, forecasts=known.forecasts.get(plan_digest(plan)))
    return remember_plan(known, profile), reason


def _lack(known: Knowledge, slo: Slo) -> str:
    """What the plan in force takes and the machine of the newest run has not, in words; empty where that is not all."""
    if known.plan is None or known.workflow is None:
        return ""
    return hosts.waiting(known.plan, known.workflow, slo)


def _objection(known: Knowledge, plan: Plan, slo: Slo, guard: Guard, declined: Collection[str]) -> str:
    """Why the guard keeps the plan in force; one that no run could follow any more is replaced in any case."""
    if known.plan is None or known.workflow is None or not fits(known.plan, known.workflow, slo):
        return ""
    objection = guard.objection(predicted_now(known, known.plan), plan, declined)
    tried = {plan_digest(earlier) for earlier in earlier_plans(known)} if objection else set()
    return "" if plan_digest(plan) in tried - set(declined) else objection


def _proposed(
    known: Knowledge, plan: Plan, reason: str, objection: str, timeout_s: float, learned: SLOProfile
) -> tuple[Knowledge, str]:
    """Keep a plan for approval and show it, once for the same choices."""
    name, flow_name = plan_digest(plan), known.flow_name
    why = f"{reason}; it waits, since {objection}"
    said = f"proposed: {why}"
    if learned.proposed == name:
        return known, said
    profile = propose(flow_name, plan, why, name, timeout_s=timeout_s, revision=known.revision)
    if profile.proposed != name:
        return remember(flow_name, profile), SUPERSEDED
    if known.plan is not None:
        before = predicted_now(known, known.plan)
        publish_proposal(flow_name, before, plan, name=name, reason=reason, objection=objection, flow_run_id=flow_run())
    message = f"plan {name} waits for approval: {why}. See artifact {key('proposal', flow_name)}."
    say_once(flow_name, message, level=logging.WARNING, about=f"proposal {name}")
    return remember_plan(known, profile), said


def earlier_plans(known: Knowledge) -> Iterator[Plan]:
    """Plans that were in force before the one that is, newest first; those that are gone are left out."""
    for entry in reversed(known.history):
        try:
            plan = plan_from_history(entry)
        except InvalidPlan:
            continue
        if plan is not None:
            yield plan


def _moved(before: Plan | None, after: Plan) -> bool:
    if before is None or before.predicted is None or after.predicted is None:
        return True
    if [(e.source, e.sink, e.method) for e in before.passing] != [(e.source, e.sink, e.method) for e in after.passing]:
        return True
    old, new = before.predicted, after.predicted
    if before.certificate is not None and after.certificate is not None:
        known, counted = before.certificate.calibration_runs, after.certificate.calibration_runs
        if counted > 1.25 * known or counted < known:
            return True
    pairs = (
        (old.latency_s.mean, new.latency_s.mean),
        (old.latency_at_percentile_s, new.latency_at_percentile_s),
        (old.cost_usd.mean, new.cost_usd.mean),
    )
    return any(not math.isclose(a, b, rel_tol=MOVED) for a, b in pairs)


def _objective(slo: Slo) -> dict[str, Any]:
    return {
        "latency_s": slo.latency.bound_s if slo.latency else None,
        "budget_usd": slo.budget.bound_usd if slo.budget else None,
        "percentile": slo.percentile,
        "confidence": slo.confidence,
    }
