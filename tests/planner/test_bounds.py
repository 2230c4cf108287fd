"""Every lower bound lies under the brute-force optimum, and close to it."""

from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.planner.incumbent import begin
from prefect_slo.planner.multipliers import ascend
from prefect_slo.planner.network import Network
from prefect_slo.planner.paired import paired_bound
from prefect_slo.planner.paths import PathBounds, split
from prefect_slo.planner.problem import Goal, Problem, percentile
from prefect_slo.planner.relax import ScenarioBounds, quantile_bound, relax
from prefect_slo.planner.search import search
from prefect_slo.planner.solver import solve
from prefect_slo.planner.suffix import Suffix


def solved(model_of, shape: str, seed: int, item: float = 0.0) -> tuple[Problem, Goal, tuple[int, ...], float]:
    """A problem of four stages, a goal of middling tightness, its optimal plan and that plan's cost."""
    problem = Problem.of(model_of(shape, 4, seed=seed, item=item, noise=0.1).tables(400, np.random.default_rng(seed)))
    choices = list(problem.choices())
    allowed = Goal().allowed(problem.n_samples)
    latency = np.array([percentile(problem.latency(choice), allowed) for choice in choices])
    cost = np.array([problem.mean_cost(choice) for choice in choices])
    bound = float(np.quantile(latency, 0.2))
    best = int(np.argmin(np.where(latency <= bound, cost, np.inf)))
    return problem, Goal(latency_bound_s=bound), choices[best], float(cost[best])


@pytest.mark.parametrize("shape", ["chain", "diamonds", "sources", "random"])
@pytest.mark.parametrize("seed", range(4))
def test_quantile_and_path_bounds_hold_for_every_plan(model_of, shape, seed):
    problem, goal, plan, optimum = solved(model_of, shape, seed)
    for bound in (quantile_bound(problem, goal), quantile_bound(problem, goal, plan)):
        assert bound <= optimum * (1 + 1e-5)
    paths = PathBounds.of(ScenarioBounds.of(problem, goal, plan), goal, plan)
    if paths is not None:
        assert paths.root.sum() + paths.least_beside(problem)[0] <= optimum * (1 + 1e-5)
        assert all(sum(paths.paths[p].share[at] for p, at in on) == pytest.approx(1.0) for on in paths.through if on)
    assert search(problem, goal, incumbent=plan, node_limit=1).lower_bound <= optimum * (1 + 1e-5)


def test_parallel_branches_are_bounded_together_by_their_paths(model_of):
    problem = Problem.of(
        model_of("sources", 8, seed=0, coupled=0.0, vcpus=(1, 2, 3, 4)).tables(1000, np.random.default_rng(0))
    )
    first = begin(problem, Goal(latency_bound_s=20.0))
    goal = Goal(latency_bound_s=20.0)
    bounds = ScenarioBounds.of(problem, goal, first.plan)
    paths = PathBounds.of(bounds, goal, first.plan)
    together = paths.root.sum() + paths.least_beside(problem)[0]
    assert quantile_bound(problem, goal, first.plan) < together <= problem.mean_cost(first.plan) * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_item_edges_keep_the_quantile_bound_valid(model_of, seed):
    problem, goal, plan, optimum = solved(model_of, "chain", seed, item=0.7)
    assert quantile_bound(problem, goal, plan) <= optimum * (1 + 1e-5)


@pytest.mark.parametrize("shape", ["chain", "diamonds", "sources", "random"])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_scenarios_bound_every_plan_within_a_budget(model_of, shape, seed):
    model = model_of(shape, 4, seed=seed, item=0.5 if seed == 2 else 0.0, noise=0.1)
    problem = Problem.of(model.tables(400, np.random.default_rng(seed)))
    choices = list(problem.choices())
    allowed = Goal().allowed(problem.n_samples)
    cost = [percentile(problem.cost(choice), allowed) for choice in choices]
    budget = Goal(cost_bound_usd=float(np.quantile(cost, 0.3)), cost_weight=0.0, latency_weight=1.0)
    both = Goal(latency_bound_s=float(np.median([problem.latency(c).max() for c in choices])), cost_bound_usd=max(cost))
    for goal in (budget, both):
        best = min(choices, key=lambda choice: problem.score(choice, goal))
        for reference in (best, choices[0]):
            assert paired_bound(problem, goal, reference) <= problem.score(best, goal) * (1 + 1e-5)


def test_pairs_close_most_of_the_gap_that_two_bounds_leave(model_of):
    model = model_of("chain", 4, workers=(1, 2, 3, 4, 6, 8), vcpus=(0.5, 1, 1.5, 2, 3, 4), noise=0.1, coupled=0.0)
    problem = Problem.of(model.tables(2000, np.random.default_rng(0)))
    goal = Goal(cost_bound_usd=0.002, cost_weight=0.0, latency_weight=1.0)
    found = solve(problem, goal, 20_000)
    loose = 1 - quantile_bound(problem, goal, found.choice) / found.score
    assert 0 <= 1 - paired_bound(problem, goal, found.choice) / found.score < 0.6 * loose


