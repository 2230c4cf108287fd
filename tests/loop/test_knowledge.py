"""A profile opened: what runs that follow the plan in force ask of it, and what they don't."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pytest

from prefect_slo.blocks import SLOProfile
from prefect_slo.blocks.folding import OUTGROWN, _fitted, fit_model
from prefect_slo.blocks.profile import Stored
from prefect_slo.loop import knowledge
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.loop.planning import decide
from prefect_slo.objective import Latency, Slo
from prefect_slo.observation import StageRuns
from prefect_slo.planner import make_plan
from prefect_slo.telemetry.records import RunRecord, StageKey, StageRecord
from prefect_slo.workflow import Workflow

SLO = Slo(latency=Latency(20.0))


@pytest.fixture
def profile(workflow: Workflow, rows: Callable[..., StageRuns]) -> SLOProfile:
    """A profile of the workflow, with a model and a plan in force."""
    runs: dict[str, list[StageRecord]] = {}
    for row in rows().rows():
        runs.setdefault(row.run_id, []).append(StageRecord(row, StageKey(row.stage)))
    document = workflow.to_document()
    records = tuple(
        RunRecord(
            "letters", run_id, "completed", sum(s.row.wall_s for s in stages), 1.76e9, tuple(stages), workflow=document
        )
        for run_id, stages in runs.items()
    )
    learned = _fitted(
        SLOProfile(flow_name="letters").absorbed([Stored(datetime(2026, 1, 1, tzinfo=UTC), records)]), fit_model
    )
    known = Knowledge.of("letters", learned)
    assert known.model is not None
    return learned.model_copy(update={"plan": make_plan(known.model, SLO).to_document()})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models that were opened."""
    found: list[str] = []
    open_ = knowledge._opened

    def told(workflow, document):
        found.append(workflow.name)
        return open_(workflow, document)

    monkeypatch.setattr(knowledge, "_opened", told)
    return found


def test_a_run_that_follows_the_plan_in_force_opens_no_model(profile: SLOProfile, opened: list[str]) -> None:
    known = Knowledge.of("letters", profile)
    decision = decide(known, SLO, mode=None, seed=0, explore=0.0, rng=np.random.default_rng(0))
    assert (decision.mode, decision.plan) == ("enforce", profile.plan_in_force())
    assert opened == []
    assert known.model is not None
    assert known.model is known.model
    assert opened == ["letters"], "once, when it is asked for"


def test_whether_stages_can_be_planned_is_what_the_model_says(profile: SLOProfile, opened: list[str]) -> None:
    known = Knowledge.of("letters", profile)
    told = {name: known.fitted.verdict(name) for name in ("load", "train")}
    assert opened == []
    for name, verdict in told.items():
        assert (verdict.identified, verdict.reason) == (True, known.model.identified(name).reason)


def test_a_stage_that_is_not_identified_is_told_without_the_model(profile: SLOProfile, opened: list[str]) -> None:
    few = profile.with_row_budget(2)
    poor = _fitted(few, fit_model)
    known = Knowledge.of("letters", poor)
    assert known.missing().startswith("stage 'load'")
    assert opened == []


def test_a_model_that_is_not_stored_is_fitted_when_it_is_needed(profile: SLOProfile, opened: list[str]) -> None:
    known = Knowledge.of("letters", profile.with_model(None, OUTGROWN))
    assert known.missing() == ""
    assert (
        known.model.predict(known.plan, seed=0).latency_s
        == Knowledge.of("letters", profile).model.predict(known.plan, seed=0).latency_s
    )
    assert Knowledge.of("letters", profile.with_model(None, "no completed run yet")).fitted is None
