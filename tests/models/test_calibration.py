"""Conformal claims: known counts, coverage by simulation, drift."""

from __future__ import annotations

import json

import numpy as np
import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.models.calibration import Calibration, runs_needed


def _after(scores: np.ndarray, percentile: float = 0.95) -> Calibration:
    return Calibration(percentile, tuple(scores.tolist()))


@pytest.mark.parametrize(("confidence", "needed"), [(None, 19), (0.95, 59), (0.99, 90), (0.999, 135)])
def test_a_p95_takes_as_many_runs_as_order_statistics_say(confidence: float | None, needed: int) -> None:
    assert runs_needed(0.95, confidence) == needed


def test_no_claim_is_made_before_its_runs_are_there() -> None:
    early = _after(np.ones(89))
    assert early.quantile(0.99).factor is None
    assert not early.quantile(0.99).holds
    assert early.quantile(0.99).runs == 89
    assert early.next_run().factor == 1.0
    assert _after(np.linspace(0.5, 0.9, 90)).quantile(0.99).holds


def test_the_next_run_is_kept_as_often_as_claimed() -> None:
    rng = np.random.default_rng(0)
    scores = rng.lognormal(0.1, 0.3, size=(3000, 41))
    kept = [row[-1] <= (_after(row[:-1]).next_run().factor or 0) for row in scores]
    assert np.mean(kept) == pytest.approx(39 / 41, abs=0.012)


def test_the_quantile_is_bounded_as_surely_as_claimed() -> None:
    rng = np.random.default_rng(1)
    true = float(np.exp(0.3 * 1.6449))
    bounds = [_after(rng.lognormal(0, 0.3, size=150)).quantile(0.9).factor for _ in range(800)]
    assert 0.89 <= np.mean(np.array(bounds) >= true) <= 0.97


def test_under_drift_misses_stay_as_many_as_promised() -> None:
    rng = np.random.default_rng(2)
    calibration, misses = Calibration(), []
    for k in range(1500):
        actual = float(rng.lognormal(0.0005 * k, 0.2))
        misses.append(actual > calibration.adaptive_factor)
        calibration = calibration.observe(actual, 1.0)
    assert np.mean(misses[100:]) == pytest.approx(0.05, abs=0.02)
    fixed = np.array(calibration.scores) > np.exp(0.2 * 1.6449)
    assert fixed.mean() > 0.5


def test_drift_is_told_from_bad_luck() -> None:
    assert not _after(np.r_[np.full(38, 0.9), 1.1, 1.1]).drifting
    assert _after(np.r_[np.full(30, 0.9), np.full(10, 1.1)]).drifting
    assert not Calibration().drifting


def test_a_document_round_trips() -> None:
    calibration = Calibration(0.9).observe(3.0, 2.0).observe(1.0, 2.0)
    assert Calibration.from_document(json.loads(json.dumps(calibration.to_document()))) == calibration
    with pytest.raises(InvalidValue):
        Calibration.from_document({"scores": []})


@pytest.mark.parametrize(("actual", "predicted"), [(0.0, 1.0), (1.0, float("nan")), (-1.0, 1.0)])
def test_bad_runs_are_refused(actual: float, predicted: float) -> None:
    with pytest.raises(InvalidValue):
        Calibration().observe(actual, predicted)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("scores", [1.0, -1.0], r"scores\[1\]"),
        ("scores", [float("nan")], r"scores\[0\]"),
        ("scores", ["1"], r"scores\[0\]"),
        ("scores", "123", "scores"),
        ("scores", 3, "scores"),
        ("level", 0.7, "level"),
        ("level", float("inf"), "level"),
        ("level", "0.1", "level"),
        ("percentile", None, "percentile"),
    ],
)
def test_a_document_of_scores_that_no_run_can_have_is_refused(field: str, value: object, named: str) -> None:
    document = {**Calibration(0.9).observe(3.0, 2.0).to_document(), field: value}
    with pytest.raises(InvalidValue, match=named):
        Calibration.from_document(document)


def test_a_level_at_its_end_is_read_again() -> None:
    calibration = Calibration(0.95, (1.0,), 0.0)
    assert Calibration.from_document(calibration.to_document()) == calibration
