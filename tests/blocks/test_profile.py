from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import numpy as np
import pytest
from prefect.testing.standard_test_suites import BlockStandardTestSuite

from prefect_slo.blocks import MenuBlock, PriceListBlock, SLOProfile
from prefect_slo.blocks import profile as profile_module
from prefect_slo.blocks.folding import OUTGROWN, _fitted, within_size
from prefect_slo.blocks.profile import MAX_BYTES
from prefect_slo.observation import StageRun
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.telemetry import RunRecord, StageKey, StageRecord
from prefect_slo.telemetry.store import Stored

NOW = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.mark.parametrize("block", [SLOProfile, MenuBlock, PriceListBlock])
class TestStandard(BlockStandardTestSuite):
    @pytest.fixture
    def block(self, block):
        return block

    def test_has_a_valid_image(self, block):
        """The suite fetches the image; tests here stay off the network."""
        assert str(block._logo_url).startswith("https://")


def stored(*records, at=NOW):
    return [Stored(at, tuple(records))]


def test_what_is_covered_is_not_new(make_run):
    first, second = make_run("f", 1), make_run("f", 2)
    profile = SLOProfile(flow_name="f").absorbed(stored(first))
    assert profile.new_among(stored(first, second, second)) == (second,)
    assert profile.absorbed(stored(first)).observations == profile.observations
    assert profile.since == NOW - timedelta(minutes=10)


def test_covered_runs_are_bounded_and_recent_ones_always_kept(make_run, monkeypatch):
    monkeypatch.setattr(profile_module, "COVERED", 5)
    profile = SLOProfile(flow_name="f")
    for day in range(3):
        runs = [make_run("f", 10 * day + n) for n in range(8)]
        profile = profile.absorbed(stored(*runs, at=NOW + timedelta(days=day)))
    assert profile.new_among(stored(*runs)) == ()
    assert len(profile.new_among(stored(make_run("f", 0)))) == 1


def test_an_empty_profile_knows_nothing():
    profile = SLOProfile(flow_name="f")
    assert profile.absorbed([]) is profile
    assert (profile.workflow(), profile.training(), profile.plan_in_force(), profile.since) == (None,) * 4


def large_run(rng: np.random.Generator, number: int) -> RunRecord:
    """A run of 30 stages, every column measured, with a menu of 27 sizes and 4 worker counts."""
    run_id, started = str(uuid4()), 1_740_000_000.0 + 97 * number
    menu = {
        "workers": [1, 2, 4, 8],
        "sizes": [{"vcpus": v, "memory_mb": m} for v in (1, 2, 4) for m in range(512, 5120, 512)],
    }
    stages = tuple(
        StageRecord(
            StageRun(
                run_id, f"stage-{i}", int(rng.choice([1, 2, 4, 8])), float(rng.choice([1024, 2048, 4096])), 1.0,
                **dict(zip(("wall_s", "read_s", "compute_s", "write_s", "bytes_in", "bytes_out", "peak_memory_mb"),
                           rng.lognormal(3, 1, 7).tolist(), strict=True)),
                overhead_s=0.1, items=int(rng.integers(1, 99)), cost_usd=float(rng.lognormal(-9)), started_at=started,
            ),
            StageKey(f"task_{i}", f"{i:08x}"),
        )
        for i in range(30)
    )  # fmt: skip
    documents = [{"name": f"stage-{i}", "after": [f"stage-{i - 1}"] if i else [], "menu": menu} for i in range(30)]
    workflow = {"name": "large", "stages": documents}
    return RunRecord("large", run_id, "completed", 100.0, started, stages, workflow=workflow)


def test_thirty_stages_stay_below_the_size_of_a_block_whatever_the_model_weighs():
    rng = np.random.default_rng(3)
    plan = Plan("large", None, {f"stage-{i}": StagePlan(workers=i + 1) for i in range(30)})
    runs = [large_run(rng, number) for number in range(300)]
    profile = SLOProfile(flow_name="large", plan=plan.to_document()).absorbed(stored(*runs))

    def fit_of(n):
        return lambda workflow, rows, latency_s: {"theta": rng.normal(size=n).tolist()}

    small = within_size(_fitted(profile, fit_of(300)), fit_of(300))
    assert small.size_bytes <= MAX_BYTES
    assert len(small.model_document()["theta"]) == 300
    assert len(small.training().stage_runs) >= 600

    large = within_size(_fitted(profile, fit_of(30_000)), fit_of(30_000))
    assert large.size_bytes <= MAX_BYTES
    assert (large.model_document(), large.fit_note) == (None, OUTGROWN)
    assert large.observations == small.observations


def test_rows_give_way_before_the_model_does(monkeypatch):
    """A model that holds the rows it is fitted to, as the package's own does."""
    rng = np.random.default_rng(5)
    monkeypatch.setattr("prefect_slo.blocks.folding.MAX_BYTES", 40_000)
    profile = SLOProfile(flow_name="large").absorbed(stored(*(large_run(rng, number) for number in range(60))))

    def fit(workflow, rows, latency_s):
        return {"rows": rows["wall_s"].tolist()}

    whole = _fitted(profile, fit)
    assert whole.size_bytes > 40_000
    small = within_size(whole, fit)
    assert small.size_bytes <= 40_000
    kept = small.training().stage_runs
    assert 0 < len(kept) < len(whole.training().stage_runs)
    assert small.model_document() == {"rows": kept["wall_s"].tolist()}, "fitted to the rows that stay"


def test_rows_give_way_when_everything_else_is_too_large(monkeypatch):
    rng = np.random.default_rng(4)
    monkeypatch.setattr("prefect_slo.blocks.folding.MAX_BYTES", 40_000)
    profile = SLOProfile(flow_name="large").absorbed(stored(*(large_run(rng, number) for number in range(60))))
    small = within_size(profile)
    assert small.size_bytes <= 40_000
    assert 0 < len(small.training().stage_runs) < len(profile.training().stage_runs)
    assert min(known.rows for known in small.coverage().values()) >= 1
