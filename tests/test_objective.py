"""Objectives."""

from __future__ import annotations

import pickle
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.errors import InvalidValue
from prefect_slo.objective import Budget, Latency, Slo


def test_a_bound_is_95_percent_at_99_percent_confidence_unless_said_otherwise() -> None:
    assert (Latency("30s").bound_s, Latency("30s").percentile, Latency("30s").confidence) == (30.0, 0.95, 0.99)
    assert Budget("$0.02") == Budget(0.02, 0.95, 0.99)


def test_ways_to_write_one_bound_are_equal() -> None:
    assert Latency("1m30s") == Latency(90) == Latency(timedelta(seconds=90))


def test_objectives_say_themselves_in_words() -> None:
    both = Slo(Latency(12, 0.999), Budget(0.02, 0.999))
    assert str(both) == "p99.9 latency <= 12 s and p99.9 cost <= $0.02"


def test_the_latency_bound_leads_where_both_are_given() -> None:
    both = Slo(Latency(12), Budget(0.02))
    assert both.bound == Latency(12)
    assert (both.percentile, both.confidence) == (0.95, 0.99)
    assert Slo.of(Budget(0.02)).bound == Budget(0.02)


@given(st.floats(1e-3, 1e6), st.floats(0.01, 0.999), st.floats(0.01, 0.999))
def test_objectives_pickle_and_stay_equal(bound: float, percentile: float, confidence: float) -> None:
    slo = Slo(Latency(bound, percentile, confidence))
    assert pickle.loads(pickle.dumps(slo)) == slo
    assert Slo.of(slo) is slo


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Latency(0), "latency"),
        (lambda: Latency("soon"), "latency"),
        (lambda: Latency(None), "latency"),  # type: ignore[arg-type]
        (lambda: Latency(30, 95), "percentile"),
        (lambda: Latency(30, 1), "percentile"),
        (lambda: Latency(30, "0.95"), "percentile"),  # type: ignore[arg-type]
        (lambda: Latency(30, confidence=0), "confidence"),
        (lambda: Budget(-1), "budget_usd"),
        (lambda: Budget("cheap"), "budget_usd"),
        (lambda: Slo(), "slo"),
        (lambda: Slo(30), "slo.latency"),  # type: ignore[arg-type]
        (lambda: Slo(Budget(1)), "slo.latency"),  # type: ignore[arg-type]
        (lambda: Slo(budget="$1"), "slo.budget"),  # type: ignore[arg-type]
        (lambda: Slo(Latency(30, 0.9), Budget(1, 0.95)), "budget.percentile"),
        (lambda: Slo(Latency(30, confidence=0.9), Budget(1)), "budget.confidence"),
        (lambda: Slo.of(30), "objective"),  # type: ignore[arg-type]
    ],
)
def test_an_objective_that_is_none_is_refused(make, field: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidValue) as refused:
        make()
    assert refused.value.field == field
