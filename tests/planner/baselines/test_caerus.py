from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.errors import InfeasibleSlo, UnknownStage
from prefect_slo.objective import Latency
from prefect_slo.planner.baselines import caerus
from prefect_slo.planner.baselines.caerus import in_proportion
from prefect_slo.resources import Capacity


def test_workers_are_in_proportion_to_bytes_with_one_at_least():
    np.testing.assert_allclose(in_proportion(np.array([2e9, 1e9, 1e9]), 16.0), [8.0, 4.0, 4.0])
    np.testing.assert_allclose(in_proportion(np.array([1e9, 1.0]), 4.0), [4.0, 1.0])


def test_a_stage_that_reads_more_gets_more_workers(model_of):
    model = model_of("chain", 3, seed=3, workers=(1, 2, 4, 8))
    plan = caerus(model, Latency(30.0), input_bytes={"s0": 4e9, "s1": 1e9, "s2": 1e9})
    assert plan["s0"].workers > plan["s1"].workers == plan["s2"].workers
    assert plan.predicted.latency_s.p95 <= 30.0 * 1.01


def test_bytes_of_every_stage_are_needed(model_of):
    with pytest.raises(UnknownStage, match="s1"):
        caerus(model_of("chain", 2), Latency(30.0), input_bytes={"s0": 1.0})
    with pytest.raises(InfeasibleSlo):
        caerus(model_of("chain", 2, capacity=Capacity(memory_mb=100)), Latency(9.0))
