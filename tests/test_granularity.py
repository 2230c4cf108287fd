"""Bundles and record levels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.granularity import LARGEST, TARGET_S, bundle_size, record_level


@pytest.mark.parametrize(
    ("item_s", "items", "level"),
    [(0.001, 199, "full"), (0.2, 10**6, "full"), (0.001, 200, "summary"), (0.001, 20_000, "summary"),
     (0.001, 20_001, "bare"), (0.05, 5000, "full"), (None, 5000, "full")],
)  # fmt: skip
def test_record_level_follows_item_time_and_fan_out(item_s, items, level):
    assert record_level(items, item_s) == level


def test_a_task_that_asks_for_more_is_recorded_in_full():
    assert record_level(5000, 0.001, eligible=False) == "full"


@given(item_s=st.floats(0, 10), items=st.integers(1, 10**6), workers=st.integers(1, 64))
def test_bundles_are_worth_a_dispatch_and_leave_work_for_every_worker(item_s, items, workers):
    size = bundle_size(items, workers, item_s)
    most = min(-(-items // (2 * workers)), LARGEST)
    assert 1 <= size <= max(1, most)
    assert size * item_s >= TARGET_S * (1 - 1e-9) or size == max(1, most)


def test_nothing_is_bundled_before_an_item_was_measured():
    assert bundle_size(1000, 2, None) == 1


def test_what_the_plan_says_goes_before_and_batches_stay_whole():
    assert bundle_size(1000, 2, 0.5, 7) == 7
    assert bundle_size(1000, 2, 0.5, 7, 4) == 8
    assert bundle_size(5, 2, 0.5, 7, 4) == 5
