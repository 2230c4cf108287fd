"""Which plan should be in force, given what is known: the one that is, a new one, or one from before.

What only looks at plans needs neither the model nor the planner: they are imported where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from prefect_slo.errors import InfeasibleSlo, SloError
from prefect_slo.loop import policy
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.plan import Plan, Prediction, StagePlan
from prefect_slo.resources import Capacity, Menu
from prefect_slo.telemetry.packing import digest
from prefect_slo.workflow import Workflow

if TYPE_CHECKING:
    from prefect_slo.models import WorkflowModel
    from prefect_slo.models.calibration import Calibration

KEPT = "kept"
"""Reason of a re-plan that changes nothing."""

LESS_SURE = (0.9, 0.5)
"""Confidences that a plan is made with where none keeps its bound with the one asked for. A few noisy runs promise
little; a plan that keeps the bound by all that they do say serves better than the largest of everything."""

TIGHTER = 1.02
ATTEMPTS = 4
"""A plan that real runs have shown to miss is not made again: so many times the bound is tightened, by 2 % at least."""


CHANGED = "the objective, the stages or a menu have changed"


def replan(
    known: Knowledge,
    slo: Slo,
    *,
    seed: int,
    earlier: Iterable[Plan] = (),
    margin: float = policy.MARGIN,
    unfit: str = CHANGED,
) -> tuple[Plan | None, str]:
    """The plan that should be in force from now on, and why; ``None`` where nothing can be planned yet.

    The plan in force stays (``KEPT``, with what the model predicts of it now) unless

    - it misses the bound in real runs more often than its percentile allows for: then an earlier plan comes back that
      was tried, kept the bound in its own runs and still does under the model; where there is none, a new one is made
      for a bound tightened by how far the runs went over (``policy.correction``);
    - it no longer keeps the bound under the model;
    - a candidate that real runs have not shown to miss is better by ``margin``;
    - it no longer fits: the objective, the stages or a menu have changed, or it has no room.

    Args:
        known: What is known of the flow.
        slo: What is asked.
        seed: Of the planner's draws.
        earlier: Plans that were in force before, newest first; looked at only where one may come back.
        margin: Share by which a plan has to be better than the one in force.
        unfit: Why the plan in force no longer fits, where it doesn't.
    """
    if known.missing() or known.model is None or known.workflow is None:
        return None, known.missing()
    model, current = known.model, known.plan
    if current is None:
        return _made(known, slo, seed, "first plan")
    if not fits(current, known.workflow, slo):
        return _made(known, slo, seed, unfit)
    renewed = predicted(model, current)
    expected, name = renewed.predicted, plan_digest(current)
    assert expected is not None
    scores, at = _scores(known, renewed, slo)
    renewed = _counted(renewed, slo, scores, at)
    if policy.distrusted(known.past, name, slo):
        missed = [not run.met(slo) for run in known.past if run.plan == name]
        why = f"{sum(missed)} of {len(missed)} runs missed the bound"
        back = _rolled_back(known, slo, earlier)
        if back is not None:
            return back, f"rolled back to an earlier plan: {why}"
        return _made(known, slo, seed, f"a bound tightened: {why}", policy.correction(known.past, name, slo, at))
    if not keeps(expected, slo):
        return _made(known, slo, seed, "no longer keeps the bound under the model")
    try:
        candidate = surest(model, slo, seed=seed, calibration=scores)
    except InfeasibleSlo:  # none is certain to; the one in force does under the model
        return renewed, KEPT
    assert candidate.predicted is not None
    assert candidate.certificate is not None
    if plan_digest(candidate) == name:
        return _counted(candidate, slo, scores, at), KEPT
    candidate = _counted(candidate, slo, *_scores(known, candidate, slo))
    assert candidate.predicted is not None
    assert candidate.certificate is not None
    if policy.distrusted(known.past, plan_digest(candidate), slo):
        return renewed, KEPT
    if renewed.certificate is not None and candidate.certificate.confidence > renewed.certificate.confidence:
        return candidate, f"certain to {candidate.certificate.confidence:.0%} by now"
    if policy.keep(objective_value(expected, slo), objective_value(candidate.predicted, slo), margin):
        return renewed, KEPT
    return candidate, f"better by {margin:.0%} or more"


def surest(model: WorkflowModel, slo: Slo, *, seed: int, calibration: Calibration | None = None) -> Plan:
    """The best plan with the confidence asked for or, where none has it, with less; its certificate says which.

    Args:
        model: Of the flow.
        slo: What is asked.
        seed: Of the planner's draws.
        calibration: Scores of real runs of the plan in force.

    Raises:
        InfeasibleSlo: No plan keeps the bound with any of these confidences.
    """
    from prefect_slo.planner import make_plan

    refused: InfeasibleSlo | None = None
    for confidence in (slo.confidence, *(c for c in LESS_SURE if c < slo.confidence)):
        try:
            plan = make_plan(model, asked(slo, confidence=confidence), seed=seed, calibration=calibration)
            return replace(plan, objective=slo)
        except InfeasibleSlo as error:
            refused = refused or error
    assert refused is not None
    raise refused


def fits(plan: Plan, workflow: Workflow, slo: Slo) -> bool:
    """Whether a plan was made for this objective, these stages and choices on their menus, and has room.

    A plan in force may come from a machine of another size: what is on no menu but for that is a matter of room.
    """
    return (
        plan.objective == slo
        and set(plan.stages) == {stage.name for stage in workflow.stages}
        and all(_on_menu(plan[stage.name], stage.menu, workflow.capacity) for stage in workflow.stages)
        and has_room(plan, workflow)
    )


def has_room(plan: Plan, workflow: Workflow) -> bool:
    """Whether machine and pools hold what a plan's stages take, those of them that can run at the same time."""
    options = [plan[name].option for name in workflow.order]
    capacity = workflow.capacity
    if capacity.fits(*options):
        return True
    if not all(capacity.fits(option) for option in options):
        return False
    from prefect_slo.planner.capacity import Antichains

    return Antichains.of(workflow, [[option] for option in options]).admit([0] * len(options))


