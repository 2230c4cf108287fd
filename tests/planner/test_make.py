from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_slo.errors import InfeasibleSlo, InvalidPlan, InvalidValue, UnknownStage
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner import Balanced, make_plan
from prefect_slo.planner.problem import Goal
from prefect_slo.planner.sampling import Sampler
from prefect_slo.planner.solver import EVEN, Solver, solve
from prefect_slo.resources import Capacity, Size
from prefect_slo.workflow import Constraint, Workflow

FEW = {"samples": 600, "certify_samples": 20_000, "node_limit": 4000}


def fastest_s(model, seed: int = 0) -> float:
    """Latency at P95 of the fastest plan, from the error that an impossible bound raises."""
    with pytest.raises(InfeasibleSlo) as caught:
        make_plan(model, Latency(1e-3), seed=seed, **FEW)
    return caught.value.nearest.bound


def search_cost(model, plan: Plan) -> float:
    """Mean cost of a plan on the samples that it was searched on."""
    problem = Sampler(model, plan.seed, samples=FEW["samples"]).problem()
    by_name = {stage.name: stage for stage in problem.stages}
    return problem.mean_cost([by_name[s.name].options.index(plan[s.name].option) for s in problem.stages])


@pytest.mark.parametrize("shape", ["chain", "diamonds", "sources", "random"])
def test_a_plan_keeps_its_bound_on_fresh_samples(model_of, shape):
    model = model_of(shape, 4, seed=3)
    bound = 1.3 * fastest_s(model)
    plan = make_plan(model, Latency(bound), **FEW)
    options = {name: stage.option for name, stage in plan.stages.items()}
    fresh = model.sample_plan(options, 200_000, np.random.default_rng(987)).latency_s
    assert np.mean(fresh > bound) <= 0.05
    assert plan.certificate.violations <= 1000
    assert plan.predicted.latency_at_percentile_s <= bound


@pytest.mark.parametrize("shape", ["chain", "sources"])
def test_a_budget_buys_the_fastest_plan_whose_percentile_cost_keeps_it(model_of, shape):
    model = model_of(shape, 4, seed=4)
    plan = make_plan(model, Latency(1.5 * fastest_s(model)), **FEW)
    budget = 1.02 * plan.predicted.cost_usd.p95
    by_budget = make_plan(model, Budget(budget), **FEW)
    assert by_budget.predicted.cost_at_percentile_usd <= budget
    assert by_budget.predicted.latency_at_percentile_s <= plan.predicted.latency_at_percentile_s * 1.002


def test_nobody_pays_for_a_plan_that_is_hardly_faster(model_of):
    model = model_of("random", 4, seed=1)
    sampler = Sampler(model, samples=FEW["samples"])
    problem, goal = sampler.problem(), Goal(0.955, cost_bound_usd=1e3, cost_weight=0.0, latency_weight=1.0)
    fastest = solve(problem, goal)
    plan = Solver(problem).thrifty(goal, fastest)
    assert fastest.score <= plan.score <= fastest.score * (1 + EVEN)
    even = [c for c in problem.choices() if problem.score(c, goal) <= fastest.score * (1 + EVEN)]
    assert len(even) > 1
    assert problem.mean_cost(plan.choice) == pytest.approx(min(map(problem.mean_cost, even)), rel=0.02)
    assert problem.mean_cost(plan.choice) < problem.mean_cost(fastest.choice)
    timed = Goal(0.955, latency_bound_s=2 * fastest.score)
    assert Solver(problem).thrifty(timed, solve(problem, timed)) == solve(problem, timed)


def test_both_bounds_hold_together(model_of):
    model = model_of("diamonds", 4, seed=5)
    cheapest = make_plan(model, Latency(1.5 * fastest_s(model)), **FEW)
    both = Slo(Latency(1.5 * fastest_s(model)), Budget(1.1 * cheapest.predicted.cost_usd.p95))
    plan = make_plan(model, both, **FEW)
    assert plan.predicted.latency_at_percentile_s <= both.latency.bound_s
    assert plan.predicted.cost_at_percentile_usd <= both.budget.bound_usd
    with pytest.raises(InfeasibleSlo):
        make_plan(model, Slo(Latency(1.05 * fastest_s(model)), Budget(0.5 * cheapest.predicted.cost_usd.p50)), **FEW)


def test_a_looser_bound_never_costs_more(model_of):
    model = model_of("diamonds", 5, seed=6)
    bounds = fastest_s(model) * np.geomspace(1.05, 4, 7)
    costs = [search_cost(model, make_plan(model, Latency(float(bound)), **FEW)) for bound in bounds]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(costs))


