from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import StageRun
from prefect_slo.telemetry import RunRecord, StageKey, StageRecord
from prefect_slo.telemetry import ledger as ledger_module
from prefect_slo.telemetry.columns import ledger_document, read_ledger
from prefect_slo.telemetry.ledger import Code, Ledger
from prefect_slo.telemetry.packing import canonical, pack

numbers = st.floats(1e-4, 1e4, allow_subnormal=False)


@st.composite
def records(draw: st.DrawFn) -> list[RunRecord]:
    """Runs of a flow of up to three stages and two code versions, some failed, some with equal start times."""
    runs = []
    for number in range(draw(st.integers(1, 12))):
        started = float(draw(st.integers(1_760_000_000, 1_760_000_005)))
        names = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
        stages = tuple(
            StageRecord(
                StageRun(f"r{number}", name, draw(st.sampled_from([1, 2, 4])), 1024, 1.0, draw(numbers), items=3,
                         overhead_s=draw(st.sampled_from([math.nan, 0.0])), started_at=started),
                StageKey(name, draw(st.sampled_from(["v1", "v2"]))),
                draw(st.sampled_from(["completed", "completed", "cached", "failed"])),
                knobs=draw(st.sampled_from([{}, {"resolution": 720}])),
                features={"frames": draw(st.integers(0, 9))},
            )
            for name in names
        )  # fmt: skip
        workflow = {"name": "f", "stages": [{"name": name} for name in sorted(names)]}
        status = draw(st.sampled_from(["completed", "completed", "failed"]))
        runs.append(RunRecord("f", f"r{number}", status, draw(numbers), started, stages, workflow=workflow))
    return runs


def through_json(ledger: Ledger) -> Ledger:
    return read_ledger(ledger_document(ledger), sorted(ledger.retired))


@given(records(), st.randoms(use_true_random=False), st.integers(2, 40))
@settings(max_examples=60)
def test_any_order_and_grouping_of_runs_gives_the_same_ledger(runs, random, budget):
    at_once = Ledger(row_budget=budget).absorb(runs)
    shuffled = random.sample(runs, len(runs))
    grown = Ledger(row_budget=budget)
    while shuffled:
        step = random.randint(1, len(shuffled))
        grown, shuffled = through_json(grown.absorb(shuffled[:step])), shuffled[step:]
    assert canonical(ledger_document(grown)) == canonical(ledger_document(at_once))


@given(records())
@settings(max_examples=30)
def test_only_completed_stage_runs_of_completed_runs_are_kept_as_rows(runs):
    kept = [r for g in Ledger().absorb(runs).groups.values() for m in g.values() for r in m.rows]
    expected = [s for run in runs if run.status == "completed" for s in run.stages if s.status == "completed"]
    assert len(kept) == len(expected)


def test_a_row_budget_keeps_rare_settings_and_the_newest_rows_of_busy_ones(make_run):
    runs = [make_run(n, workers=2) for n in range(40)] + [make_run(n, workers=8) for n in range(3)]
    runs[40:] = [replace(run, run_id=f"probe-{i}") for i, run in enumerate(runs[40:])]
    ledger = Ledger(row_budget=20).absorb(runs)
    busy, rare = (
        ledger.groups["load", "load", "v1"][setting] for setting in sorted(ledger.groups["load", "load", "v1"])
    )
    assert len(rare.rows) == 3
    assert [row.row.run_id for row in busy.rows] == [f"run-{n:04d}" for n in range(33, 40)]
    assert busy.moments.rows == 40


def test_moments_cover_dropped_rows(make_run):
    walls = np.exp(np.random.default_rng(1).normal(0.5, 0.1, 60))
    ledger = Ledger(row_budget=8).absorb([make_run(n, wall_s=float(wall)) for n, wall in enumerate(walls)])
    (measured,) = ledger.groups["train", "train", "v1"].values()
    assert measured.moments.median_wall_s == pytest.approx(math.exp(np.log(walls).mean()), rel=1e-4)