def keeps(prediction: Prediction, slo: Slo) -> bool:
    """Whether a prediction keeps the objective."""
    latency = slo.latency is None or prediction.latency_at_percentile_s <= slo.latency.bound_s
    return latency and (slo.budget is None or prediction.cost_at_percentile_usd <= slo.budget.bound_usd)


def objective_value(prediction: Prediction, slo: Slo) -> float:
    """What the objective minimises: mean cost under a latency bound, latency at the percentile under a budget."""
    return prediction.cost_usd.mean if slo.latency is not None else prediction.latency_at_percentile_s


def predicted(model: WorkflowModel, plan: Plan) -> Plan:
    """The plan with what the model predicts of it."""
    found = model.predict(plan, seed=plan.seed)
    prediction = Prediction(
        found.latency_s, found.cost_usd, found.latency_at_percentile_s, found.cost_at_percentile_usd
    )
    return replace(plan, predicted=prediction)


def predicted_now(known: Knowledge, plan: Plan) -> Plan:
    """A plan with what the model predicts of it now, by which it is compared with others.

    Not predicted where nothing was measured of what it takes; as it is where there is no model.
    """
    if known.model is None:
        return plan
    try:
        return predicted(known.model, plan)
    except SloError:
        return replace(plan, predicted=None)


def fastest(model: WorkflowModel, slo: Slo, seed: int) -> Plan:
    """The plan to run by when nothing keeps the bound: everything at its largest, predicted but not certified."""
    from prefect_slo.planner.baselines import all_max

    return predicted(model, replace(all_max(model, slo, seed=seed), objective=slo, certificate=None))


def asked(slo: Slo, factor: float = 1.0, *, confidence: float | None = None) -> Slo:
    """The objective with its leading bound divided by ``factor``, and with another confidence."""
    at = (slo.percentile, slo.confidence if confidence is None else confidence)
    latency = None if slo.latency is None else Latency(slo.latency.bound_s / factor, *at)
    budget = None if slo.budget is None else Budget(slo.budget.bound_usd / (factor if latency is None else 1.0), *at)
    return Slo(latency, budget)


def plan_digest(plan: Plan) -> str:
    """Names the choices of a plan, whatever it predicts: runs of one plan are counted together."""
    return digest({name: _key(stage) for name, stage in sorted(plan.stages.items())})[:12]


def _scores(known: Knowledge, plan: Plan, slo: Slo) -> tuple[Calibration, float]:
    """Scores of the runs of a plan itself, and what it is predicted to reach at the percentile."""
    assert plan.predicted is not None
    expected = plan.predicted
    at = expected.latency_at_percentile_s if slo.latency is not None else expected.cost_at_percentile_usd
    return policy.calibration(known.past, plan_digest(plan), slo, at), at


def _counted(plan: Plan, slo: Slo, scores: Calibration, predicted_at: float) -> Plan:
    """The plan with the number of its own runs behind its claim in its certificate."""
    if plan.certificate is None:
        return plan
    bound = slo.latency.bound_s if slo.latency is not None else slo.budget.bound_usd if slo.budget is not None else 0.0
    runs = policy.proven(scores, slo.confidence, bound / predicted_at)
    return replace(plan, certificate=replace(plan.certificate, calibration_runs=runs))


def _rolled_back(known: Knowledge, slo: Slo, earlier: Iterable[Plan]) -> Plan | None:
    assert known.model is not None
    assert known.workflow is not None
    for plan in earlier:
        if fits(plan, known.workflow, slo) and policy.trusted(known.past, plan_digest(plan), slo):
            again = predicted(known.model, plan)
            assert again.predicted is not None
            if keeps(again.predicted, slo):
                return again
    return None


def _made(known: Knowledge, slo: Slo, seed: int, reason: str, factor: float = 1.0) -> tuple[Plan, str]:
    """A new plan for the bound divided by ``factor``, or more where real runs have shown the plan to miss.

    ``KEPT`` where it makes the same choices for the same objective as the one in force.
    """
    assert known.model is not None
    try:
        for _ in range(ATTEMPTS):
            plan = surest(known.model, asked(slo, factor), seed=seed)
            if not policy.distrusted(known.past, plan_digest(plan), slo):
                break
            factor *= TIGHTER
    except InfeasibleSlo as error:
        plan, reason = fastest(known.model, slo, seed), f"infeasible: {error}"
    plan = replace(plan, objective=slo)
    current = known.plan
    same = current is not None and current.objective == slo and plan_digest(current) == plan_digest(plan)
    return plan, KEPT if same else reason


def _key(stage: StagePlan) -> list[object]:
    size = stage.size
    knobs = [list(pair) for pair in stage.knobs]
    gpu = [size.gpu, size.gpu_memory_mb] if size.gpu_memory_mb else size.gpu
    return [stage.workers, size.vcpus, size.memory_mb, gpu, size.hardware, stage.pool, stage.batch, knobs]


def _on_menu(stage: StagePlan, menu: Menu, capacity: Capacity) -> bool:
    """What a pool elsewhere offers is the same whichever machine the flow runs on."""
    return stage.option in menu.options() if stage.pool in capacity.pools else menu.offers(stage.option)