def test_a_looser_budget_is_never_slower(model_of):
    model = model_of("chain", 4, seed=7)
    cheap = make_plan(model, Latency(1e4), **FEW).predicted.cost_usd.p95
    plans = [make_plan(model, Budget(float(cheap * f)), **FEW) for f in np.geomspace(1.05, 3, 6)]
    bounds = [plan.certificate.lower_bound for plan in plans]
    assert all(plan.certificate.gap <= EVEN * 1.01 for plan in plans)
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(bounds))


def test_a_bigger_menu_is_never_worse(model_of):
    small, big = model_of("diamonds", 4, seed=8, coupled=0.0), model_of(
        "diamonds", 4, seed=8, coupled=0.0, workers=(1, 2, 3, 4), vcpus=(0.5, 1, 2, 3)
    )  # fmt: skip
    bound = 1.2 * fastest_s(small)
    costs = [search_cost(model, make_plan(model, Latency(bound), **FEW)) for model in (small, big)]
    assert costs[1] <= costs[0] * (1 + 1e-9)


def renamed(model, names: dict[str, str]):
    """The same model with other stage names."""
    stages = tuple(
        replace(s, name=names[s.name], after=tuple(replace(e, parent=names[e.parent]) for e in s.after))
        for s in model.workflow.stages
    )
    maps = {
        field: {names[key]: value for key, value in getattr(model, field).items()}
        for field in ("fixed", "work", "power", "upstream")
    }
    return replace(model, workflow=Workflow("synthetic", stages), **maps)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_renaming_stages_changes_nothing(model_of, seed, data):
    model = model_of("random", 4, seed=seed)
    old = [stage.name for stage in model.workflow.stages]
    names = dict(zip(old, data.draw(st.permutations(["zeta", "a b", "ümlaut", "m"])), strict=True))
    bound = Latency(1.4 * fastest_s(model, seed))
    plan, other = make_plan(model, bound, seed=seed, **FEW), make_plan(renamed(model, names), bound, seed=seed, **FEW)
    assert {names[name]: stage for name, stage in plan.stages.items()} == other.stages
    assert plan.certificate == other.certificate


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.sampled_from([0.25, 4.0, 1024.0]))
def test_scaling_prices_scales_cost_and_leaves_the_plan(model_of, seed, factor):
    model = model_of("chain", 3, seed=seed)
    bound = Latency(1.4 * fastest_s(model))
    plan = make_plan(model, bound, **FEW)
    dearer = make_plan(replace(model, price=model.price * factor), bound, **FEW)
    assert plan.stages == dearer.stages
    assert dearer.predicted.cost_usd.mean == pytest.approx(factor * plan.predicted.cost_usd.mean, rel=1e-5)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(["chain", "diamonds", "sources"]))
def test_same_seed_same_bytes_and_json_reads_back(model_of, seed, shape):
    model = model_of(shape, 3, seed=seed % 97)
    plan, again = (make_plan(model, Latency(60.0), seed=seed, **FEW) for _ in range(2))
    assert plan.to_json().encode() == again.to_json().encode()
    assert Plan.from_json(plan.to_json()) == plan


def test_infeasible_names_a_bound_that_can_be_kept_and_the_bottleneck(model_of):
    model = model_of("chain", 4, seed=9)
    slow = replace(model, work={**model.work, "s2": 500.0})
    with pytest.raises(InfeasibleSlo) as caught:
        make_plan(slow, Latency(2.0), **FEW)
    error = caught.value
    assert error.bottleneck == "s2"
    assert 0.5 < error.share <= 1
    plan = make_plan(slow, Latency(error.nearest.bound), **FEW)
    assert plan.predicted.latency_at_percentile_s <= error.nearest.bound
    with pytest.raises(InfeasibleSlo):
        make_plan(slow, Latency(0.95 * error.nearest.bound), **FEW)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_called_infeasible_is_slower_than_what_is_called_nearest(model_of, seed):
    model = model_of(("chain", "diamonds", "sources", "random")[seed], 3 + seed, seed=seed)
    nearest = fastest_s(model)
    for factor in (1.0, 1.01):
        plan = make_plan(model, Latency(nearest * factor), **FEW)
        assert plan.predicted.latency_at_percentile_s <= nearest * factor
    with pytest.raises(InfeasibleSlo) as caught:
        make_plan(model, Latency(nearest * 0.95), **FEW)
    assert caught.value.nearest.bound > nearest * 0.95


def test_an_impossible_budget_names_the_least_that_would_do(model_of):
    model = model_of("sources", 4, seed=10)
    with pytest.raises(InfeasibleSlo) as caught:
        make_plan(model, Budget(1e-9), **FEW)
    plan = make_plan(model, Budget(caught.value.nearest.bound), **FEW)
    assert plan.predicted.cost_at_percentile_usd <= caught.value.nearest.bound
    assert "cost" in str(caught.value)


