from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.objective import Latency
from prefect_slo.planner.baselines import ditto_cost, ditto_latency
from prefect_slo.planner.baselines.ditto import Transfer, degrees_for_cost, degrees_for_time, lay_out
from prefect_slo.resources import Capacity

CHAIN = ((), (0,), (1,), (2,))


def completion(work, degrees, inputs):
    end = np.zeros(len(work))
    for i, parents in enumerate(inputs):
        end[i] = max((end[p] for p in parents), default=0.0) + work[i] / degrees[i]
    return end.max()


def test_on_a_chain_the_square_roots_give_the_closed_form():
    work = np.array([100.0, 25.0, 400.0, 9.0])
    degrees = degrees_for_time(work, CHAIN, 38.0)
    np.testing.assert_allclose(degrees, np.sqrt(work))  # Σ√a = 38
    assert completion(work, degrees, CHAIN) == pytest.approx(np.sqrt(work).sum() ** 2 / 38.0)


def test_inputs_side_by_side_share_in_proportion_and_end_together():
    inputs = ((), (), (0, 1))
    work = np.array([30.0, 10.0, 90.0])
    degrees = degrees_for_time(work, inputs, 100.0)
    assert degrees[0] / degrees[1] == pytest.approx(3.0)
    assert degrees.sum() == pytest.approx(100.0)
    # weight of the tree: (√90 + √(30 + 10))²
    assert completion(work, degrees, inputs) == pytest.approx((np.sqrt(90) + np.sqrt(40)) ** 2 / 100.0)


@pytest.mark.parametrize("seed", range(6))
def test_no_integer_degrees_do_better_than_three_per_cent(seed):
    rng = np.random.default_rng(seed)
    inputs = ((), (), (0, 1), (2,))
    work, slots = rng.uniform(5, 50, 4), 24
    ours = completion(work, degrees_for_time(work, inputs, slots), inputs)
    best = min(
        completion(work, np.array(d), inputs) for d in product(range(1, slots), repeat=4) if sum(d) == slots
    )  # fmt: skip
    assert ours <= best * 1.03


def test_for_cost_memory_counts_under_the_root():
    degrees = degrees_for_cost(np.array([16.0, 4.0]), np.array([1.0, 9.0]), 10.0)
    np.testing.assert_allclose(degrees, [4.0, 6.0])


def test_a_grouped_edge_is_neither_written_nor_read():
    edges = {(0, 1): Transfer(6.0, 3.0)}
    layout = lay_out(np.array([10.0, 7.0]), ((), (0,)), edges, 8.0)
    assert layout.groups == ((0, 1),)
    np.testing.assert_allclose(layout.workers, [4.0, 4.0])  # 10 − 6 and 7 − 3


def test_a_group_that_no_executor_holds_loses_its_last_edge():
    edges = {(i, i + 1): Transfer(1.0, 1.0) for i in range(3)}
    work = np.full(4, 10.0)
    assert lay_out(work, CHAIN, edges, 12.0).groups == ((0, 1, 2),)
    assert lay_out(work, CHAIN, edges, 12.0, executor_slots=7.0).groups == ((0, 1), (2, 3))
    assert lay_out(work, CHAIN, edges, 12.0, executor_slots=4.0).groups == ()


def test_plans_keep_the_bound_and_follow_the_rule(model_of):
    model = model_of("chain", 4, seed=3, workers=(1, 2, 4, 8), vcpus=(1, 2))
    for planner in (ditto_latency, ditto_cost):
        plan = planner(model, Latency(40.0))
        assert plan.predicted.latency_s.p95 <= 40.0 * 1.01
        assert len({stage.size for stage in plan.stages.values()}) == 1
    with pytest.raises(InfeasibleSlo):
        ditto_cost(model_of("chain", 2, capacity=Capacity(memory_mb=100)), Latency(9.0))