def test_on_a_rich_chain_the_quantile_bound_is_tight(model_of):
    model = model_of("chain", 4, workers=(1, 2, 3, 4, 6, 8), vcpus=(0.5, 1, 1.5, 2, 3, 4), noise=0.05, coupled=0.0)
    problem = Problem.of(model.tables(1000, np.random.default_rng(0)))
    found = solve(problem, Goal(latency_bound_s=12.0), 5000)
    assert found.complete
    assert quantile_bound(problem, Goal(latency_bound_s=12.0), found.choice) >= 0.98 * found.score


@pytest.mark.parametrize("item", [0.0, 0.7])
@pytest.mark.parametrize("shape", ["chain", "diamonds", "sources"])
def test_the_linear_program_bounds_the_best_plan_of_its_scenario(model_of, shape, item):
    problem = Problem.of(model_of(shape, 4, seed=5, item=item).tables(50, np.random.default_rng(5)))
    choices = list(problem.choices())
    latency = np.stack([problem.latency(choice) for choice in choices])
    cost = np.array([problem.mean_cost(choice) for choice in choices])
    for scenario in (0, 7, 23):
        bound = float(np.quantile(latency[:, scenario], 0.3))
        best = cost[latency[:, scenario] <= bound].min()
        assert relax(problem, Goal(latency_bound_s=bound), scenario).value <= best * (1 + 1e-6)
        fastest = relax(problem, Goal(cost_weight=0.0, latency_weight=1.0), scenario).value
        assert fastest <= latency[:, scenario].min() * (1 + 1e-6)


def test_the_price_of_a_second_is_what_a_second_saves(model_of):
    problem = Problem.of(model_of("diamonds", 5, seed=6, coupled=0.0).tables(50, np.random.default_rng(6)))
    goal = Goal(latency_bound_s=14.0)
    here, there = relax(problem, goal, 3), relax(problem, Goal(latency_bound_s=14.0 + 1e-4), 3)
    assert here.price_of_second > 0
    assert (here.value - there.value) / 1e-4 == pytest.approx(here.price_of_second, rel=1e-3)
    assert all(mix.sum() == pytest.approx(1.0) for mix in here.mix)


def test_a_scenario_that_no_mix_keeps_is_infinite(model_of):
    problem = Problem.of(model_of("chain", 3).tables(20, np.random.default_rng(0)))
    assert relax(problem, Goal(latency_bound_s=1e-3), 0).value == np.inf


@pytest.mark.parametrize("shape", ["chain", "diamonds", "random"])
def test_dual_ascent_comes_close_to_the_linear_program(model_of, shape):
    problem = Problem.of(model_of(shape, 6, seed=7, coupled=0.0).tables(40, np.random.default_rng(7)))
    goal = Goal(latency_bound_s=20.0)
    multipliers = ascend(problem, goal, [0] * 6)
    suffix = Suffix.of(problem, lambda i: multipliers.stage(problem, goal, i))
    values = multipliers.constant(problem, goal) + suffix.rest(0, ())
    exact = np.array([relax(problem, goal, s).value for s in range(40)])
    assert (values <= exact * (1 + 1e-5)).all()
    assert np.median(values / exact) > 0.98


def test_suffix_tables_equal_enumeration_over_coupled_stages(model_of):
    problem = Problem.of(model_of("chain", 3, seed=8, coupled=1.0).tables(10, np.random.default_rng(8)))
    suffix = Suffix.of(problem, lambda i: problem.stages[i].latency)
    least = np.min(
        [
            sum(s.latency[problem.upstream_row(i, choice), choice[i]] for i, s in enumerate(problem.stages))
            for choice in problem.choices()
        ],
        axis=0,
    )
    np.testing.assert_allclose(suffix.rest(0, ()), least, rtol=1e-6)


def test_longest_path_equals_the_makespan_and_marks_a_path_of_that_length(model_of):
    model = model_of("random", 6, seed=9, item=0.5)
    problem = Problem.of(model.tables(100, np.random.default_rng(9)))
    choice = next(iter(problem.choices()))
    own = [s.latency[problem.upstream_row(i, choice), choice[i]] for i, s in enumerate(problem.stages)]
    piece = [time * s.piece[choice[i]] for i, (time, s) in enumerate(zip(own, problem.stages, strict=True))]
    network = Network.of(problem.stages)
    length, on = network.longest(own, piece)
    np.testing.assert_allclose(length + problem.driver, problem.latency(choice), rtol=1e-5)
    weight = {"full": own, "piece": piece, "tail": piece}
    along = sum(on[a] * weight[arc.kind][arc.head] for a, arc in enumerate(network.arcs) if arc.kind in weight)
    np.testing.assert_allclose(along, length, rtol=1e-5)


def test_flow_splits_into_paths_that_add_up(model_of):
    problem = Problem.of(model_of("diamonds", 7, seed=10).tables(50, np.random.default_rng(10)))
    multipliers = ascend(problem, Goal(latency_bound_s=20.0), [0] * 7)
    flow = multipliers.flow.mean(axis=1)
    network = multipliers.network
    total = sum(flow[a] for a, arc in enumerate(network.arcs) if arc.kind == "sink")
    paths = split(network, flow)
    assert sum(amount for amount, _ in paths) == pytest.approx(total, rel=0.1)
    assert all(path[0] == 0 and path[-1] == 6 for _, path in paths)
