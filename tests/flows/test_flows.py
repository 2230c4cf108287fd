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
from prefect_slo.blocks import SLOProfile, put_in_force, update_profile
from prefect_slo.loop import knowledge
from prefect_slo.loop.director import LoopDirector
from prefect_slo.runner.recipe import ObservedRun

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


def test_a_plan_beyond_the_guard_waits_is_approved_followed_and_rolled_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is done by hand, or in the UI: the parameters of the deployment ``slo-replan/replan``."""
    (place / "letters.py").write_text(SOURCE)
    letters = load_flow_from_entrypoint(f"{place / 'letters.py'}:letters")
    if SLOProfile.of_flow(NAME) is None:
        flow_of("profile")(f"{place / 'letters.py'}:letters")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_MAX_CHANGE", "0.2")
    best = SLOProfile.of_flow(NAME).plan_in_force()  # type: ignore[union-attr]
    assert best is not None
    larger = 3 - best["work"].workers
    assert larger == 2, "one worker is the cheapest that keeps a loose bound"
    update_profile(NAME, lambda profile: profile.model_copy(update={"plan_history": []}))  # as if it were new
    put_in_force(NAME, best.with_stage("work", workers=larger), "by hand")
    followed: list[int] = []
    observed = LoopDirector.observed

    def both(self: LoopDirector, run: ObservedRun) -> None:
        assert run.recipe.plan is not None
        followed.append(run.recipe.plan["work"].workers)
        observed(self, run)

    monkeypatch.setattr(LoopDirector, "observed", both)
    replan = flow_of("replan")
    state = replan(NAME, return_state=True)
    assert "it waits, since it changes" in state.result()[NAME]
    artifact = Artifact.get(key("proposal", NAME))
    assert artifact is not None
    assert artifact.flow_run_id == state.state_details.flow_run_id
    letters()
    assert replan(NAME, approve=True) == {NAME: "approved"}
    letters()
    assert replan(NAME, roll_back=True) == {NAME: "rolled back"}
    letters()
    assert followed == [2, 1, 2]


def test_importing_the_flows_runs_nothing() -> None:
    for path in (ROOT / "flows").glob("*.py"):
        module = ModuleType(path.stem)
        exec(compile(path.read_text(), str(path), "exec"), vars(module))
        assert any(isinstance(value, Flow) for value in vars(module).values())
