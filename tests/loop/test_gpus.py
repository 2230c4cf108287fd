"""Shares of this machine's GPUs on menus and in plans, and what it costs to have none."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefect_slo.blocks import SLOProfile, fold_in, put_in_force
from prefect_slo.declaration import Declaration
from prefect_slo.errors import InvalidValue
from prefect_slo.loop import director, gpus, hosts, knowledge, menus
from prefect_slo.loop.knowledge import Fitted, Knowledge
from prefect_slo.loop.learning import replan_flow
from prefect_slo.loop.menus import MenuSettings, stage_menu, with_menus
from prefect_slo.loop.planning import Decision, decide, ladders
from prefect_slo.loop.replanning import KEPT, fits, plan_digest, replan
from prefect_slo.loop.sweep import design, fallback_options
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency, Slo
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.placement import Device, Interference
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Capacity, Menu, Pool, Size
from prefect_slo.runner.pools import PROCESS, Pools, by_name
from prefect_slo.runner.work_pools import WorkPool
from prefect_slo.runner.workpool import docker_engine
from prefect_slo.testing.docker import DockerEngine, serving
from prefect_slo.workflow import Stage, Workflow

DEVICE = Device("GPU-a", 16_384)
CPU, HALF, WHOLE = Size(1, 1024), Size(1, 1024, 0.5, "gpu"), Size(1, 1024, 1, "gpu")
NEUTRAL = Interference()
SLO = Slo(Latency(60.0, 0.95, 0.9))


def workflow(devices: tuple[Device, ...] | None, slowdown: Interference = NEUTRAL) -> Workflow:
    menu = Menu(workers=(1, 2), sizes=(CPU, HALF, WHOLE), pools=(Pool(PROCESS),))
    stage = Stage("detect", menu=menu, fanout="given", items=8)
    return Workflow("video", (stage,), capacity=Capacity(vcpus=4, gpu_devices=devices, gpu_slowdown=slowdown))


def measured(kinds: dict[str, float]) -> list[StageRun]:
    """Of a stage whose one worker takes so long on each kind of hardware, and two half of it."""
    rng = np.random.default_rng(3)
    return [
        StageRun(
            f"{kind}-{workers}-{k}", "detect", workers, 1024, 1, seconds / workers * float(rng.lognormal(0, 0.02)),
            overhead_s=0.01, items=8, hardware=kind,
        )
        for kind, seconds in kinds.items() for workers in (1, 2) for k in range(6)
    ]  # fmt: skip


def known(devices: tuple[Device, ...] | None, kinds: dict[str, float], slowdown: Interference = NEUTRAL) -> Knowledge:
    """Of that stage."""
    flow = workflow(devices, slowdown)
    return Knowledge("video", flow, Fitted.of(WorkflowModel(flow).fit(StageRuns.of(measured(kinds)))))


def test_shares_are_on_a_menu_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(menus, "usable_vcpus", lambda: 1.0)
    monkeypatch.setattr(menus, "usable_memory_mb", lambda: 4_000)
    menu = stage_menu(MenuSettings(), Declaration(menu={"gpu": (0, 0.25, 1)}))
    assert menu.sizes == (Size(1, 4000), Size(1, 4000, 0.25, "gpu"), Size(1, 4000, 1, "gpu"))
    settings = MenuSettings.of({"gpu": 0.5, "gpu_memory_mb": "2GB"})
    assert stage_menu(settings).sizes == (Size(1, 4000, 0.5, "gpu", 2048),)
    assert all(not size.gpu for size in stage_menu(MenuSettings()).sizes)


def test_a_share_can_be_pinned(monkeypatch):
    monkeypatch.setattr(menus, "usable_vcpus", lambda: 2.0)
    pinned = stage_menu(MenuSettings(), Declaration(pins={"gpu": 0.5, "gpu_memory_mb": 3000}))
    assert [(s.gpu, s.gpu_memory_mb, s.hardware) for s in pinned.sizes] == [(0.5, 3000, "gpu")]
    none = stage_menu(MenuSettings(), Declaration(menu={"gpu": (0, 1)}, pins={"gpu": 0}))
    assert {size.gpu for size in none.sizes} == {0.0}


@pytest.mark.parametrize("gpu", [-1, 1.5, "half"])
def test_a_share_that_cannot_be_is_refused(gpu):
    with pytest.raises(InvalidValue):
        Declaration(menu={"gpu": gpu})


def test_devices_are_looked_for_only_where_a_menu_has_a_share(monkeypatch):
    asked = []
    monkeypatch.setattr(menus, "usable_gpus", lambda: asked.append(1) or (DEVICE,))
    plain = with_menus(Workflow("w", (Stage("a"),)), MenuSettings(), {})
    assert plain.capacity.gpu_devices is None
    assert not asked
    sharing = with_menus(Workflow("w", (Stage("a"),)), MenuSettings(gpu=(0.5,)), {})
    assert sharing.capacity.gpu_devices == (DEVICE,)


def test_the_plan_takes_a_gpu_that_is_here_and_that_pays():
    plan, _ = replan(known((DEVICE,), {"cpu": 16.0, "gpu": 2.0, "gpu:0.5": 3.0}), Slo(Latency(4.0, 0.95, 0.9)), seed=0)
    assert gpus.using(plan, [PROCESS]) == ("detect",)


def test_without_one_the_plan_is_the_cpus_and_says_what_that_costs():
    lacking = known((), {"cpu": 16.0, "gpu": 2.0})
    decision = decide(
        lacking, Slo(Latency(4.0, 0.95, 0.9)), mode="enforce", seed=0, explore=0, rng=np.random.default_rng(0)
    )
    assert gpus.using(decision.followed, [PROCESS]) == ()
    assert "GPU wanted for 'detect', and none is here: it runs on the CPU, predicted" in decision.note
    assert "s, " in decision.note
    assert "$" in decision.note


def test_nothing_is_said_where_a_gpu_would_not_pay_or_none_was_measured():
    for kinds in ({"cpu": 1.0, "gpu": 40.0}, {"cpu": 16.0}):
        lacking = known((), kinds)
        decision = decide(lacking, SLO, mode="enforce", seed=0, explore=0, rng=np.random.default_rng(0))
        assert "GPU wanted" not in decision.note


def test_a_plan_in_force_that_needs_a_gpu_does_not_fit_a_machine_without():
    rich = known((DEVICE,), {"cpu": 16.0, "gpu": 2.0, "gpu:0.5": 3.0})
    slo = Slo(Latency(4.0, 0.95, 0.9))
    plan, _ = replan(rich, slo, seed=0)
    assert fits(plan, workflow((DEVICE,)), slo)
    assert not fits(plan, workflow(()), slo)
    assert not fits(plan, workflow((replace(DEVICE, cores=0.25),)), slo)


def decided_without(told: Knowledge, plan: Plan) -> Decision:
    """How a run goes on a machine without a GPU while that plan is in force."""
    asked = plan.objective
    assert asked is not None
    return decide(replace(told, plan=plan), asked, mode="enforce", seed=0, explore=0, rng=np.random.default_rng(0))


def test_that_no_gpu_is_here_is_told_once_and_with_one_set_of_figures():
    kinds, slo = {"cpu": 16.0, "gpu": 2.0}, Slo(Latency(4.0, 0.95, 0.9))
    plan, _ = replan(known((DEVICE,), {"cpu": 16.0, "gpu": 3.0}), slo, seed=0)
    note = decided_without(known((), kinds), plan).note
    assert "GPU wanted for 'detect', and none is here" in note
    assert note.count("in place of") == 1
    assert "GPUs that are not there" not in note


def test_a_run_without_the_gpu_of_the_plan_in_force_says_so_where_no_price_is_known():
    plan, _ = replan(known((DEVICE,), {"cpu": 16.0, "gpu": 2.0}), Slo(Latency(4.0, 0.95, 0.9)), seed=0)
    decision = decided_without(known((), {"cpu": 16.0}), plan)
    assert "GPU wanted" not in decision.note
    assert "The plan in force takes GPUs that are not there: this run goes by a plan of its own. The" in decision.note
    assert decision.lacking


def test_a_host_without_a_gpu_leaves_the_plan_in_force_to_those_that_have_one(
    prefect_server: str, stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    monkeypatch.setattr(knowledge, "_REMEMBERED", knowledge._Remembered())
    kinds, slo, name = {"cpu": 16.0, "gpu": 2.0, "gpu:0.5": 3.0}, Slo(Latency(4.0, 0.95, 0.9)), "video-on-two-hosts"
    plan, _ = replan(known((DEVICE,), kinds), slo, seed=0)
    runs = [replace(row, started_at=1_760_000_000.0 + n) for n, row in enumerate(measured(kinds))]
    asked = {"latency_s": 4.0, "budget_usd": None, "percentile": 0.95, "confidence": 0.9}
    stored(name, workflow(()), runs, asked)
    put_in_force(name, plan, "by a host with a GPU")
    assert replan_flow(name).startswith(KEPT)
    profile = SLOProfile.of_flow(name)
    assert plan_digest(profile.plan_in_force()) == plan_digest(plan)
    assert gpus.using(plan, [PROCESS]) == ("detect",)
    fold_in(name, objective={**asked, "latency_s": 40.0}, refit=True)
    assert "changed" in replan_flow(name), "what has changed for every host is planned anew"


def test_a_share_that_was_not_measured_is_predicted_from_one_that_was():
    kinds = {"cpu": 16.0, "gpu": 2.0}
    neutral = known((DEVICE,), kinds).model
    slowed = known((DEVICE,), kinds, Interference({2: 2.4})).model
    whole = neutral.stage_time("detect", vcpus=1, hardware=WHOLE.kind).mean
    assert neutral.stage_time("detect", vcpus=1, hardware=HALF.kind).mean == pytest.approx(whole)
    assert slowed.stage_time("detect", vcpus=1, hardware=HALF.kind).mean == pytest.approx(2.4 * whole, rel=1e-3)
    measured = known((DEVICE,), {**kinds, "gpu:0.5": 3.0}, Interference({2: 2.4})).model
    assert measured.stage_time("detect", vcpus=1, hardware=HALF.kind).mean == pytest.approx(3.0, rel=0.1)


def test_out_of_memory_a_stage_grows_on_the_hardware_that_it_is_on():
    flow = workflow((DEVICE,))
    larger = (*flow["detect"].menu.sizes, Size(1, 2048), Size(1, 2048, 0.5, "gpu"), Size(1, 4096, 1, "gpu"))
    flow = replace(flow, stages=(replace(flow["detect"], menu=replace(flow["detect"].menu, sizes=larger)),))
    plan, _ = replan(known((DEVICE,), {"cpu": 16.0, "gpu": 2.0, "gpu:0.5": 3.0}), SLO, seed=0)
    half = plan.with_stage("detect", size=HALF)
    assert ladders(half, flow)["detect"] == (Size(1, 2048, 0.5, "gpu"),)


def test_a_sweep_leaves_out_what_has_no_place_here():
    todo = design(workflow((DEVICE,)), None, repeats=1, seed=0).todo["detect"]
    assert {(o.workers, o.size.gpu) for o in todo} == {(1, 0), (2, 0), (1, 0.5), (2, 0.5), (1, 1)}
    assert {o.size.gpu for o in design(workflow(()), None, repeats=1, seed=0).todo["detect"]} == {0}
    assert fallback_options(workflow(()), {})["detect"].size.gpu == 0


def test_a_stage_that_was_measured_on_a_share_alone_is_planned_there():
    rich = known((DEVICE,), {"gpu:0.5": 2.0})
    assert rich.workflow is not None
    alone = Menu(workers=(1, 2), sizes=(HALF,), pools=(Pool(PROCESS),))
    flow = Workflow("video", (replace(rich.workflow.stages[0], menu=alone),), capacity=rich.workflow.capacity)
    plan, reason = replan(replace(rich, workflow=flow), SLO, seed=0)
    assert plan is not None, reason
    assert plan["detect"].size == HALF


DOCKER = "containers"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerEngine]:
    """A Docker engine with a GPU, asked anew each time."""
    monkeypatch.setattr(docker_engine, "_KEEP_S", 0.0)
    monkeypatch.setattr(menus, "usable_gpus", lambda: ())
    monkeypatch.setattr(menus, "usable_vcpus", lambda: 4.0)
    monkeypatch.setattr(menus, "usable_memory_mb", lambda: 8192)
    with serving(DockerEngine(gpus=("GPU-a",))) as served:
        yield served


def docker_pool(engine: DockerEngine, tmp_path: Path, *sizes: Size) -> Pools:
    return by_name([WorkPool(DOCKER, sizes or (Size(1, 1024, gpu=1),), str(tmp_path), docker_host=engine.url)])


def known_on(pools: Pools, kinds: dict[str, float], *, elsewhere: bool = True) -> Knowledge:
    """Of a stage that may run in containers with a GPU, or elsewhere on this machine's CPUs."""
    on_cpus = (Pool(PROCESS, (CPU,), workers=(1, 2)),) if elsewhere else ()
    menu = Menu(workers=(1, 2), pools=(*on_cpus, replace(pools[DOCKER].pool, workers=(1, 2))))
    stage = Stage("detect", menu=menu, fanout="given", items=8)
    capacity = Capacity(vcpus=4, memory_mb=8192, pools={DOCKER: pools[DOCKER].capacity})
    flow = Workflow("video", (stage,), capacity=capacity)
    rich = known((DEVICE,), kinds)
    assert rich.model is not None
    rows = rich.model.history("detect")
    table = StageRuns.of(
        [
            StageRun(f"{k}", "detect", int(w), 1024, 1, float(s), overhead_s=0.01, items=8, hardware=str(h))
            for k, (w, s, h) in enumerate(zip(rows["workers"], rows["wall_s"], rows.hardware, strict=True))
        ]
    )
    return Knowledge("video", flow, Fitted.of(WorkflowModel(flow).fit(table)))


