"""Deployments that are pinned to a plan, and the size of the flow's own process."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate

from prefect_slo.blocks import PlanBlock
from prefect_slo.cli import main
from prefect_slo.errors import InvalidValue, NothingProposed, WorkPoolUnusable
from prefect_slo.loop.deploying import OWN, own_size, pin, unpin
from prefect_slo.loop.pinning import VARIABLE
from prefect_slo.placement import Device
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Capacity, Menu, Size
from prefect_slo.workflow import Edge, Stage, Workflow

STAGES = {
    "read": StagePlan(4, Size(1, 512)),
    "left": StagePlan(2, Size(2, 1024)),
    "right": StagePlan(3, Size(1, 2048)),
    "wait": StagePlan(8, Size(1, 128, hardware="thread"), "thread"),
    "render": StagePlan(16, Size(8, 8192, hardware="gpu"), "gpu"),
}
PLAN = Plan("told", None, STAGES)
MENU = Menu(workers=(1,), sizes=(Size(1, 512),))
TEMPLATE = {
    "job_configuration": {"env": "{{ env }}"},
    "variables": {
        "properties": {
            name: {"title": name}
            for name in ("env", "image", "cpu_request", "cpu_limit", "memory_request", "memory_limit")
        }
    },
}


@flow(name="told")
def told() -> None: ...


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often clients of the API were opened and closed."""
    counted: Counter[str] = Counter()
    opens, closes = SyncPrefectClient.__enter__, SyncPrefectClient.__exit__
    monkeypatch.setattr(SyncPrefectClient, "__enter__", lambda self: (counted.update(["opened"]), opens(self))[1])
    monkeypatch.setattr(
        SyncPrefectClient, "__exit__", lambda self, *ended: (counted.update(["closed"]), closes(self, *ended))[1]
    )
    return counted


@pytest.fixture
def deployed(prefect_server: str) -> str:
    with get_client(sync_client=True) as client:
        for name, kind in (("told-process", "process"), ("told-kubernetes", "kubernetes")):
            if name not in {found.name for found in client.read_work_pools()}:
                template = TEMPLATE if kind == "kubernetes" else {}
                client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
        given = {"env": {"OURS": "1"}, "image": "ours:1"}
        flow_id = client.create_flow(told)
        client.create_deployment(flow_id, "sized", work_pool_name="told-kubernetes", job_variables=given)
        client.create_deployment(flow_id, "served")
    return "told/sized"


def variables(name: str) -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        return dict(client.read_deployment_by_name(name).job_variables or {})


def test_the_own_process_holds_the_stages_that_can_run_at_once() -> None:
    stages = (
        Stage("read", (), MENU),
        Stage("left", (Edge("read"),), MENU),
        Stage("right", (Edge("read"),), MENU),
        Stage("wait", (Edge("left"), Edge("right")), MENU),
        Stage("render", (Edge("wait"),), MENU),
    )
    size = own_size(PLAN, Workflow("told", stages))
    assert size == Size(OWN.vcpus + 4 + 3, OWN.memory_mb + 2 * 1024 + 3 * 2048), "left beside right; read is over"
    assert own_size(PLAN) == Size(OWN.vcpus + 4 + 4 + 3 + 1, OWN.memory_mb + 2048 + 2048 + 6144 + 128)


def gpu_stage(workers: int, gpu: float, memory_mb: int = 0) -> StagePlan:
    return StagePlan(workers, Size(1, 512, gpu, "gpu", memory_mb), "process")


def test_the_own_process_has_as_many_gpus_as_its_stages_find_their_places_on() -> None:
    plan = Plan("told", None, {"a": gpu_stage(2, 0.5), "b": gpu_stage(2, 0.75), "c": StagePlan(1, Size(1, 512))})
    side_by_side = (Stage("a", (), MENU), Stage("b", (), MENU), Stage("c", (), MENU))
    in_turn = (Stage("a", (), MENU), Stage("b", (Edge("a"),), MENU), Stage("c", (), MENU))
    assert own_size(plan, Workflow("told", side_by_side)).gpu == 3
    assert own_size(plan, Workflow("told", in_turn)).gpu == 2
    assert own_size(plan).gpu == 3, "without the graph every stage may run beside every other"
    assert own_size(PLAN).gpu == 0


def test_memory_of_the_devices_counts_where_they_are_known() -> None:
    plan = Plan("told", None, {"a": gpu_stage(2, 0.25, 10_000)})
    stages = (Stage("a", (), MENU),)
    small, large = (Capacity(gpu_devices=(Device("0", mb),)) for mb in (16_384, 81_920))
    assert own_size(plan, Workflow("told", stages, capacity=small)).gpu == 2
    assert own_size(plan, Workflow("told", stages, capacity=large)).gpu == 1
    assert own_size(plan, Workflow("told", stages)).gpu == 1


def test_stages_on_other_pools_take_no_gpu_of_the_own_process() -> None:
    there = StagePlan(4, Size(1, 512, 1, "gpu"), "gpu")
    assert own_size(Plan("told", None, {"a": there})).gpu == 0


def test_a_job_that_cannot_be_given_a_gpu_is_refused(deployed: str) -> None:
    with pytest.raises(WorkPoolUnusable, match="gpu_limit"):
        pin(deployed, Plan("told", None, {"a": gpu_stage(1, 1)}))


def test_a_pin_stores_the_plan_and_sizes_the_job_and_keeps_what_was_there(deployed: str) -> None:
    shown = pin(deployed, PLAN, apply=False)
    assert variables(deployed) == {"env": {"OURS": "1"}, "image": "ours:1"}
    pinned = pin(deployed, PLAN)
    assert pinned == shown
    found = variables(deployed)
    assert found["image"] == "ours:1"
    assert found["env"] == {"OURS": "1", VARIABLE: pinned.block}
    assert pinned.sized
    assert "cpu_request" in found
    assert PlanBlock.load(pinned.block).plan == PLAN
    assert pin(deployed, PLAN) == replace(pinned, before=pinned.block), "once more changes nothing"
    assert unpin(deployed)
    assert not unpin(deployed)
    assert variables(deployed)["env"] == {"OURS": "1"}


def test_what_cannot_be_pinned_is_refused_with_what_to_do(deployed: str) -> None:
    for missing in ("told/missing", "never-ran/missing", "missing"):  # whatever is known of the flow
        with pytest.raises(InvalidValue, match="prefect deployment ls"):
            pin(missing)
    with pytest.raises(InvalidValue, match="prefect deployment ls"):
        pin("told/missing", PLAN)
    with pytest.raises(InvalidValue, match=VARIABLE):
        pin("told/served", PLAN)
    with pytest.raises(NothingProposed, match="no plan is in force"):
        pin(deployed)


def test_the_command_line_pins(deployed: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    assert main(["pin", deployed, "--plan", str(path), "--dry-run"]) == 0
    assert '"applied": false' in capsys.readouterr().out
    assert main(["pin", deployed, "--plan", str(path)]) == 0
    assert VARIABLE in variables(deployed)["env"]
    assert main(["unpin", deployed]) == 0
    assert main(["approve", "told"]) == 1
    assert "nothing is known of it" in capsys.readouterr().err


def test_pinning_leaves_no_connection_open(deployed: str, connections: Counter[str]) -> None:
    pin(deployed, PLAN, apply=False)
    assert connections["opened"] == connections["closed"] > 0
