"""Memory needs against lines of known slope, and the ladder of retries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.models.memory import MemoryNeed, ladder


def test_peaks_on_a_line_are_recovered_and_extrapolated() -> None:
    size = np.array([0.5, 1.0, 2.0, 4.0] * 5)
    need = MemoryNeed.fit(200 + 100 * size, size)
    assert need is not None
    assert (need.base_mb, need.per_size_mb) == (pytest.approx(200, rel=1e-6), pytest.approx(100, rel=1e-6))
    assert need.at(8.0) == pytest.approx(1000 * 1.075)


def test_unknown_peaks_give_no_need() -> None:
    assert MemoryNeed.fit(np.array([np.nan, 0.0])) is None


@given(st.lists(st.floats(50, 5000), min_size=1, max_size=30))
def test_the_need_is_above_every_measured_peak(peaks: list[float]) -> None:
    need = MemoryNeed.fit(np.array(peaks))
    assert need is not None
    assert need.at() > max(peaks)


def test_more_runs_need_less_margin() -> None:
    few, many = (MemoryNeed.fit(np.full(n, 500.0)) for n in (2, 50))
    assert few is not None
    assert many is not None
    assert few.at() > many.at() > 500


def test_the_smallest_safe_size_is_on_offer_or_none() -> None:
    need = MemoryNeed.fit(np.full(10, 900.0))
    assert need is not None
    assert need.smallest_safe((512, 2048, 1024)) == 1024
    assert need.smallest_safe((512, 768)) is None


def test_the_ladder_doubles_and_ends_at_the_largest() -> None:
    assert ladder((512, 1024, 1536, 2048, 3008), 512) == (1024, 2048, 3008)
    assert ladder((512, 1024, 1536, 2048, 3008), 512, most_mb=2048) == (1024, 2048)
    assert ladder((512,), 512) == ()
