from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.errors import InfeasibleSlo, InvalidValue
from prefect_slo.objective import Latency
from prefect_slo.planner.baselines import power_tuning
from prefect_slo.planner.baselines.power_tuning import trimmed_mean, tune
from prefect_slo.resources import Capacity

TIMES, COSTS = [35.0, 18.0, 9.0, 9.0, 5.0], [2.0, 1.9, 1.9, 2.1, 4.0]


def test_the_three_strategies_on_one_function():
    assert tune(TIMES, COSTS, "cost") == 2  # as cheap as the second, and faster
    assert tune(TIMES, COSTS, "speed") == 4
    balance = [0.5 * c / 4.0 + 0.5 * t / 35.0 for t, c in zip(TIMES, COSTS, strict=True)]
    assert tune(TIMES, COSTS, "balanced") == int(np.argmin(balance)) == 2
    assert tune(TIMES, COSTS, "balanced", weight=0.0) == 4
    assert tune(TIMES, COSTS, "balanced", weight=1.0) == 1


def test_means_leave_out_a_fifth_at_either_end():
    assert trimmed_mean(np.array([100.0, 1.0, 2.0, 3.0, -50.0])) == 2.0


def test_unknown_strategies_and_weights_are_refused(model_of):
    with pytest.raises(InvalidValue, match="strategy"):
        tune(TIMES, COSTS, "fastest")
    with pytest.raises(InvalidValue, match="weight"):
        power_tuning(model_of("chain", 2), Latency(9.0), weight=2.0)


def test_every_stage_is_tuned_by_itself(model_of):
    model = model_of("chain", 3, seed=1, vcpus=(1, 2, 4))
    fast = power_tuning(model, Latency(9.0), strategy="speed")
    cheap = power_tuning(model, Latency(9.0), strategy="cost")
    balanced = power_tuning(model, Latency(9.0))
    assert {stage.workers for stage in fast.stages.values()} == {2}
    assert fast.predicted.latency_s.mean <= balanced.predicted.latency_s.mean <= cheap.predicted.latency_s.mean
    assert cheap.predicted.cost_usd.mean <= balanced.predicted.cost_usd.mean <= fast.predicted.cost_usd.mean
    with pytest.raises(InfeasibleSlo):
        power_tuning(model_of("chain", 2, capacity=Capacity(memory_mb=100)), Latency(9.0))
