"""What happens when a run has ended: it is written down, compared with its plan, and learned from when it is time."""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_slo.artifacts.forecast import RunActual, stage_forecasts
from prefect_slo.artifacts.publishing import publish_attainment, publish_plan
from prefect_slo.attainment import Attainment
from prefect_slo.blocks import fold_in, plan_from_history, put_in_force, rebuild_profile, update_profile
from prefect_slo.errors import InvalidPlan
from prefect_slo.loop import policy
from prefect_slo.loop.knowledge import UNPICKLED, Knowledge, impatient, knowledge, remember, remember_plan
from prefect_slo.loop.menus import with_menus
from prefect_slo.loop.planning import KEPT, Decision, plan_digest, replan
from prefect_slo.loop.policy import PastRun
from prefect_slo.loop.reporting import objective_of
from prefect_slo.loop.saying import say_once
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan
from prefect_slo.runner.recipe import ObservedRun
from prefect_slo.settings import SLOSettings
from prefect_slo.telemetry import RunLog, StageKey, Status
from prefect_slo.telemetry.store import publish_log, sweep_orphans

if TYPE_CHECKING:
    from prefect_slo.loop.director import LoopDirector

MOVED = 0.02
"""A plan that is kept gets its new prediction stored where that has moved by 2 %."""


class _Waiting:
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

    def clear(self, flow_name: str) -> None:
        with self._lock:
            self._runs.pop(flow_name, None)


_WAITING = _Waiting()


class Learner:
    """Takes in one ended run of a decorated flow.

    Args:
        director: The flow's director.
        decision: How the run was run.
    """

    def __init__(self, director: LoopDirector, decision: Decision) -> None:
        self._director, self._decision = director, decision

    def take(self, run: ObservedRun, log: RunLog | None, *, learn: bool) -> None:
        """Write the run down, show it, and learn where it is time. Never raises: each step that fails is said once."""
        past = self._past(run)
        with impatient():
            if log is not None:
                with _never_failing(run.flow_name, "its telemetry is incomplete"):
                    self._write(run, log, met=past.met(self._director.slo))
                publish_log(log)
            if not learn or not run.clean:
                return
            _WAITING.add(run.flow_name, past)
            with _never_failing(run.flow_name, "its plan was not compared with the run"):
                self._show(run)
        with _never_failing(run.flow_name, "nothing was learned from this run yet; a later one will"):
            self._learn(run.flow_name)

    def _past(self, run: ObservedRun) -> PastRun:
        plan = self._decision.followed
        predicted = math.nan if plan is None or plan.predicted is None or run.cached else plan.predicted.latency_s.mean
        return PastRun(self._decision.digest, run.latency_s, predicted, run.cost_usd)

    def _write(self, run: ObservedRun, log: RunLog, *, met: bool) -> None:
        unpickled = unpickled_stages(run, self._decision.on_threads)
        if run.workflow is not None:
            menus = (self._director.menu, run.declarations, frozenset(unpickled))
            log.workflow(with_menus(run.workflow, *menus).to_document())
        features = self._director.features_of(run.flow_name, run.parameters)
        plan = self._decision.followed
        for row in run.stage_runs:
            seen = run.stages[row.stage]
            planned = plan.stages.get(row.stage) if plan is not None else None
            log.stage_run(
                row,
                StageKey(seen.key, seen.source, row.hardware),
                status="cached" if seen.cached else "completed",
                knobs=dict(planned.knobs) if planned is not None else None,
                features=features,
            )
        if run.cached:
            log.note(predicted_s=None)  # a run that didn't do its work says nothing of the prediction
        log.note(**{f"{UNPICKLED}{stage}": source for stage, source in unpickled.items()})
        status: Status = "completed" if run.clean else "failed"
        log.end(status, latency_s=run.latency_s, met=met, cost_usd=run.cost_usd)

    def _show(self, run: ObservedRun) -> None:
        """Predicted against actual, as an artifact of the run."""
        plan, slo = self._decision.followed, self._director.slo
        if plan is None or plan.predicted is None or not math.isfinite(run.latency_s):
            return
        known = knowledge(run.flow_name)
        name = plan_digest(plan)
        followed = [past for past in (*known.past, *_WAITING.of(run.flow_name)) if past.plan == name]
        if known.model is not None and name not in known.forecasts:
            known.forecasts[name] = stage_forecasts(known.model, plan)
        publish_attainment(
            run.flow_name,
            plan,
            RunActual(run.latency_s, run.cost_usd, {row.stage: row.wall_s for row in run.stage_runs}),
            attainment=Attainment(sum(past.met(slo) for past in followed), len(followed)),
            forecasts=known.forecasts.get(name),
            history=[RunActual(past.latency_s) for past in followed[:-1] if math.isfinite(past.latency_s)],
            flow_run_id=_uuid(run.run_id),
        )

    def _learn(self, flow_name: str) -> None:
        known, waiting = knowledge(flow_name), _WAITING.of(flow_name)
        off = policy.drifting([*known.past, *waiting])
        if policy.due(len(waiting), len(known.past), drifting=off):
            learn(flow_name, self._director.slo, seed=self._director.seed)


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
    settings = SLOSettings()
    sweep_orphans(settings.telemetry_directory)
    profile = fold_in(flow_name, objective=_objective(slo), refit=refit, timeout_s=settings.fold_timeout_s)
    _WAITING.clear(flow_name)
    return _planned_again(remember(flow_name, profile), slo, seed)[0]


