"""The maintenance flows, and their deployments in prefect.yaml."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.artifacts import Artifact
from prefect.flows import load_flow_from_entrypoint

from prefect_slo.artifacts.publishing import key
from prefect_slo.blocks import SLOProfile, fold_in, put_in_force
from prefect_slo.errors import InvalidValue, OtherPlanProposed
from prefect_slo.loop import knowledge
from prefect_slo.loop.director import LoopDirector
from prefect_slo.loop.guard import proposal
from prefect_slo.loop.menus import MenuSettings, with_menus
from prefect_slo.objective import Latency, Slo
from prefect_slo.observation import StageRun
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.runner.pools import PROCESS
from prefect_slo.runner.recipe import ObservedRun
from prefect_slo.telemetry import RunRecord, StageKey, StageRecord
from prefect_slo.telemetry.store import publish
from prefect_slo.workflow import Stage, Workflow

ROOT = Path(__file__).parents[2]
DEPLOYED = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
NAME = "deployed-letters"
SOURCE = f"""
import time
from prefect import flow, task
from prefect_slo import slo

@task
def work(shard: int) -> int:
    begun = time.thread_time()
    while time.thread_time() - begun < 0.02:
        pass
    return shard

@slo(latency="20s", menu={{"workers": (1, 2), "vcpus": 1}})
@flow(name="{NAME}")
def letters(n: int = 4) -> int:
    return sum(work.map(range(n)).result())
"""


def flow_of(name: str) -> Flow[..., Any]:
    [entrypoint] = (deployed["entrypoint"] for deployed in DEPLOYED if deployed["name"] == name)
    return load_flow_from_entrypoint(f"{ROOT / entrypoint}")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Path:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    monkeypatch.setattr(knowledge, "_REMEMBERED", knowledge._Remembered())
    return tmp_path


@pytest.mark.parametrize("deployment", DEPLOYED, ids=lambda d: d["name"])
def test_every_deployment_names_a_flow_that_loads(deployment: dict[str, Any]) -> None:
    path, _, name = deployment["entrypoint"].partition(":")
    found = load_flow_from_entrypoint(f"{ROOT / path}:{name}", use_placeholder_flow=False)
    assert found.name.removeprefix("slo-") == deployment["name"]


def test_no_file_of_a_flow_hides_a_module_of_the_standard_library() -> None:
    """Prefect puts its folder first in the path: with a ``profile.py`` there, nothing could import ``cProfile``."""
    assert not {path.stem for path in (ROOT / "flows").glob("*.py")} & sys.stdlib_module_names


def test_every_maintenance_flow_is_deployed() -> None:
    files = {f"flows/{path.name}" for path in (ROOT / "flows").glob("*.py")}
    assert files <= {deployment["entrypoint"].partition(":")[0] for deployment in DEPLOYED}


def test_a_flow_is_profiled_replanned_and_reported(place: Path) -> None:
    (place / "letters.py").write_text(SOURCE)
    assert flow_of("profile")(f"{place / 'letters.py'}:letters") is True
    found = SLOProfile.of_flow(NAME)
    assert found is not None
    assert found.plan_in_force() is not None
    assert flow_of("replan")(NAME) == {NAME: "kept"}
    told = flow_of("report")(NAME)[NAME]
    assert "p95 latency <= 20 s" in told
    assert "In force: " in told
    artifact = Artifact.get(key("report", NAME))
    assert artifact is not None
    assert artifact.data == told
    assert flow_of("refit")(NAME) == {NAME: "kept"}, "one word, one meaning: what prefect-slo refit says"
    assert SLOProfile.of_flow(NAME).revision > found.revision


def known_to_need_one_worker(name: str) -> None:
    """A profile of that flow by which a second worker hardly helps, with a plan of two in force."""
    stage = Stage("work", fanout="given", items=4)
    workflow = with_menus(Workflow(name, (stage,)), MenuSettings.of({"workers": (1, 2), "vcpus": 1}), {})
    size = workflow["work"].menu.sizes[0]
    runs = [
        StageRun(
            f"{workers}-{k}", "work", workers, size.memory_mb, size.vcpus, 1.2 - 0.1 * workers + 0.01 * k,
            overhead_s=0.01, items=4, started_at=1_760_000_000.0 + k,
        )
        for workers in (1, 2) for k in range(5)
    ]  # fmt: skip
    publish(name, [
        RunRecord(
            name, row.run_id, "completed", row.wall_s, row.started_at, (StageRecord(row, StageKey("work", name)),),
            workflow=workflow.to_document(),
        )
        for row in runs
    ])  # fmt: skip
    fold_in(name, objective={"latency_s": 20.0, "budget_usd": None, "percentile": 0.95, "confidence": 0.99})
    two = Plan(name, Slo(Latency(20.0)), {"work": StagePlan(2, size, PROCESS)})
    put_in_force(name, two, "by hand")


def test_a_plan_beyond_the_guard_waits_is_approved_followed_and_rolled_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is done by hand, or in the UI: by the parameters of the deployment ``slo-replan/replan``."""
    name = f"{NAME}-guarded"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_TELEMETRY", "false")
    known_to_need_one_worker(name)
    (place / "letters.py").write_text(SOURCE.replace(NAME, name).replace('"20s"', '"20s", explore=0'))
    letters = load_flow_from_entrypoint(f"{place / 'letters.py'}:letters")
    followed: list[int] = []
    observed = LoopDirector.observed

    def both(self: LoopDirector, run: ObservedRun) -> None:
        assert run.recipe.plan is not None
        followed.append(run.recipe.plan["work"].workers)
        observed(self, run)

    monkeypatch.setattr(LoopDirector, "observed", both)
    replan = flow_of("replan")
    state = replan(name, max_change=0.2, return_state=True)
    assert "it waits, since it changes" in state.result()[name]
    artifact = Artifact.get(key("proposal", name))
    assert artifact is not None
    assert artifact.flow_run_id == state.state_details.flow_run_id
    letters()
    with pytest.raises(OtherPlanProposed, match="plan 5eeb2f "):
        replan(name, approve=True, proposal="5eeb2f")
    for beside in ({}, {"roll_back": True}):
        with pytest.raises(InvalidValue, match="proposal is '5eeb2f'; expected given together with approve"):
            replan(name, proposal="5eeb2f", **beside)
    with pytest.raises(InvalidValue, match="to approve its plan or to roll it back"):
        replan(name, approve=True, roll_back=True)
    assert replan(name, approve=True, proposal=proposal(name).name) == {name: "approved"}
    letters()
    assert replan(name, roll_back=True) == {name: "rolled back"}
    letters()
    assert followed == [2, 1, 2]


def test_importing_the_flows_runs_nothing() -> None:
    for path in (ROOT / "flows").glob("*.py"):
        module = ModuleType(path.stem)
        exec(compile(path.read_text(), str(path), "exec"), vars(module))
        assert any(isinstance(value, Flow) for value in vars(module).values())
