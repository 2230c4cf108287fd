"""A guard over re-plans: what is too different is proposed, approved by hand, and rolled back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefect.artifacts import Artifact

from prefect_slo.artifacts.publishing import key
from prefect_slo.artifacts.text import seconds_text
from prefect_slo.blocks import SLOProfile, fold_in, propose, put_in_force
from prefect_slo.cli import main
from prefect_slo.errors import InvalidValue, NothingProposed, OtherPlanProposed
from prefect_slo.loop import guard, knowledge
from prefect_slo.loop.guard import Guard, approve, change, proposal, roll_back
from prefect_slo.loop.knowledge import Knowledge
from prefect_slo.loop.learning import replan_flow
from prefect_slo.loop.replanning import KEPT, plan_digest, predicted, surest
from prefect_slo.loop.reporting import report
from prefect_slo.objective import Latency, Slo
from prefect_slo.observation import StageRuns
from prefect_slo.plan import Plan
from prefect_slo.planner.baselines import all_max, all_min
from prefect_slo.telemetry import RunRecord, StageKey, StageRecord
from prefect_slo.telemetry.store import publish
from prefect_slo.workflow import Workflow

SLO = Slo(latency=Latency(4.0))
OBJECTIVE = {"latency_s": 4.0, "budget_usd": None, "percentile": 0.95, "confidence": 0.99}
Know = Callable[..., Knowledge]


@pytest.fixture
def plans(know: Know) -> tuple[Plan, Plan]:
    """The largest plan, and the best."""
    model = know().model
    assert model is not None
    return predicted(model, replace(all_max(model, SLO), objective=SLO)), surest(model, SLO, seed=0)


@pytest.fixture
def learned(
    prefect_server: str, workflow: Workflow, rows: Callable[..., StageRuns], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> str:  # fmt: skip
    """A flow whose profile is stored, with a model and a bound; its name."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    monkeypatch.setattr(knowledge, "_REMEMBERED", knowledge._Remembered())
    name = f"guarded-{request.node.name[-8:].replace('_', '-')}"
    runs: dict[str, list[StageRecord]] = {}
    for number, row in enumerate(rows().rows()):
        at = replace(row, started_at=1_760_000_000.0 + number)
        runs.setdefault(row.run_id, []).append(StageRecord(at, StageKey(row.stage, name)))
    document = workflow.to_document()
    records = [
        RunRecord(
            name, run, "completed", sum(r.row.wall_s for r in stages), stages[0].row.started_at, tuple(stages),
            workflow=document,
        )
        for run, stages in runs.items()
    ]  # fmt: skip
    publish(name, records)
    fold_in(name, objective=OBJECTIVE)
    return name


def in_force(flow_name: str) -> Plan:
    profile = SLOProfile.of_flow(flow_name)
    assert profile is not None
    plan = profile.plan_in_force()
    assert plan is not None
    return plan


def test_a_change_is_the_same_in_both_directions(plans: tuple[Plan, Plan]) -> None:
    largest, best = plans
    assert change(largest, best) == change(best, largest)
    assert change(best, best)[0] == 0.0
    found, what = change(largest, best)
    assert found > 0.5
    assert what in ("latency", "cost", "vCPUs")


def test_a_cost_that_was_nothing_changes_without_bound(plans: tuple[Plan, Plan]) -> None:
    largest, best = plans
    assert largest.predicted is not None
    free = replace(largest.predicted, cost_usd=replace(largest.predicted.cost_usd, mean=0.0))
    assert change(replace(largest, predicted=free), best)[0] == math.inf
    assert change(replace(largest, predicted=free), replace(largest, predicted=free))[0] == 0.0


def test_a_guard_objects_to_what_changes_more_than_it_lets(plans: tuple[Plan, Plan]) -> None:
    largest, best = plans
    found, what = change(largest, best)
    assert Guard(max_change=found * 1.01).objection(largest, best) == ""
    assert what in Guard(max_change=found * 0.99).objection(largest, best)
    assert "rolled back" in Guard().objection(largest, best, [plan_digest(best)])


def test_a_guard_is_as_the_settings_say_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Guard.of() == Guard(0.05, math.inf)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_MIN_CHANGE", "0.2")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_MAX_CHANGE", "0.5")
    assert Guard.of() == Guard(0.2, 0.5)
    assert Guard.of(0.1, 2.0) == Guard(0.1, 2.0)
    with pytest.raises(InvalidValue, match="max_change"):
        Guard.of(max_change=-1.0)


def test_a_plan_too_different_waits_for_approval_and_comes_into_force_by_it(
    learned: str, plans: tuple[Plan, Plan]
) -> None:
    largest, _ = plans
    put_in_force(learned, largest, "by hand")
    assert "proposed" in replan_flow(learned, guard=Guard(max_change=0.01))
    assert plan_digest(in_force(learned)) == plan_digest(largest), "the plan in force stays"
    artifact = Artifact.get(key("proposal", learned))
    assert artifact is not None
    assert "waits for approval" in str(artifact.data)
    assert "**Waits because** it changes" in str(artifact.data)
    assert any("waits for approval" in line for line in report(learned).lines())
    revision = SLOProfile.of_flow(learned).revision  # type: ignore[union-attr]
    assert "proposed" in replan_flow(learned, guard=Guard(max_change=0.01))
    assert SLOProfile.of_flow(learned).revision == revision, "the same proposal is made once"  # type: ignore[union-attr]
    name = proposal(learned).name
    assert f"prefect-slo approve {learned} {name}`" in str(artifact.data)
    approved = approve(learned)
    assert plan_digest(approved) == name
    assert "was approved and is in force" in str(Artifact.get(key("proposal", learned)).data)  # type: ignore[union-attr]
    assert not any("waits for approval" in line for line in report(learned).lines())
    assert plan_digest(in_force(learned)) == plan_digest(approved) != plan_digest(largest)
    assert replan_flow(learned, guard=Guard(max_change=0.01)) == KEPT
    with pytest.raises(NothingProposed, match="no plan waits"):
        approve(learned)


