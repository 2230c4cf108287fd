"""Which plan is in force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.loop import policy
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.loop.policy import PastRun
from prefect_slo.loop.replanning import CHANGED, KEPT, fits, plan_digest, predicted, replan, surest
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.observation import StageRuns
from prefect_slo.plan import Plan
from prefect_slo.planner import make_plan
from prefect_slo.planner.baselines import all_max
from prefect_slo.resources import Size

SLO = Slo(latency=Latency(4.0))
Know = Callable[..., Knowledge]
Rows = Callable[..., StageRuns]


def runs(plan: Plan, *latencies: float) -> tuple[PastRun, ...]:
    return tuple(PastRun(plan_digest(plan), latency, 3.0, cost_usd=1e-4) for latency in latencies)


def largest(known: Knowledge, slo: Slo = SLO) -> Plan:
    assert known.model is not None
    return predicted(known.model, replace(all_max(known.model, slo), objective=slo))


def test_a_plan_fits_its_objective_its_stages_and_their_menus(know: Know) -> None:
    known = know()
    plan = largest(known)
    assert fits(plan, known.workflow, SLO)
    assert not fits(plan, known.workflow, Slo(latency=Latency(4.0, 0.99)))
    assert not fits(replace(plan, stages={"train": plan["train"]}), known.workflow, SLO)
    assert not fits(plan.with_stage("train", workers=3), known.workflow, SLO)


def test_why_a_plan_no_longer_fits_is_told_by_who_knows(know: Know) -> None:
    other = replace(largest(know()), objective=Slo(latency=Latency(9.0)))
    assert replan(know(plan=other), SLO, seed=0)[1] == CHANGED
    assert replan(know(plan=other), SLO, seed=0, unfit="moved: it took more")[1] == "moved: it took more"


def test_nothing_is_planned_before_enough_was_measured() -> None:
    assert replan(Knowledge("letters"), SLO, seed=0) == (None, "it has not been observed yet")


def test_the_first_plan_is_certified(know: Know) -> None:
    plan, reason = replan(know(), SLO, seed=0)
    assert reason == "first plan"
    assert plan.certificate is not None
    assert plan.objective == SLO


def test_the_same_plan_again_is_kept(know: Know) -> None:
    first, _ = replan(know(), SLO, seed=0)
    assert replan(know(plan=first), SLO, seed=0)[1] == KEPT


def test_hysteresis_keeps_a_plan_that_is_nearly_as_good(know: Know) -> None:
    best = make_plan(know().model, SLO)
    assert best["train"].workers * best["train"].size.vcpus == 4
    other = (2, Size(2, 2048)) if best["train"].workers == 4 else (4, Size(1, 1024))
    twin = predicted(know().model, best.with_stage("train", workers=other[0], size=other[1]))
    kept, reason = replan(know(plan=twin), SLO, seed=0)
    assert reason == KEPT
    assert plan_digest(kept) == plan_digest(twin)


def test_a_plan_is_replaced_by_one_that_is_better_by_more_than_the_margin(know: Know) -> None:
    dear = largest(know())
    plan, reason = replan(know(plan=dear), SLO, seed=0)
    assert reason.startswith("better by")
    assert plan.predicted.cost_usd.mean < (1 - policy.MARGIN) * dear.predicted.cost_usd.mean


def test_a_plan_that_no_longer_keeps_the_bound_under_the_model_is_replaced(know: Know) -> None:
    plan = make_plan(know().model, SLO)
    now, reason = replan(know(slower=1.5, plan=plan), SLO, seed=0)
    assert reason == "no longer keeps the bound under the model"
    assert now.predicted.latency_at_percentile_s <= 4.0


def test_another_objective_asks_for_another_plan(know: Know) -> None:
    plan = make_plan(know().model, SLO)
    looser = Slo(latency=Latency(12.0))
    now, reason = replan(know(plan=plan), looser, seed=0)
    assert "have changed" in reason
    assert now.predicted.cost_usd.mean < plan.predicted.cost_usd.mean


def test_an_infeasible_bound_puts_the_fastest_plan_in_force_once(know: Know) -> None:
    slo = Slo(latency=Latency(0.5))
    plan, reason = replan(know(), slo, seed=0)
    assert reason.startswith("infeasible: p95 latency <= 0.5 s cannot be met")
    assert replan(know(plan=plan), slo, seed=0)[1] == KEPT


def test_a_plan_that_misses_too_often_gives_way_to_one_for_a_tightened_bound(know: Know) -> None:
    plan = make_plan(know().model, SLO)
    past = runs(plan, *[4.4] * 6)
    now, reason = replan(know(plan=plan, past=past), SLO, seed=0)
    assert reason == "a bound tightened: 6 of 6 runs missed the bound"
    factor = policy.correction(past, plan_digest(plan), SLO, plan.predicted.latency_at_percentile_s)
    assert factor > 1.2
    assert now.predicted.latency_at_percentile_s <= 4.0 / factor
    assert now.objective == SLO, "what was asked is what counts"


def test_a_plan_that_was_shown_to_miss_does_not_come_back_for_being_cheaper(know: Know) -> None:
    plan = make_plan(know().model, SLO)
    past = runs(plan, *[4.4] * 6)
    tighter, _ = replan(know(plan=plan, past=past), SLO, seed=0)
    assert tighter.predicted.cost_usd.mean > plan.predicted.cost_usd.mean * 1.05
    later = know(plan=tighter, past=(*past, *runs(tighter, *[2.2] * 3)))
    assert replan(later, SLO, seed=0)[1] == KEPT


def test_misses_of_another_bound_do_not_count(know: Know) -> None:
    slo = Slo(latency=Latency(12.0))
    plan = make_plan(know().model, slo)
    assert replan(know(plan=plan, past=runs(plan, *[11.0] * 9)), slo, seed=0)[1] == KEPT


# ---- confidence and calibration -------------------------------------------------------------------------------------


def test_where_few_runs_promise_little_a_plan_is_made_with_less_confidence(know: Know, rows: Rows) -> None:
    few = WorkflowModel(know().workflow).fit(rows(repeats=1))
    with pytest.raises(InfeasibleSlo) as refused:
        make_plan(few, Latency(0.5))
    slo = Slo(latency=Latency(0.97 * refused.value.nearest.bound))
    sure, unsure = surest(know().model, slo, seed=0), surest(few, slo, seed=0)
    assert sure.certificate.confidence == 0.99
    assert unsure.certificate.confidence < 0.99
    assert unsure.objective == sure.objective, "what was asked is what counts"
    with pytest.raises(InfeasibleSlo, match=r"0\.5 s cannot be met"):
        surest(few, Slo(latency=Latency(0.5)), seed=0)


def test_a_plan_made_with_less_confidence_gives_way_once_more_is_known(know: Know, rows: Rows) -> None:
    few = WorkflowModel(know().workflow).fit(rows(repeats=1))
    with pytest.raises(InfeasibleSlo) as refused:
        make_plan(few, Latency(0.5))
    slo = Slo(latency=Latency(0.97 * refused.value.nearest.bound))
    unsure = surest(few, slo, seed=0)
    now, reason = replan(know(plan=unsure), slo, seed=0)
    assert now.certificate.confidence == 0.99
    assert reason in (KEPT, "certain to 99% by now")


def test_the_certificate_counts_the_runs_of_the_plan_itself(know: Know) -> None:
    plan = make_plan(know().model, SLO)
    other = runs(largest(know()), *[2.0] * 50)
    now, reason = replan(know(plan=plan, past=(*other, *runs(plan, *[3.0] * 30))), SLO, seed=0)
    assert (now.certificate.calibration_runs, reason) == (30, KEPT)


def test_a_new_plan_does_not_inherit_the_runs_of_the_one_before(know: Know) -> None:
    dear = largest(know())
    new, reason = replan(know(plan=dear, past=runs(dear, *[1.7] * 30)), SLO, seed=0)
    assert reason.startswith("better by")
    assert new.certificate.calibration_runs == 0
    past = (*runs(dear, *[1.7] * 30), *runs(new, *[3.0] * 30))
    again, reason = replan(know(plan=dear, past=past), SLO, seed=0)
    assert plan_digest(again) == plan_digest(new)
    assert reason.startswith("better by")
    assert again.certificate.calibration_runs == 30, "its own count"


# ---- roll-back ------------------------------------------------------------------------------------------------------


def test_a_plan_that_misses_gives_way_to_the_earlier_one_that_kept_the_bound(know: Know) -> None:
    good, bad = largest(know()), make_plan(know().model, SLO)
    past = (*runs(good, 2.0, 2.1, 2.2), *runs(bad, 4.4, 4.4, 3.0, 4.4))
    now, reason = replan(know(plan=bad, past=past), SLO, seed=0, earlier=[good])
    assert plan_digest(now) == plan_digest(good)
    assert reason == "rolled back to an earlier plan: 3 of 4 runs missed the bound"


def test_it_stays_rolled_back(know: Know) -> None:
    good, bad = largest(know()), make_plan(know().model, SLO)
    past = (*runs(good, 2.0, 2.1, 2.2), *runs(bad, 4.4, 4.4, 3.0, 4.4))
    now, reason = replan(know(plan=good, past=past), SLO, seed=0, earlier=[bad, good])
    assert (plan_digest(now), reason) == (plan_digest(good), KEPT)


@pytest.mark.parametrize(
    "why_not", ["it missed too", "it was hardly tried", "other bound", "other menu", "too slow now"]
)
def test_an_earlier_plan_comes_back_only_when_it_may(know: Know, why_not: str) -> None:
    known = know(slower=2.5 if why_not == "too slow now" else 1.0)
    bad = make_plan(known.model, Slo(latency=Latency(20.0)))
    bad = replace(bad, objective=SLO)
    good = largest(known)
    history = {
        "it missed too": runs(good, *[5.0] * 5),
        "it was hardly tried": runs(good, 2.0),
    }.get(why_not, runs(good, 2.0, 2.0, 2.0))
    if why_not == "other bound":
        good = replace(good, objective=Slo(latency=Latency(9.0)))
    if why_not == "other menu":
        good = good.with_stage("train", workers=3)
        history = runs(good, 2.0, 2.0, 2.0)
    past = (*history, *runs(bad, *[9.0] * 4))
    _, reason = replan(replace(known, plan=bad, past=past), SLO, seed=0, earlier=[good])
    assert "rolled back" not in reason


def test_earlier_plans_are_not_even_fetched_while_the_one_in_force_is_trusted(know: Know) -> None:
    plan = make_plan(know().model, SLO)

    def fetched():
        raise AssertionError("fetched from the API for nothing")
        yield

    assert replan(know(plan=plan), SLO, seed=0, earlier=fetched())[1] == KEPT


def test_under_a_budget_the_plan_is_the_fastest_that_keeps_it(know: Know) -> None:
    free, _ = replan(know(), Slo(budget=Budget(1.0)), seed=0)
    cost = free.predicted.cost_at_percentile_usd
    tight, _ = replan(know(), Slo(budget=Budget(0.9 * cost)), seed=0)
    assert tight.predicted.cost_at_percentile_usd <= 0.9 * cost
    assert tight.predicted.latency_at_percentile_s >= free.predicted.latency_at_percentile_s
