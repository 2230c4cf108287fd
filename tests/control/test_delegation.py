"""Where work goes: SCAR's rules as a table, and the order by expectation against an enumeration."""

from __future__ import annotations

import random

import pytest

from prefect_slo.control.delegation import (
    LEAST_SEEN,
    Limits,
    Needs,
    Seen,
    Terms,
    delegates,
    expected,
    first,
    predicted_first,
)

LIMITS = Limits(memory_mb=10_240, storage_mb=10_240, time_s=900)


@pytest.mark.parametrize(
    ("needs", "in_lambda", "in_lambda_batch", "in_batch"),
    [
        (Needs(), "lambda", "lambda", "batch"),
        (Needs(memory_mb=10_240, storage_mb=10_240, time_s=900), "lambda", "lambda", "batch"),
        (Needs(gpu=1), None, "batch", "batch"),
        (Needs(gpu=0.25), None, "batch", "batch"),
        (Needs(memory_mb=12_288), None, "batch", "batch"),
        (Needs(storage_mb=20_000), None, "batch", "batch"),
        (Needs(time_s=901), None, "batch", "batch"),
    ],
)
def test_where_work_is_tried_first(needs, in_lambda, in_lambda_batch, in_batch) -> None:
    found = [first(mode, needs, LIMITS) for mode in ("lambda", "lambda-batch", "batch")]
    assert found == [in_lambda, in_lambda_batch, in_batch]


@pytest.mark.parametrize(
    ("end", "goes_on"),
    [
        ("timeout", True),
        ("memory", True),
        ("throttled", True),
        ("died", False),
        ("unknown", False),
        ("start", False),
        ("cancelled", False),
    ],
)
def test_which_ends_batch_makes_good(end, goes_on) -> None:
    assert [delegates(mode, end) for mode in ("lambda", "lambda-batch", "batch")] == [False, goes_on, False]


@pytest.mark.parametrize("by", ["latency", "cost"])
def test_the_order_is_never_worse_in_expectation_than_the_rules(by) -> None:
    """1,000 populations of times; what each order takes is added up run by run."""
    rng = random.Random(7)
    better = 0
    for _ in range(1000):
        limit_s, speed = rng.choice([60.0, 300.0, 900.0]), rng.uniform(0.5, 4.0)
        launch_s, prices = rng.uniform(5, 480), (rng.uniform(1e-6, 1e-4), rng.uniform(1e-6, 1e-4))
        times = [rng.lognormvariate(rng.uniform(1, 7), 1.0) for _ in range(rng.randint(LEAST_SEEN, 40))]
        overran = [t for t in times if t > limit_s]
        seen = Seen(tuple(t for t in times if t <= limit_s), len(overran), tuple(t / speed for t in overran))
        terms = Terms(limit_s, launch_s, *prices, speed)

        def taken(order: str, t: float, terms: Terms = terms) -> float:
            there = t / terms.speed
            if order == "batch":
                return terms.launch_s + there if by == "latency" else there * terms.batch_usd_s
            if t <= terms.limit_s:
                return t if by == "latency" else t * terms.function_usd_s
            if by == "latency":
                return terms.limit_s + terms.launch_s + there
            return terms.limit_s * terms.function_usd_s + there * terms.batch_usd_s

        rules, at_once = (sum(taken(order, t) for t in times) / len(times) for order in ("lambda", "batch"))
        assert expected(seen, terms, by) == pytest.approx((rules, at_once))
        chosen = predicted_first("lambda-batch", Needs(), LIMITS, seen, terms, by)
        ours = at_once if chosen == "batch" else rules
        assert ours <= rules * (1 + 1e-9)
        better += ours < rules
    assert 100 < better < 900, "both orders are met"


def test_little_seen_leaves_it_to_the_rules() -> None:
    seen = Seen((), LEAST_SEEN - 1)
    terms = Terms(900, 60)
    assert predicted_first("lambda-batch", Needs(), LIMITS, seen, terms) == "lambda"
    assert predicted_first("lambda-batch", Needs(), LIMITS, Seen((), LEAST_SEEN), terms) == "batch"
    assert predicted_first("lambda", Needs(), LIMITS, Seen((), LEAST_SEEN), terms) == "lambda", "which has no other"
