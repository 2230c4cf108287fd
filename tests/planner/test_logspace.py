from __future__ import annotations

import itertools

import numpy as np
import pytest

from prefect_slo.errors import InvalidPlan, InvalidValue
from prefect_slo.planner.logspace import LogSpace
from prefect_slo.planner.posynomials import fit
from prefect_slo.planner.problem import Goal, Problem
from prefect_slo.planner.solver import solve


@pytest.fixture(scope="module")
def program(model_of) -> tuple[Problem, LogSpace, float]:
    """A program on diamonds, and the cost of the best plan on the menu at 20 s."""
    model = model_of("diamonds", 4, seed=1, workers=(1, 2, 4, 8), vcpus=(0.5, 1, 2, 4), noise=0.05, coupled=1.0)
    problem = Problem.of(model.tables(1000, np.random.default_rng(0)))
    found = solve(problem, Goal(latency_bound_s=20.0), 3000)
    assert found.choice is not None
    return problem, LogSpace(problem, 0.95, found.choice), found.score


def test_off_the_menu_is_a_little_cheaper_and_keeps_the_bound_on_paper(program):
    problem, logspace, on_menu = program
    advice = logspace.solve(20.0)
    assert advice.feasible
    assert advice.latency_s <= 20.0 * (1 + 1e-6)
    assert 0.75 * on_menu < advice.cost_usd < 1.02 * on_menu
    for stage in problem.stages:
        assert stage.workers.min() - 1e-6 <= advice.workers[stage.name] <= stage.workers.max() + 1e-6


def test_another_bound_is_solved_without_building_again_and_costs_follow_the_price_of_a_second(program):
    _, logspace, _ = program
    compiled = logspace._program
    here, there = logspace.solve(20.0), logspace.solve(20.02)
    assert logspace._program is compiled
    assert compiled.is_dcp(dpp=True)
    assert (here.cost_usd - there.cost_usd) / 0.02 == pytest.approx(here.price_of_second, rel=0.02)
    assert here.elasticity == pytest.approx(here.price_of_second * 20.0 / here.cost_usd)


def test_costs_fall_as_the_bound_is_raised_until_it_no_longer_binds(program):
    _, logspace, _ = program
    costs = [logspace.solve(bound).cost_usd for bound in (12.0, 16.0, 24.0, 48.0, 400.0, 4000.0)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(costs))
    assert logspace.solve(4000.0).price_of_second == pytest.approx(0.0, abs=1e-9)


def test_bounds_out_of_reach_are_infeasible(program):
    _, logspace, _ = program
    assert not logspace.solve(0.01).feasible
    assert not logspace.solve(1.0).feasible
    with pytest.raises(InvalidValue):
        logspace.solve(-1.0)


def test_item_edges_are_refused(model_of):
    problem = Problem.of(model_of("chain", 3, item=1.0).tables(50, np.random.default_rng(0)))
    with pytest.raises(InvalidPlan, match="item"):
        LogSpace(problem, 0.95, (0, 0, 0))


def test_posynomials_recover_a_formula_of_their_family():
    d, v = (grid.ravel() for grid in np.meshgrid([1.0, 2, 4, 8], [0.5, 1, 2, 4]))
    u = np.zeros_like(d)
    formula = fit(d, v, u, 0.3 + 2.0 / d + 5.0 / (d * v))
    assert formula.error < 1e-6
    np.testing.assert_allclose(formula(3.0, 1.5), 0.3 + 2.0 / 3 + 5.0 / 4.5, rtol=1e-5)
    assert all(term.coefficient > 0 for term in formula.terms)


def test_a_core_cap_and_a_ceiling_are_convex_minorants():
    d, v = (grid.ravel() for grid in np.meshgrid([1.0, 2, 4, 8], [0.5, 1, 2, 4, 8]))
    capped = fit(d, v, np.zeros_like(d), 6.0 / (d * np.minimum(v, 2.0)))
    assert capped.error < 1e-6
    stepped = fit(d, np.ones_like(d), np.zeros_like(d), np.maximum(1 / d, 1 / 4), calls=4)
    assert stepped.error < 1e-6