def decided(told: Knowledge) -> Decision:
    slo = Slo(Latency(4.0, 0.95, 0.9))
    return decide(told, slo, mode="enforce", seed=0, explore=0, rng=np.random.default_rng(0))


def test_a_docker_pool_whose_engine_has_a_gpu_is_planned_for(engine: DockerEngine, tmp_path: Path) -> None:
    pools = docker_pool(engine, tmp_path)
    told = known_on(pools, {"cpu": 16.0, DOCKER: 2.0})
    assert hosts.seen_from_here(told, pools) is told
    decision = decided(told)
    assert decision.plan is not None
    assert (decision.plan["detect"].pool, decision.note, decision.lacking) == (DOCKER, "", False)


def test_one_whose_engine_has_none_is_not_and_the_price_of_that_is_said(engine: DockerEngine, tmp_path: Path) -> None:
    pools = docker_pool(engine, tmp_path)
    told = known_on(pools, {"cpu": 16.0, DOCKER: 2.0})
    engine.gpus = ()
    without = hosts.seen_from_here(told, pools)
    assert hosts.seen_from_here(told, pools) is without, "plans made for it are kept"
    assert hosts.seen_from_here(replace(told, plan=decided(told).plan), pools).plan is not None, (
        "but for another plan in force"
    )
    decision = decided(without)
    assert decision.plan is not None
    assert decision.plan["detect"].pool == PROCESS
    assert "GPU wanted for 'detect', and pool 'containers' has none: it runs on the CPU, predicted" in decision.note
    assert decision.lacking, "it is a warning"
    assert re.search(r"\+[\d.]+ s, [+-]\$[\d.e-]+\)", decision.note)
    engine.gpus = ("GPU-a",)
    assert hosts.seen_from_here(told, pools) is told, "back when it is back"


