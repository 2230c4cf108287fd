"""A user's test fails when the bound isn't kept, and says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow, flow

from prefect_slo.blocks import SLOProfile
from prefect_slo.errors import InvalidValue, NotEnoughObservations
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency, Slo
from prefect_slo.planner import make_plan
from prefect_slo.resources import Size
from prefect_slo.testing import SloNotMet, assert_meets_slo, store_profile

Letters = Callable[..., Flow[..., Any]]
Profile = Callable[..., SLOProfile]


def model_of(profile: SLOProfile) -> WorkflowModel:
    workflow = profile.workflow()
    assert workflow is not None
    return WorkflowModel.from_document(workflow, profile.model_document())


@pytest.mark.parametrize("bound", [2.9, 4.0, 12.0])
def test_a_bound_that_some_plan_keeps_passes(letters: Letters, stored: Profile, bound: float) -> None:
    kept = assert_meets_slo(letters(bound), profile=stored(), runs=300)
    assert kept.runs == 300
    assert kept.share >= 0.95


def test_a_bound_that_no_plan_keeps_fails_and_says_why(letters: Letters, stored: Profile) -> None:
    with pytest.raises(SloNotMet) as caught:
        assert_meets_slo(letters("1s"), profile=stored(), runs=300)
    told = str(caught.value)
    assert "0 of 300 virtual runs, 0 %" in told
    assert "95 % interval 0 % to" in told
    assert "'train'" in told
    assert "Raise the bound to" in told
    assert caught.value.worst == "train"
    assert isinstance(caught.value, AssertionError)


def test_a_plan_that_is_too_small_fails_and_another_is_advised(letters: Letters, stored: Profile) -> None:
    sized = letters(4.0)
    model = model_of(stored())
    good = make_plan(model, Slo(latency=Latency(4.0)))
    small = replace(good.with_stage("train", workers=2, size=Size(1, 1024)), objective=good.objective)
    assert_meets_slo(sized, profile=model, plan=good, runs=300)
    with pytest.raises(SloNotMet, match="Another plan keeps it"):
        assert_meets_slo(sized, profile=model, plan=small, runs=300)


def test_a_bound_that_is_kept_a_little_too_seldom_is_seen_by_more_runs(letters: Letters, stored: Profile) -> None:
    """A bound at the 90th percentile of a plan's latency: 100 runs can't tell it from the 95th, 3,000 can."""
    model = model_of(stored())
    plan = make_plan(model, Slo(latency=Latency(4.0)))
    latencies = model.predict(plan, n_samples=20_000).samples.latency_s
    sized = letters(float(sorted(latencies)[int(0.9 * len(latencies))]))
    with pytest.raises(SloNotMet) as caught:
        assert_meets_slo(sized, profile=model, plan=plan, runs=3000)
    assert 0.87 < caught.value.attainment.share < 0.93
    assert_meets_slo(sized, profile=model, plan=plan, runs=20)


def test_the_same_seed_gives_the_same_verdict(letters: Letters, stored: Profile) -> None:
    profile = stored()
    seen = [assert_meets_slo(letters(3.6), profile=profile, runs=200, seed=seed) for seed in (1, 1)]
    assert seen[0] == seen[1]


def test_a_profile_is_kept_beside_the_tests(
    letters: Letters, stored: Profile, tmp_path: Path, prefect_server: str
) -> None:
    stored().store()
    path = store_profile("letters", tmp_path / "letters.json")
    from_file = assert_meets_slo(letters(4.0), profile=path, runs=200)
    assert from_file == assert_meets_slo(letters(4.0), profile=str(path), runs=200)
    assert from_file == assert_meets_slo(letters(4.0), runs=200), "by default the one that the API holds"
    with pytest.raises(NotEnoughObservations):
        store_profile("never-profiled", tmp_path / "no.json")


def test_code_that_has_changed_since_it_was_measured_is_told(letters: Letters, stored: Profile) -> None:
    with pytest.warns(UserWarning, match="'train' has changed since it was measured"):
        assert_meets_slo(letters(4.0), profile=stored(version="0ld"), runs=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_meets_slo(letters(4.0), profile=stored(), runs=20)


def test_what_cannot_be_judged_is_refused(letters: Letters, stored: Profile, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="decorated with @slo"):
        assert_meets_slo(flow(lambda: None, name="plain"), profile=stored())
    with pytest.raises(InvalidValue, match="store_profile wrote"):
        assert_meets_slo(letters(), profile=tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InvalidValue, match="store_profile wrote"):
        assert_meets_slo(letters(), profile=tmp_path / "bad.json")
    with pytest.raises(NotEnoughObservations, match="not been observed"):
        assert_meets_slo(letters(), profile=SLOProfile(flow_name="letters"))
    for wrong in ({"runs": 0}, {"confidence": 2}, {"profile": 7}):
        with pytest.raises(InvalidValue):
            assert_meets_slo(letters(), **{"profile": stored(), **wrong})
