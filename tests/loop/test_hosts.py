"""One flow on machines of different sizes: who follows the plan in force, who goes without, and that it stays."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.artifacts import Artifact

from prefect_slo.artifacts.publishing import key
from prefect_slo.blocks import SLOProfile, fold_in, put_in_force
from prefect_slo.declaration import Declaration
from prefect_slo.loop import background, director, hosts, knowledge, learning, menus
from prefect_slo.loop.knowledge import Fitted, Knowledge
from prefect_slo.loop.learning import replan_flow
from prefect_slo.loop.menus import MenuSettings, with_menus
from prefect_slo.loop.replanning import KEPT, fits, plan_digest, replan
from prefect_slo.loop.reporting import report
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency, Slo
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.plan import Plan
from prefect_slo.resources import Size
from prefect_slo.runner.pools import PROCESS
from prefect_slo.runner.recipe import ObservedRun, Recipe, StageSeen
from prefect_slo.workflow import Stage, Workflow

SLO = Slo(Latency(5.0, 0.95, 0.9))
ASKED = {"latency_s": 5.0, "budget_usd": None, "percentile": 0.95, "confidence": 0.9}
GRAPH = Workflow("films", (Stage("cut", fanout="given", items=16),))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    monkeypatch.setattr(knowledge, "_REMEMBERED", knowledge._Remembered())
    yield
    learning.UNLEARNED.learned("films", 99)


def on(monkeypatch: pytest.MonkeyPatch, vcpus: float, memory_mb: int = 0) -> None:
    """From now on this is a machine of that size."""
    monkeypatch.setattr(menus, "usable_vcpus", lambda: vcpus)
    monkeypatch.setattr(menus, "usable_memory_mb", lambda: memory_mb or int(2048 * vcpus))
    monkeypatch.setattr(knowledge, "_REMEMBERED", knowledge._Remembered())


def seen(**menu: Any) -> Workflow:
    """The graph with the menus of the machine that this is."""
    return with_menus(GRAPH, MenuSettings.of(menu), {})


def rows(workflow: Workflow) -> list[StageRun]:
    """Six runs at each setting of 24 vCPU-seconds of work."""
    rng = np.random.default_rng(5)
    return [
        StageRun(
            f"{option.workers}-{option.vcpus:g}-{k}", "cut", option.workers, option.memory_mb, option.vcpus,
            24 / (option.workers * option.vcpus) * float(rng.lognormal(0, 0.02)), overhead_s=0.01, items=16,
            started_at=1_760_000_000.0 + k,
        )
        for option in workflow["cut"].menu.options() if option.workers * option.vcpus <= 8 for k in range(6)
    ]  # fmt: skip


def known(workflow: Workflow, table: list[StageRun], **fields: Any) -> Knowledge:
    return Knowledge("films", workflow, Fitted.of(WorkflowModel(workflow).fit(StageRuns.of(table))), **fields)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, list[StageRun]]:
    """The plan of a machine of eight vCPUs, and what was measured there."""
    on(monkeypatch, 8)
    table = rows(seen())
    plan, _ = replan(known(seen(), table), SLO, seed=0)
    assert plan is not None
    assert plan["cut"].workers * plan["cut"].size.vcpus > 2, "the bound takes more than the small machine has"
    return plan, table


def test_a_smaller_machine_leaves_the_plan_in_force_to_those_that_hold_it(
    prefect_server: str, large: tuple[Plan, list[StageRun]], stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, table = large
    name = "films-on-two-hosts"
    on(monkeypatch, 2)
    stored(name, seen(), table, ASKED)
    put_in_force(name, plan, "by a machine of eight vCPUs")
    told = replan_flow(name)
    profile = SLOProfile.of_flow(name)
    assert profile is not None
    assert plan_digest(profile.plan_in_force()) == plan_digest(plan)
    assert len(profile.plan_history) == 1
    assert profile.proposal is None
    assert Artifact.get(key("proposal", name)) is None
    assert told.startswith(KEPT)
    assert "vCPUs at once" in told
    assert any("vCPUs at once" in line for line in report(name).lines())

    assert replan_flow(name, move=True).startswith("infeasible"), "unless somebody asks for it"
    moved = SLOProfile.of_flow(name)
    assert moved is not None
    assert moved.plan_in_force()["cut"].workers * moved.plan_in_force()["cut"].size.vcpus <= 2  # type: ignore[index]


def test_a_plan_that_moves_to_a_smaller_machine_says_what_it_took(
    prefect_server: str, large: tuple[Plan, list[StageRun]], stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, table = large
    loose, name = Slo(Latency(20.0, 0.95, 0.9)), "films-that-move"
    on(monkeypatch, 2)
    stored(name, seen(), table, ASKED)
    fold_in(name, objective={**ASKED, "latency_s": 20.0}, refit=True)
    put_in_force(name, replace(plan, objective=loose), "by a machine of eight vCPUs")
    told = replan_flow(name, move=True)
    assert told.startswith("moved: it took ")
    assert "vCPUs at once where there are 2" in told
    profile = SLOProfile.of_flow(name)
    assert profile is not None
    assert profile.plan_history[-1]["reason"] == told


def test_what_a_run_does_without_is_told_by_what_is_known_today(
    large: tuple[Plan, list[StageRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, table = large
    on(monkeypatch, 2)
    told = known(seen(), table)
    made, _ = replan(told, SLO, seed=0)
    assert made is not None
    assert plan.predicted is not None
    stale = replace(plan, predicted=replace(plan.predicted, latency_s=replace(plan.predicted.latency_s, mean=1000.0)))
    texts = {hosts.in_place_of(replace(told, plan=each), made, SLO, gpus_told=False) for each in (plan, stale)}
    assert len(texts) == 1
    assert "in place of" in texts.pop()


def test_what_the_user_changes_is_planned_anew_wherever_it_ran(
    large: tuple[Plan, list[StageRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = large
    on(monkeypatch, 2)
    assert hosts.waiting(plan, seen(), SLO), "the machine alone is another"
    assert not hosts.waiting(plan, seen(workers=(1, 2)), SLO)
    assert not hosts.waiting(plan, seen(vcpus=(0.5,)), SLO)
    assert not hosts.waiting(plan, seen(), Slo(Latency(6.0, 0.95, 0.9)))
    floored = with_menus(GRAPH, MenuSettings(), {"cut": Declaration(memory_mb=plan["cut"].size.memory_mb + 1)})
    assert not hosts.waiting(plan, floored, SLO)


def test_a_plan_is_followed_on_any_machine_that_holds_it_whatever_is_on_its_menu(
    large: tuple[Plan, list[StageRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = large
    on(monkeypatch, 16, 100_000)
    assert plan["cut"].option not in seen()["cut"].menu.options()
    assert fits(plan, seen(), SLO)
    on(monkeypatch, 6, 100_000)
    taken = plan["cut"].workers * plan["cut"].size.vcpus
    assert fits(plan, seen(), SLO) == (taken <= 6)


def recipe(run: str, parameters: dict[str, Any] | None = None) -> tuple[Recipe, director.LoopDirector]:
    told = director.LoopDirector(SLO, explore=0)
    return told.recipe("films", run, parameters or {}), told


@pytest.mark.parametrize("newest", [8.0, 2.0], ids=["after a large machine", "after itself"])
def test_a_run_on_a_smaller_machine_goes_by_a_plan_that_fits_there_and_says_why(
    large: tuple[Plan, list[StageRun]], monkeypatch: pytest.MonkeyPatch, newest: float
) -> None:
    plan, table = large
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_TELEMETRY", "false")
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(director, "say_once", lambda _, message, level: said.append((message, level)))
    on(monkeypatch, newest)
    told = known(seen(), table, plan=plan)
    on(monkeypatch, 2)
    knowledge._REMEMBERED.put(told)
    made = recipe("small")[0].plan
    assert made is not None
    assert made["cut"].workers * made["cut"].size.vcpus <= 2
    assert made["cut"].size.memory_mb <= 4096
    message, level = said[-1]
    assert "The plan in force takes" in message
    assert "vCPUs at once where there are 2" in message
    assert "The plan in force stays" in message
    assert level == logging.WARNING
    on(monkeypatch, 8)
    knowledge._REMEMBERED.put(told)
    assert recipe("large")[0].plan == plan, "those that hold it follow it as before"


def test_workers_of_a_pinned_plan_are_cut_down_to_the_machine(
    large: tuple[Plan, list[StageRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, table = large
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_TELEMETRY", "false")
    said: list[str] = []
    monkeypatch.setattr(director, "say_once", lambda _, message, level: said.append(message))
    pinned = plan.with_stage("cut", workers=1, size=Size(8, 16384))
    on(monkeypatch, 2)
    knowledge._REMEMBERED.put(known(seen(), table))
    made = recipe("pinned", {"slo_plan": pinned.to_document()})[0].plan
    assert made is not None
    assert (made["cut"].workers, made["cut"].size) == (1, Size(2, 4096))
    assert "'cut': 8 vCPU / 16384 MB" in said[-1]
    assert "cut down" in said[-1]


def test_the_report_of_such_a_run_says_why(
    prefect_server: str, large: tuple[Plan, list[StageRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, table = large
    on(monkeypatch, 2)
    knowledge._REMEMBERED.put(known(seen(), table, plan=plan))
    made, told = recipe("reported")
    row = replace(rows(seen())[0], run_id="reported")
    told.observed(
        ObservedRun(
            "reported", "films", made, GRAPH, {"cut": StageSeen("cut", "a", True, PROCESS)}, (row,), (), 12.0, 1e-4,
            "completed", 1_760_000_000.0, {},
        )
    )  # fmt: skip
    background.settle()
    artifact = Artifact.get(key("attainment", "films"))
    assert artifact is not None
    assert "vCPUs at once where there are 2" in str(artifact.data)
