"""What happens when a run has ended: it is written down, compared with its plan, and learned from when it is time.

The flow waits for the first of these only, one write to the API; the rest happens behind it (``loop.background``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from prefect_slo.artifacts.forecast import RunActual, stage_forecasts
from prefect_slo.artifacts.publishing import publish_attainment
from prefect_slo.attainment import Attainment
from prefect_slo.loop import background, learning, policy
from prefect_slo.loop.knowledge import UNPICKLED, knowledge
from prefect_slo.loop.menus import moving_much, with_menus
from prefect_slo.loop.planning import Decision
from prefect_slo.loop.policy import PastRun
from prefect_slo.loop.replanning import plan_digest
from prefect_slo.loop.saying import say_once
from prefect_slo.observation import StageRuns
from prefect_slo.runner.recipe import ObservedRun
from prefect_slo.settings import SLOSettings
from prefect_slo.telemetry import RunLog, StageKey, Status
from prefect_slo.telemetry.impatience import impatient
from prefect_slo.telemetry.learned import QUEUED_SHARE
from prefect_slo.telemetry.store import flow_run_of, publish_log

if TYPE_CHECKING:
    from prefect_slo.loop.director import LoopDirector

LEASE_TRY_S = 5.0
"""A run that finds another one writing the profile leaves its own to a later run, rather than queue for long."""


class Learner:
    """Takes in one ended run of a decorated flow.

    Args:
        director: The flow's director.
        decision: How the run was run.
    """

    def __init__(self, director: LoopDirector, decision: Decision) -> None:
        self._director, self._decision = director, decision

    def take(self, run: ObservedRun, log: RunLog | None, *, learn: bool) -> None:
        """Write the run down, and have it shown and learned from. Never raises: each step that fails is said once.

        Nothing is learned without a log (telemetry is off), or while the API can't be reached: that would only be tried
        in vain.
        """
        if log is None:
            return
        past = self._past(run)
        with impatient():
            with _never_failing(run.flow_name, "its telemetry is incomplete"):
                self._write(run, log, met=past.met(self._director.slo))
            stored = publish_log(log)
        if not learn or not stored:
            return
        self._say_what_is_not_learned(run)
        if run.status in ("completed", "timed_out"):
            learning.UNLEARNED.add(run.flow_name, past)
            background.soon(partial(self._follow_up, run, past))

    def _follow_up(self, run: ObservedRun, past: PastRun) -> None:
        """What the flow does not wait for."""
        if run.completed:
            with impatient(), _never_failing(run.flow_name, "its plan was not compared with the run"):
                self._show(run, past)
        with _never_failing(run.flow_name, "nothing was learned from this run yet; a later one will"):
            self._learn(run.flow_name)

    def _say_what_is_not_learned(self, run: ObservedRun) -> None:
        if not run.completed:
            message = f"a run that ended {run.status.replace('_', ' ')} teaches nothing of how long its stages take."
            say_once(run.flow_name, message)
            return
        for name, seen in run.stages.items():
            if seen.failed:
                message = (
                    f"{seen.failed} items of stage {name!r} failed or lost their worker; of such a run nothing is "
                    "learned about this stage, only about the others."
                )
                say_once(run.flow_name, message, about=f"failed items of {name}")

    def _past(self, run: ObservedRun) -> PastRun:
        plan = self._decision.followed
        spoilt = run.cached or not run.completed or _waited(run)
        predicted = math.nan if plan is None or plan.predicted is None or spoilt else plan.predicted.latency_s.mean
        late = run.status == "timed_out"
        return PastRun(self._decision.digest, run.latency_s, predicted, run.cost_usd, timed_out=late)

    def _write(self, run: ObservedRun, log: RunLog, *, met: bool) -> None:
        """All that is known, whatever of it can't be told."""
        if run.untold:
            log.note(untold=run.untold)
        try:
            with _never_failing(run.flow_name, "its stages' menus are unknown"):
                self._write_workflow(run, log)
            self._write_stages(run, log)
            if run.cached or _waited(run):
                log.note(predicted_s=None)  # such a run says nothing of the prediction
        finally:
            log.end(run.status, latency_s=run.latency_s, met=met, cost_usd=run.cost_usd)

    def _write_workflow(self, run: ObservedRun, log: RunLog) -> None:
        unpickled = unpickled_stages(run, self._decision.on_threads)
        log.note(**{f"{UNPICKLED}{stage}": source for stage, source in unpickled.items()})
        if run.workflow is not None:
            menus = (self._director.menu, run.declarations, frozenset(unpickled), self._director.pools)
            heavy = moving_much(StageRuns.of(run.stage_runs), self._decision.followed)
            log.workflow(with_menus(run.workflow, *menus, or_threads=heavy).to_document())

    def _write_stages(self, run: ObservedRun, log: RunLog) -> None:
        features = self._director.features_of(run.flow_name, run.parameters)
        plan = self._decision.followed
        for row in run.stage_runs:
            seen = run.stages[row.stage]
            planned = plan.stages.get(row.stage) if plan is not None else None
            status: Status = "failed" if seen.failed else "cached" if seen.cached else "completed"
            log.stage_run(
                row,
                StageKey(seen.key, seen.source, row.hardware),
                status=status,
                knobs=dict(planned.knobs) if planned is not None else None,
                features=features,
            )

    def _show(self, run: ObservedRun, this: PastRun) -> None:
        """Predicted against actual, as an artifact of the run."""
        plan, slo = self._decision.followed, self._director.slo
        if plan is None or plan.predicted is None or not math.isfinite(run.latency_s):
            return
        known = knowledge(run.flow_name)
        name = plan_digest(plan)
        followed = [past for past in (*known.past, *learning.UNLEARNED.of(run.flow_name)) if past.plan == name]
        if known.model is not None and name not in known.forecasts:
            known.forecasts[name] = stage_forecasts(known.model, plan)
        publish_attainment(
            run.flow_name,
            plan,
            RunActual(run.latency_s, run.cost_usd, {row.stage: row.wall_s for row in run.stage_runs}, run.untold),
            attainment=Attainment(sum(past.met(slo) for past in followed), len(followed)),
            forecasts=known.forecasts.get(name),
            history=[RunActual(p.latency_s) for p in followed if p is not this and math.isfinite(p.latency_s)],
            flow_run_id=flow_run_of(run.run_id),
            note=self._decision.note if self._decision.lacking else "",
        )

    def _learn(self, flow_name: str) -> None:
        known, waiting = knowledge(flow_name), learning.UNLEARNED.of(flow_name)
        off = policy.drifting([*known.past, *waiting])
        if policy.due(len(waiting), len(known.past), drifting=off):
            wait_s = min(LEASE_TRY_S, SLOSettings().fold_timeout_s)
            learning.learn(flow_name, self._director.slo, seed=self._director.seed, timeout_s=wait_s)


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


def _waited(run: ObservedRun) -> bool:
    """Whether it waited so long for capacity of other runs that its latency is no measure of its plan."""
    return run.queue_s > QUEUED_SHARE * run.latency_s
