from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.errors import InvalidValue
from prefect_slo.plan import StagePlan
from prefect_slo.planner.bundles import BUNDLE_S, bundle_size, bundled, record_level


@pytest.mark.parametrize(
    ("item_s", "items", "level"),
    [(0.001, 200, "full"), (0.2, 10**6, "full"), (0.001, 201, "summary"), (0.001, 20_000, "summary"),
     (0.001, 20_001, "bare"), (0.05, 5000, "full")],
)  # fmt: skip
def test_record_level_follows_item_time_and_fan_out(item_s, items, level):
    assert record_level(item_s, items) == level


@given(item_s=st.floats(0, 10), items=st.integers(1, 10**6), workers=st.integers(1, 64))
def test_bundles_are_worth_a_dispatch_and_leave_work_for_every_worker(item_s, items, workers):
    size = bundle_size(item_s, items, workers)
    most = items // (2 * workers)
    assert 1 <= size <= max(1, most)
    assert size * item_s >= BUNDLE_S * (1 - 1e-9) or size == max(1, most)


def test_a_stage_plan_gets_both_and_keeps_the_rest():
    plan = bundled(StagePlan(workers=4), 0.001, 5000)
    assert (plan.workers, plan.record, plan.bundle) == (4, "summary", 25)
    assert bundled(StagePlan(), 0.5, 0).bundle is None
    with pytest.raises(InvalidValue):
        bundled(StagePlan(), float("nan"), 10)
