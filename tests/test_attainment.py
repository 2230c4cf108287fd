"""Attainment and its interval, against scipy's own binomial test."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from prefect_slo.attainment import Attainment, runs_for_claim
from prefect_slo.errors import InvalidValue


@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99])
)
def test_the_interval_is_the_exact_binomial_one(counts: tuple[int, int], confidence: float) -> None:
    expected = binomtest(*counts).proportion_ci(confidence, method="exact")
    assert Attainment(*counts).interval(confidence) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_without_runs_nothing_is_known() -> None:
    assert math.isnan(Attainment(0, 0).share)
    assert Attainment(0, 0).interval() == (0.0, 1.0)


def test_more_runs_met_than_made_is_refused() -> None:
    with pytest.raises(InvalidValue, match="met is 4; expected at most the number of runs, 3"):
        Attainment(4, 3)


@pytest.mark.parametrize(("percentile", "confidence", "runs"), [(0.95, 0.99, 90), (0.95, 0.95, 59), (0.5, 0.75, 2)])
def test_a_claim_takes_as_many_runs_as_wilks_says(percentile: float, confidence: float, runs: int) -> None:
    assert runs_for_claim(percentile, confidence) == runs
    assert percentile**runs <= 1 - confidence + 1e-12 < percentile ** (runs - 1)