def test_nothing_fits_a_capacity_below_the_smallest_worker(model_of):
    model = model_of("chain", 3, capacity=Capacity(vcpus=0.5))
    with pytest.raises(InfeasibleSlo) as caught:
        make_plan(model, Latency(100.0), **FEW)
    assert caught.value.nearest is None


def test_pins_are_kept_and_never_make_a_plan_cheaper(model_of):
    model = model_of("diamonds", 4, seed=11)
    bound = Latency(2.0 * fastest_s(model))
    free, pinned = make_plan(model, bound, **FEW), make_plan(model, bound, pins={"s1": {"workers": 4}}, **FEW)
    assert pinned["s1"].workers == 4
    assert search_cost(model, pinned) >= search_cost(model, free) * (1 - 1e-9)
    whole = make_plan(model, bound, pins={"s2": {"size": Size(2, 2048), "workers": 1}}, **FEW)
    assert (whole["s2"].workers, whole["s2"].size) == (1, Size(2, 2048))


def test_bad_pins_and_budgets_are_refused_by_name(model_of):
    model = model_of("chain", 2)
    with pytest.raises(InvalidPlan, match="s0"):
        make_plan(model, Latency(10.0), pins={"s0": {"workers": 3}})
    with pytest.raises(UnknownStage, match="nobody"):
        make_plan(model, Latency(10.0), pins={"nobody": {"workers": 1}})
    with pytest.raises(InvalidValue, match="samples"):
        make_plan(model, Latency(10.0), samples=0)
    with pytest.raises(InvalidValue, match="objective"):
        make_plan(model, 30.0)


def test_a_cold_plan_expects_its_starts(model_of):
    model = model_of("chain", 3, seed=12)
    warm, cold = (make_plan(model, Latency(60.0), cold=cold, **FEW) for cold in (False, True))
    assert cold.predicted.latency_s.mean > warm.predicted.latency_s.mean + 1.0


def test_a_balance_moves_from_fastest_to_cheapest(model_of):
    model = model_of("diamonds", 4, seed=13)
    plans = [make_plan(model, Balanced(weight), **FEW) for weight in (0.0, 0.3, 0.7, 1.0)]
    latency = [plan.predicted.latency_at_percentile_s for plan in plans]
    cost = [plan.predicted.cost_usd.mean for plan in plans]
    assert all(b >= a * 0.995 for a, b in pairwise(latency))
    assert all(b <= a * 1.005 for a, b in pairwise(cost))
    assert latency[0] < latency[-1]
    within = make_plan(model, Balanced(1.0, within=Slo(Latency(1.2 * latency[0]))), **FEW)
    assert within.predicted.latency_at_percentile_s <= 1.2 * latency[0]


def test_certified_plans_truly_keep_their_percentile_at_the_price_of_at_most_a_few_per_cent(model_of):
    missed, prices = 0, []
    for seed in range(30):
        model = model_of("chain", 3, seed=seed, noise=0.15)
        plan = make_plan(model, Latency(1.4 * fastest_s(model)), seed=seed, **FEW)
        options = {name: stage.option for name, stage in plan.stages.items()}
        truth = model.sample_plan(options, 200_000, np.random.default_rng(seed + 1000)).latency_s
        missed += np.mean(truth > plan.objective.latency.bound_s) > 0.05
        prices.append(plan.certificate.price_of_certainty)
    assert missed <= 2  # P(more than 2 of 30 at 1 %) = 0.3 %
    assert np.median(prices) <= 0.02
    assert min(prices) >= 0


def test_twenty_five_diamonds_are_planned(model_of):
    model = model_of("diamonds", 76, seed=14, coupled=0.0)
    plan = make_plan(model, Latency(400.0), samples=400, certify_samples=5000, node_limit=50)
    assert len(plan.stages) == 76
    assert plan.predicted.latency_at_percentile_s <= 400.0


def test_items_and_short_calls_give_bundles_and_records(model_of):
    model = model_of("chain", 2, seed=15, item=1.0)
    stages = tuple(replace(stage, items=5000) for stage in model.workflow.stages)
    tiny = replace(model, workflow=replace(model.workflow, stages=stages))
    plan = make_plan(tiny, Latency(500.0), **FEW)
    assert plan["s0"].record == "summary"
    assert plan["s0"].bundle > 1


def test_a_constraint_that_no_option_keeps_is_infeasible(model_of):
    model = model_of("chain", 2)
    stuck = replace(model.workflow, constraints=(Constraint.parse("s0.workers >= 100"),))
    with pytest.raises(InfeasibleSlo):
        make_plan(replace(model, workflow=stuck), Latency(30.0), samples=200, certify_samples=2000)