def refit(flow_name: str, *, rebuild: bool = False, seed: int = 0) -> str:
    """Bring a flow's model and plan up to date from what the API holds, without a run; says what became of the plan.

    Args:
        flow_name: Name of the flow.
        rebuild: Learn everything anew, instead of adding what is new.
        seed: Of the planner's draws.

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
    known, slo = remember(flow_name, profile), objective_of(profile)
    return _planned_again(known, slo, seed)[1] if slo is not None else "no bound is known"


def _planned_again(known: Knowledge, slo: Slo, seed: int) -> tuple[Knowledge, str]:
    """Put another plan in force where that pays; what is known then, and why."""
    flow_name, timeout_s = known.flow_name, SLOSettings().fold_timeout_s
    plan, reason = replan(known, slo, seed=seed, earlier=earlier_plans(known))
    if plan is None or known.workflow is None:
        return known, reason
    if reason == KEPT:
        if not _moved(known.plan, plan):
            return known, reason
        document = plan.to_document()
        profile = update_profile(flow_name, lambda p: p.model_copy(update={"plan": document}), timeout_s=timeout_s)
    else:
        profile = put_in_force(flow_name, plan, reason, timeout_s=timeout_s)
    if known.model is not None:
        known.forecasts[plan_digest(plan)] = stage_forecasts(known.model, plan)
    publish_plan(flow_name, plan, workflow=known.workflow, forecasts=known.forecasts.get(plan_digest(plan)))
    return remember_plan(known, profile), reason


def earlier_plans(known: Knowledge) -> Iterator[Plan]:
    """Plans that were in force before the one that is, newest first; those that are gone are left out."""
    for entry in reversed(known.history):
        try:
            plan = plan_from_history(entry)
        except InvalidPlan:
            continue
        if plan is not None:
            yield plan


def unpickled_stages(run: ObservedRun, known: Mapping[str, str]) -> dict[str, str]:
    """Stages that don't pickle, with the hash of their code: those that a run has shown, and those of before.

    A stage that is known not to pickle runs on threads, where it is not tried again as long as its code stays.
    """
    return {
        name: seen.source
        for name, seen in run.stages.items()
        if seen.pickles is False or (seen.pickles is None and known.get(name) == seen.source)
    }


@contextmanager
def _never_failing(flow_name: str, consequence: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = f"{consequence} ({type(error).__name__}: {error})."
        say_once(flow_name, message, level=logging.WARNING, about=consequence)


def _moved(before: Plan | None, after: Plan) -> bool:
    if before is None or before.predicted is None or after.predicted is None:
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


def _uuid(run_id: str) -> UUID | None:
    """The flow run's id; later attempts of one carry ``#2``, ``#3``, … behind it."""
    try:
        return UUID(run_id.partition("#")[0])
    except ValueError:
        return None
