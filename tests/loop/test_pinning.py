"""Runs that are pinned to a plan: by their environment, by a parameter of theirs, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prefect import flow, task

from prefect_slo import slo
from prefect_slo.blocks import PlanBlock
from prefect_slo.decorators import director_of
from prefect_slo.errors import InvalidPlan
from prefect_slo.loop.director import LoopDirector
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.loop.pinning import pinned, plan_of
from prefect_slo.loop.planning import told
from prefect_slo.loop.replanning import plan_digest
from prefect_slo.objective import Latency, Slo
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Size
from prefect_slo.runner.recipe import ObservedRun

PLAN = Plan("pinned-letters", None, {"letter": StagePlan(2, Size(1, 256, hardware="thread"), "thread")})
OTHER = PLAN.with_stage("letter", workers=1)


@task
def letter(x: int) -> int:
    return x


@slo(latency="20s", explore=0)
@flow(name="pinned-letters")
def letters(n: int = 2, slo_plan: str | dict | None = None) -> int:
    return sum(letter.map(range(n)).result())


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefect_server: str) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_INTEGRATIONS_SLO_PLAN", raising=False)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ObservedRun]:
    found: list[ObservedRun] = []
    monkeypatch.setattr(LoopDirector, "observed", lambda self, run: found.append(run))
    return found


def followed(run: ObservedRun) -> str:
    return plan_digest(run.recipe.plan) if run.recipe.plan is not None else ""


def test_the_environment_pins_runs_and_a_parameter_overrides_it(
    seen: list[ObservedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    letters()
    PlanBlock(document=PLAN.to_document()).save("nightly", overwrite=True)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_PLAN", "nightly")
    letters()
    letters(slo_plan=OTHER.to_document())
    letters(slo_plan="")
    assert [followed(run) for run in seen] == ["", plan_digest(PLAN), plan_digest(OTHER), ""]
    [row] = seen[1].stage_runs
    assert (row.workers, row.memory_mb, row.hardware) == (2, 256, "thread")


def test_the_environment_leaves_other_flows_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_PLAN", str(path))
    assert pinned("pinned-letters", {}) == PLAN
    assert pinned("called-by-it", {}) is None


def test_a_plan_is_named_given_or_read(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    for value in (PLAN, PLAN.to_document(), PLAN.to_json(), str(tmp_path / "plan.json")):
        assert plan_of(value) == PLAN
    for value in (7, " ", "no-such-block", str(tmp_path / "missing.json"), {"stages": 1}):
        with pytest.raises(InvalidPlan):
            plan_of(value)


def test_a_pin_that_cannot_be_read_is_said_and_the_run_goes_on(
    seen: list[ObservedRun], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_PLAN", "never-stored")
    assert letters(n=3) == 3
    assert followed(seen[0]) == ""
    assert "never-stored" in caplog.text


def test_modes_that_change_nothing_do_not_follow_a_pin(know: Callable[..., Knowledge]) -> None:
    assert told(Knowledge("letters"), PLAN, "observe").followed is None
    advised = told(Knowledge("letters"), PLAN, "advise")
    assert (advised.followed, advised.plan) == (None, PLAN)


def test_a_pin_that_lacks_stages_says_which(know: Callable[..., Knowledge]) -> None:
    decision = told(know(), PLAN, None)
    assert decision.followed == PLAN
    assert "lacks load, train" in decision.note


def test_decorated_flows_are_what_they_were(tmp_path: Path) -> None:
    @slo(latency="20s")
    @flow
    def plain(n: int = 1) -> int:
        return n

    assert list(plain.parameters.properties) == ["n"], "nothing is added to a signature"
    assert isinstance(director_of(plain), LoopDirector)
    assert Slo(latency=Latency(20.0)) == director_of(plain).slo
