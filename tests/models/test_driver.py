"""Every run counts once in what the flow function takes beyond its stages, however many took as long."""

from __future__ import annotations

import json

from prefect_slo.models.driver import Driver
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.workflow import Stage, Workflow

WORKFLOW = Workflow("one", (Stage("a"),))
RESTS = [0.0] * 19 + [5.0]


def _table(prefix: str = "r", first: int = 0) -> StageRuns:
    return StageRuns.of([StageRun(f"{prefix}{k}", "a", 1, 1024, 1.0, 2.0 + k / 64) for k in range(first, len(RESTS))])


def _latency(prefix: str = "r", first: int = 0) -> dict[str, float]:
    return {f"{prefix}{k}": 2.0 + k / 64 + RESTS[k] for k in range(first, len(RESTS))}


def test_one_slow_run_of_twenty_is_one_of_twenty() -> None:
    assert Driver().followed_by(WORKFLOW, _table(), _latency()).seconds == tuple(RESTS)


def test_runs_that_are_learned_again_and_copies_under_other_ids_add_nothing() -> None:
    once = Driver().followed_by(WORKFLOW, _table(), _latency())
    assert once.followed_by(WORKFLOW, _table(), _latency()) == once
    assert once.followed_by(WORKFLOW, _table("copy"), _latency("copy")) == once


def test_a_document_remembers_which_runs_were_counted() -> None:
    once = Driver().followed_by(WORKFLOW, _table(), _latency())
    again = Driver.from_document(json.loads(json.dumps(once.to_document())))
    assert again == once
    assert again.followed_by(WORKFLOW, _table(first=10), _latency(first=10)) == once


def test_times_without_runs_are_read_as_they_are() -> None:
    assert Driver.from_document([0.0, 0.0, 5.0]).seconds == (0.0, 0.0, 5.0)
