"""Stage plans get their bundles and record levels."""

from __future__ import annotations

import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.plan import StagePlan
from prefect_slo.planner.bundles import bundled


def test_a_stage_plan_gets_both_and_keeps_the_rest():
    plan = bundled(StagePlan(workers=4), 0.001, 5000)
    assert (plan.workers, plan.record, plan.bundle) == (4, "summary", 40)
    assert bundled(StagePlan(), 0.5, 0).bundle is None
    with pytest.raises(InvalidValue):
        bundled(StagePlan(), float("nan"), 10)
