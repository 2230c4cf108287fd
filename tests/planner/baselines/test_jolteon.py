from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.errors import InvalidPlan, InvalidValue
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.planner.baselines import jolteon
from prefect_slo.planner.baselines.grid import comparable
from prefect_slo.planner.baselines.jolteon.planner import build, jolteon_samples
from prefect_slo.planner.baselines.jolteon.pruning import support
from prefect_slo.planner.baselines.jolteon.responses import Form, fit_response, terms
from prefect_slo.planner.baselines.jolteon.rounding import probe
from prefect_slo.planner.problem import Goal, Problem
from prefect_slo.resources import Menu, Size
from prefect_slo.workflow import Edge, Stage, Workflow

GRID = {"workers": (1, 4, 8, 16), "vcpus": (1, 1.5, 2, 2.5, 3, 4, 5)}


def program_of(model, goal: Goal, samples: int = 300):
    problem = Problem.of(model.tables(samples, np.random.default_rng(0)))
    grids = [comparable(s, mask) for s, mask in zip(problem.stages, problem.allowed, strict=True)]
    return build(problem, goal, grids)


@pytest.mark.parametrize(("stages", "right", "published"), [(4, 4048, 2715), (8, 6714, 4048)])
def test_hoeffding_sizes_of_a_menu_of_28_options(stages, right, published):
    menu = Menu("local", (1, 4, 8, 16), tuple(Size(v, 1024) for v in (1, 1.5, 2, 2.5, 3, 4, 5)))
    workflow = Workflow("chain", tuple(Stage(f"s{i}", (Edge(f"s{i - 1}"),) if i else (), menu) for i in range(stages)))
    slo = Slo.of(Latency(10.0, confidence=0.999))
    assert jolteon_samples(workflow, slo) == right
    assert jolteon_samples(workflow, slo, published=True) == published


@pytest.mark.parametrize("priced", [False, True])
@pytest.mark.parametrize("form", [Form(False, True, True), Form(False, False, False), Form(True, True, True)])
def test_derivatives_are_those_of_the_terms(form, priced):
    at, step = np.array([3.0, 1.7, 5.0]), 1e-6
    for axis in range(3):
        up, down = at.copy(), at.copy()
        up[axis] += step
        down[axis] -= step
        numeric = (terms(form, *up, priced=priced)[0] - terms(form, *down, priced=priced)[0]) / (2 * step)
        if axis == 0 and form.single:
            continue  # the one worker of such a stage never moves
        np.testing.assert_allclose(terms(form, *at, priced=priced)[1 + axis], numeric, atol=1e-5)


def test_a_stage_that_follows_the_formula_is_fitted_exactly(model_of):
    model = model_of("chain", 2, seed=2, coupled=1.0, **GRID)
    model.power.update(s0=1.0, s1=1.0)
    problem = Problem.of(model.tables(50, np.random.default_rng(0)))
    for stage in problem.stages:
        response = fit_response(stage, np.arange(len(stage.options)), stage.latency, priced=False)
        upstream = next(iter(stage.upstream.items()), (0, 0))
        for at, option in enumerate(stage.options):
            fitted = response.theta @ response.terms(option.workers, option.vcpus, upstream[0])[0]
            np.testing.assert_allclose(fitted, stage.latency[upstream[1], at], rtol=1e-3)


def test_support_is_what_nothing_dominates():
    values = np.array([[1.0, 1.0], [2.0, 0.5], [0.5, 0.5], [2.0, 0.5], [0.0, 3.0]])
    kept = support(values)
    assert kept.tolist() == [0, 1, 4]
    rng = np.random.default_rng(0)
    cloud = rng.standard_normal((400, 3))
    brute = [i for i in range(400) if not any((cloud[j] >= cloud[i]).all() for j in range(400) if j != i)]
    assert support(cloud).tolist() == brute


@pytest.mark.parametrize("shape", ["chain", "sources", "diamonds"])
def test_pruning_changes_no_optimum(model_of, shape):
    model = model_of(shape, 4, seed=4, coupled=0.5, noise=0.15, **GRID)
    for goal in (Goal(latency_bound_s=22.0), Goal(cost_bound_usd=0.004, cost_weight=0.0, latency_weight=1.0)):
        program = program_of(model, goal)
        full, pruned = program.solve(prune=False), program.solve(prune=True)
        assert full.kept
        assert pruned.kept
        assert pruned.constraints < full.constraints
        assert pruned.objective == pytest.approx(full.objective, rel=2e-3)


def test_no_sample_breaks_the_bound_at_the_optimum_and_the_bound_is_used(model_of):
    program = program_of(model_of("chain", 4, seed=4, **GRID), Goal(latency_bound_s=22.0))
    solution = program.solve()
    slack = program._slack(
        np.concatenate([solution.workers, solution.vcpus]), (program.times, (0, 1, 2, 3)), slice(None)
    )
    assert slack[0].min() == pytest.approx(0.0, abs=1e-3)


def test_probing_finds_the_best_neighbour(model_of):
    model = model_of("chain", 2, seed=6, **GRID)
    problem = Problem.of(model.tables(200, np.random.default_rng(0)))
    goal = Goal(latency_bound_s=12.0)
    grids = [np.arange(len(stage.options)) for stage in problem.stages]
    start = tuple(len(grid) - 1 for grid in grids)
    found = probe(problem, goal, grids, start, depth=1)
    moved = [i for i in range(2) if found[i] != start[i]]
    assert len(moved) <= 1
    assert problem.score(found, goal) <= problem.score(start, goal)
    assert problem.score(probe(problem, goal, grids, found, depth=6), goal) <= problem.score(found, goal)


def test_every_sample_keeps_the_bound_where_the_published_guarantee_holds(model_of):
    model = model_of("diamonds", 4, seed=5, **GRID)
    strict, loose = (jolteon(model, Latency(20.0), samples=500, excuse=excuse) for excuse in (False, True))
    assert strict.predicted.latency_s.p99 <= 20.0
    assert loose.predicted.cost_usd.mean <= strict.predicted.cost_usd.mean
    assert loose.predicted.latency_s.p95 <= 20.0 * 1.01


def test_a_budget_is_kept_and_two_bounds_are_refused(model_of):
    model = model_of("chain", 3, seed=2, **GRID)
    plan = jolteon(model, Budget(0.004), samples=400)
    assert plan.predicted.cost_usd.p95 <= 0.004
    with pytest.raises(InvalidValue, match="one bound"):
        jolteon(model, Slo(Latency(9.0), Budget(0.1)), samples=50)


def test_too_many_paths_are_refused(model_of):
    with pytest.raises(InvalidPlan, match="64 paths"):
        jolteon(model_of("diamonds", 22, workers=(1, 2), vcpus=(1, 2)), Latency(100.0), samples=20)
