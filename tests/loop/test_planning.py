"""What a run does, given what is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.loop.planning import EXPLORATION_COST, Decision, decide, exploration
from prefect_slo.loop.replanning import keeps, plan_digest, predicted
from prefect_slo.objective import Latency, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner import make_plan
from prefect_slo.planner.baselines import all_max
from prefect_slo.resources import Size

SLO = Slo(latency=Latency(4.0))
Know = Callable[..., Knowledge]


def decided(known: Knowledge, slo: Slo = SLO, *, mode: str | None = None, explore: float = 0.0) -> Decision:
    return decide(known, slo, mode=mode, seed=0, explore=explore, rng=np.random.default_rng(0))


def largest(known: Knowledge, slo: Slo = SLO) -> Plan:
    assert known.model is not None
    return predicted(known.model, replace(all_max(known.model, slo), objective=slo))


@pytest.mark.parametrize("mode", [None, "observe", "advise", "enforce"])
def test_a_flow_that_was_never_seen_runs_as_it_is_and_says_what_to_do(mode: str | None) -> None:
    decision = decided(Knowledge("letters"), mode=mode)
    assert (decision.plan, decision.mode) == (None, "observe")
    assert "prefect-slo profile" in decision.note


def test_a_known_flow_is_run_by_a_plan(know: Know) -> None:
    decision = decided(know())
    assert decision.mode == "enforce"
    assert decision.followed is not None
    assert decision.followed.predicted.latency_at_percentile_s <= 4.0
    assert decision.note == ""


def test_modes_that_change_nothing_follow_nothing(know: Know) -> None:
    assert decided(know(), mode="observe") == Decision(None, "observe")
    advised = decided(know(), mode="advise")
    assert advised.plan is not None
    assert (advised.followed, advised.digest) == (None, "")
    assert "not followed" in advised.note


def test_the_plan_in_force_is_followed_as_long_as_it_fits(know: Know) -> None:
    plan = largest(know())
    assert decided(know(plan=plan)).plan == plan
    assert decided(know(plan=plan), Slo(latency=Latency(5.0))).plan != plan, "it was made for another bound"


def test_a_plan_is_made_once_for_what_is_known(know: Know) -> None:
    known = know()
    assert decided(known).plan is decided(known).plan


def test_a_bound_that_cannot_be_kept_runs_by_the_fastest_plan_without_a_certificate(know: Know) -> None:
    decision = decided(know(), Slo(latency=Latency(0.5)))
    assert decision.plan is not None
    assert decision.plan.certificate is None
    assert decision.plan["train"].workers * decision.plan["train"].size.vcpus == 8
    assert "p95 latency <= 0.5 s" in decision.note


def test_items_that_run_out_of_memory_have_larger_sizes_to_go_to(know: Know) -> None:
    plan = predicted(know().model, largest(know()).with_stage("train", workers=4, size=Size(1, 1024)))
    decision = decided(know(plan=plan))
    assert decision.ladders["train"] == (Size(2, 2048),)
    assert decision.ladders["load"] == ()


@pytest.mark.parametrize("bound", [2.5, 4.0, 12.0])
def test_exploration_keeps_the_bound_under_the_model_and_costs_a_quarter_more_at_most(know: Know, bound: float) -> None:
    known, slo = know(), Slo(latency=Latency(bound))
    plan = make_plan(known.model, slo)
    tried = [exploration(known.model, plan, slo, np.random.default_rng(seed)) for seed in range(20)]
    found = [other for other in tried if other is not None]
    for other in found:
        assert keeps(other.predicted, slo)
        assert other.predicted.cost_usd.mean <= EXPLORATION_COST * plan.predicted.cost_usd.mean
        assert other["train"].option != plan["train"].option
    assert bound < 12 or found, "a loose bound leaves room to try"


def test_exploring_runs_are_few_and_not_counted_as_runs_of_the_plan(know: Know) -> None:
    known, slo = know(), Slo(latency=Latency(12.0))
    plan = make_plan(known.model, slo)
    known = replace(known, plan=plan)
    made = [decide(known, slo, mode=None, seed=0, explore=0.2, rng=np.random.default_rng(n)) for n in range(60)]
    explored = [decision for decision in made if decision.mode == "explore"]
    assert 1 <= len(explored) <= 25
    assert plan_digest(plan) not in {decision.digest for decision in explored}