def test_what_is_approved_is_the_plan_that_was_seen(
    learned: str, plans: tuple[Plan, Plan], know: Know, capsys: pytest.CaptureFixture[str]
) -> None:
    largest, best = plans
    put_in_force(learned, largest, "by hand")
    propose(learned, best, "better", "5eeb2f00d001")
    assert report(learned).lines()[-3].endswith(f"prefect-slo approve {learned} 5eeb2f00d001.")
    propose(learned, predicted(know().model, all_min(know().model, SLO)), "better still", "900dd06e0002")
    for seen in ("5eeb2f00d001", "5eeb2f", "9"):
        with pytest.raises(OtherPlanProposed, match=rf"plan {seen} .* plan 900dd06e0002 does") as refused:
            approve(learned, seen)
        assert refused.value.waits == "900dd06e0002"
    assert plan_digest(in_force(learned)) == plan_digest(largest)
    assert main(["approve", learned]) == 0
    assert "Takes plan 900dd06e0002: better still." in capsys.readouterr().out
    assert plan_digest(in_force(learned)) == plan_digest(all_min(know().model, SLO))
    propose(learned, best, "better", "5eeb2f00d001")
    assert main(["approve", learned, "5eeb2f"]) == 0
    assert "Takes plan" not in capsys.readouterr().out
    assert plan_digest(in_force(learned)) == plan_digest(best)


def test_a_proposal_that_comes_while_another_is_approved_stays(
    learned: str, plans: tuple[Plan, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, best = plans
    put_in_force(learned, largest, "by hand")
    propose(learned, best, "better", "5eeb2f00d001")

    def put_late(*args: Any, **kwargs: Any) -> SLOProfile:
        propose(learned, best, "better still", "900dd06e0002")
        return put_in_force(*args, **kwargs)

    monkeypatch.setattr(guard, "put_in_force", put_late)
    with pytest.raises(OtherPlanProposed, match=r"plan 5eeb2f00d001 .* plan 900dd06e0002 does"):
        approve(learned)
    assert proposal(learned).name == "900dd06e0002"
    assert plan_digest(in_force(learned)) == plan_digest(largest)


@pytest.mark.parametrize("by", [approve, roll_back])
def test_a_plan_that_comes_into_force_by_hand_is_predicted_as_of_now(
    learned: str, plans: tuple[Plan, Plan], by: Callable[[str], Plan]
) -> None:
    largest, best = plans
    assert largest.predicted is not None
    old = replace(largest, predicted=replace(largest.predicted, latency_at_percentile_s=0.01))
    if by is roll_back:
        put_in_force(learned, old, "by hand")
    put_in_force(learned, best, "by hand")
    propose(learned, old, "better", plan_digest(old))
    assert by(learned) == in_force(learned)
    assert plan_digest(in_force(learned)) == plan_digest(largest)
    expected = in_force(learned).predicted
    assert expected is not None
    model = Knowledge.of(learned, SLOProfile.of_flow(learned)).model
    assert model is not None
    assert expected == predicted(model, largest).predicted
    shown = Artifact.get(key("graph", learned))
    assert shown is not None
    assert seconds_text(expected.latency_at_percentile_s) in str(shown.data)


def test_a_plan_of_before_for_other_stages_comes_back_without_a_prediction(
    learned: str, plans: tuple[Plan, Plan]
) -> None:
    largest, best = plans
    fewer = replace(largest, stages=dict(list(largest.stages.items())[:1]))
    put_in_force(learned, fewer, "by hand")
    put_in_force(learned, best, "by hand")
    assert roll_back(learned).predicted is None
    assert plan_digest(in_force(learned)) == plan_digest(fewer)


def test_plans_are_compared_by_what_the_model_predicts_of_both_now(
    learned: str, plans: tuple[Plan, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction of long ago would make any plan look unlike it."""
    largest, _ = plans
    assert largest.predicted is not None
    old = replace(largest.predicted, latency_at_percentile_s=largest.predicted.latency_at_percentile_s / 50)
    put_in_force(learned, replace(largest, predicted=old), "by hand")
    assert "better" in replan_flow(learned, guard=Guard(max_change=10.0)), "the vCPUs change by less"


def test_what_was_rolled_back_from_is_not_taken_again_unasked(
    learned: str, plans: tuple[Plan, Plan], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    largest, _ = plans
    with pytest.raises(NothingProposed, match="no other plan"):
        roll_back(learned)
    put_in_force(learned, largest, "by hand")
    assert "better" in replan_flow(learned)
    better = plan_digest(in_force(learned))
    with monkeypatch.context() as broken:
        broken.setattr(guard, "stage_forecasts", lambda *_: 1 / 0)  # the plan is in force all the same
        assert plan_digest(roll_back(learned)) == plan_digest(largest)
    assert [one.getMessage() for one in caplog.records if "no forecast of its stages" in one.getMessage()]
    assert "rolled back from it" in replan_flow(learned)
    assert plan_digest(in_force(learned)) == plan_digest(largest)
    assert plan_digest(approve(learned)) == better
    assert replan_flow(learned) == KEPT


def test_a_smaller_gain_than_the_least_changes_nothing(learned: str, plans: tuple[Plan, Plan]) -> None:
    put_in_force(learned, plans[0], "by hand")
    assert replan_flow(learned, guard=Guard(min_change=0.99)) == KEPT