def test_a_plan_that_a_run_is_pinned_to_runs_on_the_cpus_of_the_same_pool(engine: DockerEngine, tmp_path: Path) -> None:
    pools = docker_pool(engine, tmp_path, Size(1, 1024), Size(1, 1024, gpu=1))
    told = known_on(pools, {"cpu": 16.0, DOCKER: 2.0, f"{DOCKER}-cpu": 20.0})
    pinned = Plan("video", None, {"detect": StagePlan(2, Size(1, 1024, 1, DOCKER), DOCKER)})
    assert hosts.for_here(told, pinned, pools) == (pinned, "")
    engine.gpus = ()
    made, why = hosts.for_here(told, pinned, pools)
    assert made["detect"] == replace(pinned["detect"], size=Size(1, 1024, hardware=f"{DOCKER}-cpu"))
    assert re.search(r"predicted 1\d[\d.]* s and \$[\d.e-]+ a run in place of [\d.]+ s", why)


def test_what_was_never_measured_on_the_cpu_is_said_to_be_unknown(engine: DockerEngine, tmp_path: Path) -> None:
    pools = docker_pool(engine, tmp_path)
    told = known_on(pools, {"cpu": 16.0, DOCKER: 2.0})
    engine.gpus = ()
    pinned = Plan("video", None, {"detect": StagePlan(2, Size(1, 1024, 1, DOCKER), DOCKER)})
    made, why = hosts.for_here(told, pinned, pools)
    assert made["detect"].size == Size(1, 1024, hardware=f"{DOCKER}-cpu")
    assert "where nothing was measured" in why