def test_more_settings_than_rows_keep_one_row_each(make_run):
    runs = [make_run(n, workers=n + 1) for n in range(30)]
    ledger = Ledger(row_budget=20).absorb(runs)
    assert {len(m.rows) for g in ledger.groups.values() for m in g.values()} == {1}
    assert {len(group) for group in ledger.groups.values()} == {10}


def test_the_newest_two_versions_of_a_stage_are_kept_and_an_older_one_is_known_to_be_lost(make_run):
    versions = [make_run(n, source_hash=f"v{n}") for n in range(4)]
    ledger = through_json(Ledger().absorb(versions[:3]))
    assert {code.source_hash for code in ledger.groups} == {"v1", "v2"}
    assert ledger.lost([make_run(9, source_hash="v0")])
    assert not ledger.lost([make_run(9, source_hash="v2"), versions[3]])


def test_run_summaries_are_bounded_to_the_newest(make_run, monkeypatch):
    monkeypatch.setattr(ledger_module, "RUNS", 5)
    ledger = Ledger().absorb(make_run(n) for n in range(12))
    assert sorted(ledger.runs) == [f"run-{n:04d}" for n in range(7, 12)]


def test_rows_of_another_flow_are_rows_and_not_runs(make_run):
    record = make_run(1, source="flow:other")
    ledger = Ledger().absorb([record])
    assert (ledger.runs, ledger.places, ledger.rows) == ({}, {}, 2)


def test_thirty_stages_with_many_settings_pack_into_half_a_block():
    rng = np.random.default_rng(5)
    ledger = Ledger().absorb(_large_run(rng, number) for number in range(400))
    assert ledger.rows > 0.75 * ledger.row_budget
    assert len(pack(ledger_document(ledger))) < 60_000


def test_a_document_of_another_schema_is_refused():
    with pytest.raises(InvalidObservation, match=r"ledger\.schema"):
        read_ledger({"schema": 99})
    with pytest.raises(InvalidObservation, match="KeyError"):
        read_ledger({"schema": 1})


def test_codes_are_found_by_plain_tuples(make_run):
    assert Code("load", "load", "v1") in Ledger().absorb([make_run(1)]).groups


def _large_run(rng: np.random.Generator, number: int) -> RunRecord:
    """A run of 30 stages with realistic, incompressible measurements and menus of 27 sizes."""
    started = 1_760_000_000.0 + 97.0 * number
    sizes = [{"vcpus": v, "memory_mb": m} for v in (0.5, 1.0, 2.0) for m in range(512, 5120, 512)]
    menu = {"workers": [1, 2, 4, 8], "sizes": sizes}
    stages = []
    for i in range(30):
        wall, read, write = rng.lognormal(1, 1), rng.lognormal(-2, 1), rng.lognormal(-2, 1)
        row = StageRun(
            f"{rng.bytes(16).hex() if i == 0 else stages[0].row.run_id}", f"stage-{i}", int(rng.choice([1, 2, 4, 8])),
            float(rng.choice([1024, 2048, 4096])), 1.0, wall, overhead_s=wall / 9, read_s=read, compute_s=wall / 2,
            write_s=write, items=int(rng.integers(1, 100)), bytes_in=rng.lognormal(12, 1),
            bytes_out=rng.lognormal(9, 1),
            cost_usd=wall * 1.3e-5, peak_memory_mb=rng.lognormal(5, 0.5), started_at=started,
        )  # fmt: skip
        stages.append(StageRecord(row, StageKey(f"task_{i}", f"{i:08x}")))
    documents = [
        {"name": f"stage-{i}", "after": [f"stage-{i - 1}"] if i else [], "fanout": "given", "menu": menu}
        for i in range(30)
    ]
    workflow = {"name": "large", "stages": documents}
    run_id = stages[0].row.run_id
    return RunRecord("large", run_id, "completed", rng.lognormal(3, 1), started, tuple(stages), workflow=workflow)
