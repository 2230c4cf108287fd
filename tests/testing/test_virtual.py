"""Plans in virtual time, against closed forms."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from prefect_slo.blocks import SLOProfile
from prefect_slo.models import WorkflowModel
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Capacity, Size
from prefect_slo.simulate import simulate
from prefect_slo.testing import virtual_run, virtual_runs
from prefect_slo.workflow import Edge, Stage, Workflow

ONE = Size(1, 1024)


def plan(**workers: int) -> Plan:
    return Plan("w", None, {name: StagePlan(n, ONE, "process") for name, n in workers.items()})


def given(name: str, items: int, *after: Edge) -> Stage:
    return Stage(name, after, fanout="given", items=items)


def test_items_run_in_waves() -> None:
    workflow = Workflow("w", (given("a", 7),))
    assert virtual_run(workflow, plan(a=3), {"a": 2.0}) == {"a": pytest.approx(6.0)}


def test_a_stage_that_needs_all_items_waits_for_the_last() -> None:
    workflow = Workflow("w", (given("a", 4), given("b", 4, Edge("a"))))
    assert virtual_run(workflow, plan(a=2, b=2), {"a": 1.0, "b": 2.0}) == pytest.approx({"a": 2.0, "b": 6.0})


def test_a_stage_that_needs_its_own_item_runs_as_a_pipeline() -> None:
    workflow = Workflow("w", (given("a", 4), given("b", 4, Edge("a", "item"))))
    ends = virtual_run(workflow, plan(a=1, b=1), {"a": 1.0, "b": 1.0})
    assert ends == pytest.approx({"a": 4.0, "b": 5.0})


def test_stages_side_by_side_share_the_machine() -> None:
    stages = (given("a", 2), given("b", 2))
    item_s = {"a": 3.0, "b": 3.0}
    both = virtual_run(Workflow("w", stages, capacity=Capacity(vcpus=4)), plan(a=2, b=2), item_s)
    assert both == pytest.approx({"a": 3.0, "b": 3.0})
    narrow = virtual_run(Workflow("w", stages, capacity=Capacity(vcpus=2)), plan(a=2, b=2), item_s)
    assert max(narrow.values()) == pytest.approx(6.0)


def test_divided_work_has_one_item_per_worker() -> None:
    workflow = Workflow("w", (Stage("a", fanout="planned"),))
    assert virtual_run(workflow, plan(a=5), {"a": 2.0}) == {"a": pytest.approx(2.0)}


def test_a_branch_that_is_not_taken_holds_nothing_up() -> None:
    workflow = Workflow("w", (given("a", 1), given("b", 1, Edge("a")), given("c", 1, Edge("a"), Edge("b"))))
    ends = virtual_run(workflow, plan(a=1, b=1, c=1), {"a": 1.0, "b": 0.0, "c": 1.0})
    assert ends == pytest.approx({"a": 1.0, "c": 2.0})


def test_a_worker_larger_than_the_machine_runs_alone() -> None:
    workflow = Workflow("w", (given("a", 2), given("b", 1)), capacity=Capacity(vcpus=1))
    large = Plan("w", None, {name: StagePlan(2, Size(4, 1024), "process") for name in "ab"})
    assert max(virtual_run(workflow, large, {"a": 1.0, "b": 1.0}).values()) == pytest.approx(3.0)


def test_batches_are_calls_and_bundles_are_not() -> None:
    workflow = Workflow("w", (given("a", 8),))
    batched = Plan("w", None, {"a": StagePlan(2, ONE, "process", batch=4)})
    assert virtual_run(workflow, batched, {"a": 3.0}) == {"a": pytest.approx(3.0)}
    bundled = Plan("w", None, {"a": StagePlan(2, ONE, "process", bundle=2)})
    assert virtual_run(workflow, bundled, {"a": 3.0}) == {"a": pytest.approx(12.0)}


def test_runs_agree_with_the_model_where_nothing_is_shared(
    workflow: Workflow, stored: Callable[..., SLOProfile]
) -> None:
    model = WorkflowModel.from_document(workflow, stored().model_document())
    chosen = replace(plan(load=1, train=4), workflow="letters")
    virtual = [run.latency_s for run in virtual_runs(model, chosen, 300, seed=3)]
    assert virtual == pytest.approx(simulate(model, chosen, 300, 3).latency_s.tolist(), rel=1e-3)
    assert statistics.fmean(virtual) == pytest.approx(0.5 + 2.5 + 0.1, rel=0.05)
