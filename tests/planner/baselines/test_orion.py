from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.objective import Budget, Latency
from prefect_slo.planner.baselines import orion
from prefect_slo.planner.baselines.orion import right_size
from prefect_slo.resources import Capacity


def test_the_function_that_gains_most_grows_first():
    gains = np.array([[10.0, 9.0, 8.0], [20.0, 12.0, 11.0]])
    visited = []

    def latency(state):
        visited.append(state)
        return float(sum(gains[i, at] for i, at in enumerate(state)))

    assert right_size([3, 3], latency, 22.0) == (0, 1)
    assert visited == [(0, 0), (1, 0), (0, 1)]
    assert right_size([3, 3], latency, 19.5) == (2, 2)


def test_without_a_state_that_meets_the_target_the_fastest_seen_is_taken():
    times = {(0,): 9.0, (1,): 5.0, (2,): 7.0}
    assert right_size([3], times.__getitem__, 1.0) == (1,)
    assert right_size([3], times.__getitem__, 1.0, admit=lambda state: state[0] != 0) is None


def test_all_stages_have_as_many_workers_and_the_bound_is_kept(model_of):
    plan = orion(model_of("diamonds", 4, seed=1), Latency(25.0))
    assert len({stage.workers for stage in plan.stages.values()}) == 1
    assert plan.predicted.latency_s.p95 <= 25.0 * 1.01
    fixed = orion(model_of("diamonds", 4, seed=1), Latency(25.0), workers=4)
    assert {stage.workers for stage in fixed.stages.values()} == {4}


def test_a_budget_stops_the_growth(model_of):
    model = model_of("chain", 3, vcpus=(1, 2, 4))
    small = orion(model, Latency(1e6), workers=1)
    budget = Budget(1.05 * small.predicted.cost_usd.p95)
    plan = orion(model, budget, workers=1)
    assert plan.predicted.cost_at_percentile_usd <= budget.bound_usd * 1.01
    assert plan.predicted.latency_s.p95 <= small.predicted.latency_s.p95
    with pytest.raises(InfeasibleSlo):
        orion(model_of("chain", 2, capacity=Capacity(memory_mb=100)), Latency(9.0))


@pytest.mark.skipif("PREFECT_SLO_DATA" not in os.environ, reason="set PREFECT_SLO_DATA to a data folder")
def test_sizes_picked_on_the_measured_video_functions():
    """Published picks for a P95 of 25 s, from 1,000 MB in steps of 64: 1,064 / 1,064 / 4,392 MB, ± one step."""
    sizes, names = (1000, 1800, 5000, 10240), ("Split", "Extract", "Classify")
    folder = Path(os.environ["PREFECT_SLO_DATA"]) / "step-functions" / "video"
    runs = {size: _runs(folder / f"rsc_{size}.txt", names) for size in sizes}
    levels = np.linspace(0.005, 0.995, 100)
    curves = {n: np.stack([np.quantile(runs[size][n], levels) for size in sizes]) for n in names}
    draws = np.random.default_rng(0).random((len(names), 20_000))
    menu = np.arange(1000, 10241, 64)

    def latency(state):
        total = np.zeros(draws.shape[1])
        for name, at, own in zip(names, state, draws, strict=True):
            curve = [np.interp(menu[at], sizes, curves[name][:, k]) for k in range(len(levels))]
            total += np.interp(own, levels, curve)
        return float(np.quantile(total, 0.95))

    picked = [int(menu[at]) for at in right_size([len(menu)] * 3, latency, 25.0)]
    np.testing.assert_allclose(picked, (1064, 1064, 4392), atol=64)


def _runs(path, names):
    rows = [dict(pair.split(":") for pair in line.split()) for line in path.read_text().splitlines() if line.strip()]
    return {name: np.array([float(row[name]) / 1000 for row in rows]) for name in names}
