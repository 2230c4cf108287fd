"""When to learn, when to change plans, when to go back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.loop import policy
from prefect_slo.loop.policy import PastRun
from prefect_slo.objective import Budget, Latency, Slo

SLO = Slo(latency=Latency(10.0))


def runs(*latencies: float, plan: str = "a", predicted_s: float = 8.0) -> list[PastRun]:
    return [PastRun(plan, latency, predicted_s) for latency in latencies]


def test_the_first_runs_are_learned_from_one_by_one() -> None:
    assert all(policy.due(1, learned) for learned in range(policy.LEARN_EACH))
    assert not policy.due(1, policy.LEARN_EACH)


def test_later_runs_are_learned_from_when_a_quarter_more_has_come() -> None:
    assert not policy.due(24, 100)
    assert policy.due(25, 100)


def test_drift_is_learned_from_at_once_but_nothing_is_learned_from_no_run() -> None:
    assert policy.due(1, 100, drifting=True)
    assert not policy.due(0, 100, drifting=True)
    assert not policy.due(0, 0)


@given(st.floats(0.001, 1e6), st.floats(0.001, 1e6))
def test_a_plan_stays_unless_another_is_better_by_the_margin(now: float, other: float) -> None:
    assert policy.keep(now, other) == (other >= 0.95 * now)


def test_a_run_is_judged_by_the_bound_that_is_asked_now() -> None:
    run = PastRun("a", 9.0, cost_usd=0.02)
    assert run.met(SLO)
    assert not run.met(Slo(latency=Latency(8.0)))
    assert not run.met(Slo(latency=Latency(10.0), budget=Budget(0.01)))
    assert PastRun("a", math.nan).met(SLO), "what wasn't measured is no miss"


def test_one_miss_is_never_distrusted() -> None:
    assert not policy.distrusted(runs(11.0), "a", SLO)


def test_misses_are_distrusted_once_chance_no_longer_explains_them() -> None:
    kept = runs(*[9.0] * 18)
    assert not policy.distrusted([*kept, *runs(11.0, 11.0)], "a", SLO), "2 of 20 happen at p95"
    assert policy.distrusted([*kept, *runs(*[11.0] * 5)], "a", SLO)


def test_only_runs_of_the_plan_itself_speak_against_it() -> None:
    assert not policy.distrusted(runs(*[11.0] * 9, plan="b"), "a", SLO)


def test_a_sound_plan_is_rarely_distrusted() -> None:
    """At exactly the percentile that was promised, the test may speak up in 1 % of looks at most."""
    rng = np.random.default_rng(0)
    distrusted = 0
    for _ in range(2000):
        latencies = np.where(rng.random(30) < 0.05, 11.0, 9.0)
        distrusted += policy.distrusted(runs(*latencies), "a", SLO)
    assert distrusted <= 2000 * policy.SUSPICION * 1.5


def test_a_plan_is_trusted_when_it_was_tried_and_kept_the_bound() -> None:
    assert not policy.trusted(runs(9.0, 9.0), "a", SLO), "two runs prove nothing"
    assert policy.trusted(runs(9.0, 9.0, 9.0), "a", SLO)
    assert not policy.trusted(runs(9.0, 11.0, 11.0, 11.0), "a", SLO)


def test_five_runs_off_to_one_side_are_drift() -> None:
    assert policy.drifting(runs(*[10.5] * 5))
    assert policy.drifting(runs(*[6.0] * 5))
    assert not policy.drifting(runs(*[10.5] * 4))
    assert not policy.drifting(runs(10.5, 10.5, 6.0, 10.5, 10.5)), "to both sides it is noise"
    assert not policy.drifting(runs(*[10.5] * 5, predicted_s=math.nan))


def test_a_bound_is_tightened_by_how_far_runs_went_over_what_was_predicted() -> None:
    assert policy.correction(runs(*[12.0] * 20), "a", SLO, 9.6) == pytest.approx(1.25)
    assert policy.correction(runs(*[6.0] * 20), "a", SLO, 9.6) == 1.0, "never loosened"
    assert policy.correction([], "a", SLO, 9.6) == 1.0


def test_with_runs_enough_the_correction_follows_drift() -> None:
    early, late = runs(*[9.0] * 60), runs(*[12.0] * 8)
    assert policy.correction(early, "a", SLO, 9.6) == 1.0
    assert policy.correction((*early, *late), "a", SLO, 9.6) == pytest.approx(1.25)
    assert len(policy.calibration((*early, *late), "a", SLO, 9.6).scores) == 68


def test_a_claim_in_your_runs_counts_them_until_they_disprove_it() -> None:
    def proven(*latencies: float) -> int:
        return policy.proven(policy.calibration(runs(*latencies), "a", SLO, 9.6), 0.99, 10.0 / 9.6)

    assert proven(*[9.9] * 40) == 40, "too few to claim, none against it"
    assert proven(*[9.9] * 100) == 100
    assert proven(*[9.9] * 95, *[10.4] * 5) == 0


def test_under_a_budget_it_is_cost_that_went_over() -> None:
    dear = [PastRun("a", 1.0, cost_usd=0.03) for _ in range(9)]
    assert policy.correction(dear, "a", Slo(budget=Budget(0.02)), 0.02) == pytest.approx(1.5)


def test_exploration_takes_its_share_of_runs() -> None:
    rng = np.random.default_rng(1)
    explored = sum(policy.explores(0.1, rng) for _ in range(5000))
    assert 400 < explored < 600
    assert not any(policy.explores(0.0, rng) for _ in range(100))
