"""What to do with a run, given what is known: follow the plan in force, plan now, explore, or only observe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.loop import policy
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.plan import Plan, Prediction, StagePlan
from prefect_slo.planner import make_plan
from prefect_slo.planner.baselines import all_max
from prefect_slo.resources import Option, Size
from prefect_slo.telemetry.packing import digest
from prefect_slo.workflow import Workflow

EXPLORATION_COST = 1.25
"""An exploring run may cost a quarter more than the plan's, and must keep the bound under the model."""


@dataclass(frozen=True)
class Decision:
    """How a run is run, and why.

    Attributes:
        plan: The plan; ``None`` to observe.
        mode: ``observe``, ``advise``, ``enforce``, ``explore`` or ``profile``.
        note: What the user should know, or nothing.
        on_threads: Stages that are known not to pickle.
        ladders: Larger sizes by stage, for items that run out of memory.
    """

    plan: Plan | None
    mode: str
    note: str = ""
    on_threads: frozenset[str] = frozenset()
    ladders: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Names the choices of the plan, whatever it predicts; empty without one."""
        return plan_digest(self.plan) if self.plan is not None else ""


def decide(
    known: Knowledge, slo: Slo, *, mode: str | None, seed: int, explore: float, rng: np.random.Generator
) -> Decision:
    """What to do with the run that starts now.

    Args:
        known: What is known of the flow.
        slo: What is asked.
        mode: ``None``: enforce where the models are identified, observe where not.
        seed: Of the planner's draws.
        explore: Fraction of runs that may try something unmeasured.
        rng: Draws whether this run does.
    """
    missing = known.missing()
    if mode == "observe" or missing:
        hint = f"runs as it is and is observed: {missing}. Profile it with 'prefect-slo profile'." if missing else ""
        return Decision(None, "observe", hint)
    assert known.model is not None
    assert known.workflow is not None
    note = ""
    plan = known.plan
    if plan is None or not fits(plan, known.workflow, slo):
        try:
            plan = known.made.get(slo) or make_plan(known.model, slo, seed=seed)
        except InfeasibleSlo as error:
            plan = fastest(known.model, slo, seed)
            note = f"{error} Meanwhile it runs by its fastest plan."
        known.made[slo] = plan
    if mode == "advise":
        return Decision(plan, "advise", note or "a plan is ready; it is shown and not followed (mode 'advise').")
    mode = "enforce"
    if not note and explore and policy.explores(explore, rng):
        tried = exploration(known.model, plan, slo, rng)
        if tried is not None:
            plan, mode = tried, "explore"
    return Decision(plan, mode, note, known.on_threads, ladders(plan, known.workflow))


def fits(plan: Plan, workflow: Workflow, slo: Slo) -> bool:
    """Whether a plan was made for this objective, these stages and choices that are still on their menus."""
    return (
        plan.objective == slo
        and set(plan.stages) == {stage.name for stage in workflow.stages}
        and all(_on_menu(plan[stage.name], stage.menu.options()) for stage in workflow.stages)
    )


def fastest(model: WorkflowModel, slo: Slo, seed: int) -> Plan:
    """The plan to run by when nothing keeps the bound: everything at its largest, predicted but not certified."""
    return predicted(model, replace(all_max(model, slo, seed=seed), objective=slo, certificate=None))


def predicted(model: WorkflowModel, plan: Plan) -> Plan:
    """The plan with what the model predicts of it."""
    found = model.predict(plan, seed=plan.seed)
    prediction = Prediction(
        found.latency_s, found.cost_usd, found.latency_at_percentile_s, found.cost_at_percentile_usd
    )
    return replace(plan, predicted=prediction)


def exploration(model: WorkflowModel, plan: Plan, slo: Slo, rng: np.random.Generator) -> Plan | None:
    """The plan with one stage at an option that was measured least, where the bound still holds under the model.

    At most a few random candidates are looked at; ``None`` when none of them is safe.
    """
    assert plan.predicted is not None
    stages = [s for s in model.workflow.stages if len(s.menu.options()) > 1]
    for _ in range(4 if stages else 0):
        stage = stages[int(rng.integers(len(stages)))]
        options = [o for o in stage.menu.options() if o != plan[stage.name].option]
        option = options[int(rng.integers(len(options)))]
        tried = predicted(model, plan.with_stage(stage.name, **_choices(option)))
        assert tried.predicted is not None
        safe = keeps(tried.predicted, slo)
        if safe and tried.predicted.cost_usd.mean <= EXPLORATION_COST * plan.predicted.cost_usd.mean:
            return tried
    return None


def keeps(prediction: Prediction, slo: Slo) -> bool:
    """Whether a prediction keeps the objective."""
    latency = slo.latency is None or prediction.latency_at_percentile_s <= slo.latency.bound_s
    return latency and (slo.budget is None or prediction.cost_at_percentile_usd <= slo.budget.bound_usd)


def objective_value(prediction: Prediction, slo: Slo) -> float:
    """What the objective minimises: mean cost under a latency bound, latency at the percentile under a budget."""
    return prediction.cost_usd.mean if slo.latency is not None else prediction.latency_at_percentile_s


def replan(known: Knowledge, slo: Slo, *, seed: int) -> tuple[Plan | None, str]:
    """The plan that should be in force from now on, and why; ``None`` where nothing can be planned yet.

    The plan in force stays unless it no longer keeps the bound under the model, misses it more often in real runs than
    its percentile allows for, or a candidate is better by ``policy.MARGIN``. A plan that misses too often is replaced
    by one made for a bound tightened by how far its runs went over (``policy.correction``).
    """
    if known.missing() or known.model is None or known.workflow is None:
        return None, known.missing()
    model, current = known.model, known.plan
    asked = slo
    reason = "first plan"
    if current is not None and not fits(current, known.workflow, slo):
        current, reason = None, "the objective, the stages or a menu have changed"
    if current is not None:
        now = predicted(model, current)
        assert now.predicted is not None
        name = plan_digest(current)
        if policy.distrusted(known.past, name, slo.percentile):
            factor = policy.correction(known.past, name, slo.percentile, now.predicted.latency_at_percentile_s)
            asked = tightened(slo, factor)
            reason = f"misses too often: planned for a bound {factor:.3g} times tighter"
        elif keeps(now.predicted, slo):
            try:
                candidate = make_plan(model, slo, seed=seed)
            except InfeasibleSlo:
                return now, "no plan is certain to keep the bound; the one in force does under the model"
            assert candidate.predicted is not None
            if policy.keep(objective_value(now.predicted, slo), objective_value(candidate.predicted, slo)):
                return replace(now, certificate=current.certificate), "kept"
            return candidate, "better by more than the margin"
        else:
            reason = "no longer keeps the bound under the model"
    try:
        return replace(make_plan(model, asked, seed=seed), objective=slo), reason
    except InfeasibleSlo as error:
        return fastest(model, slo, seed), f"infeasible: {error}"


def tightened(slo: Slo, factor: float) -> Slo:
    """The objective with its leading bound divided by ``factor``."""
    at = (slo.percentile, slo.confidence)
    if slo.latency is not None:
        return replace(slo, latency=Latency(slo.latency.bound_s / factor, *at))
    assert slo.budget is not None
    return replace(slo, budget=Budget(slo.budget.bound_usd / factor, *at))


def ladders(plan: Plan, workflow: Workflow) -> dict[str, tuple[Size, ...]]:
    """For every stage, the sizes on its menu with more memory than its plan gives it, smallest first."""
    steps = {}
    for name, stage in plan.stages.items():
        sizes = {option.size for option in workflow[name].menu.options() if option.pool == stage.pool}
        larger = sorted((s for s in sizes if s.memory_mb > stage.size.memory_mb), key=lambda s: (s.memory_mb, s.vcpus))
        steps[name] = tuple(larger)
    return steps


def plan_digest(plan: Plan) -> str:
    """Names the choices of a plan, whatever it predicts: runs of one plan are counted together."""
    return digest({name: _key(stage) for name, stage in sorted(plan.stages.items())})[:12]


def _key(stage: StagePlan) -> list[object]:
    size = stage.size
    knobs = [list(pair) for pair in stage.knobs]
    return [stage.workers, size.vcpus, size.memory_mb, size.gpu, size.hardware, stage.pool, stage.batch, knobs]


def _on_menu(stage: StagePlan, options: tuple[Option, ...]) -> bool:
    return stage.option in options


def _choices(option: Option) -> dict[str, object]:
    return {
        "workers": option.workers,
        "size": option.size,
        "pool": option.pool,
        "batch": option.batch,
        "knobs": option.knobs,
    }