def test_an_engine_that_does_not_answer_is_taken_to_have_none(tmp_path: Path) -> None:
    pool = WorkPool(DOCKER, (Size(1, 1024, gpu=1),), str(tmp_path), docker_host=f"unix://{tmp_path}/none.sock")
    assert "no Docker engine answers" in pool.lacks_gpus()
    assert replace(pool, sizes=(Size(1, 1024),)).lacks_gpus() == "", "nobody is asked where no size has a GPU"
    assert replace(pool, docker_host=None).lacks_gpus() == ""
    with pytest.raises(InvalidValue, match="unix:///path"):
        replace(pool, docker_host="somewhere")


@pytest.mark.parametrize("pinned", [True, False])
def test_a_run_whose_stage_has_a_gpu_or_nothing_goes_to_the_cpu_with_a_warning(
    engine: DockerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """Pinned to its plan, or by the plan in force where the menu has nothing else."""
    pools = docker_pool(engine, tmp_path)
    plan = Plan("video", SLO, {"detect": StagePlan(2, Size(1, 1024, 1, DOCKER), DOCKER)})
    told = replace(known_on(pools, {DOCKER: 2.0}, elsewhere=False), plan=None if pinned else plan)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_TELEMETRY", "false")
    monkeypatch.setattr(knowledge, "_REMEMBERED", knowledge._Remembered())
    knowledge._REMEMBERED.put(told)
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(director, "say_once", lambda _, message, level: said.append((message, level)))
    parameters = {"slo_plan": plan.to_document()} if pinned else {}

    def sizes() -> list[Size]:
        recipe = director.LoopDirector(SLO, pools=pools, explore=0).recipe("video", f"run-{len(said)}", parameters)
        return [stage.size for stage in recipe.plan.stages.values()] if recipe.plan is not None else []

    assert sizes() == [Size(1, 1024, 1, DOCKER)]
    assert not any("GPU wanted" in message for message, _ in said)
    engine.gpus = ()
    assert sizes() == [Size(1, 1024, hardware=f"{DOCKER}-cpu")]
    message, level = said[-1]
    assert "GPU wanted for 'detect', and pool 'containers' has none" in message
    assert level == logging.WARNING
