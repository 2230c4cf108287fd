"""Stages, edges and their kinds, learned from what a flow submits."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

import pytest
from prefect import Task, task

from prefect_slo.runner.graph import StageGraph, split_key
from prefect_slo.runner.ids import uuid7


@task
def a(x):
    return x


@task
def b(x):
    return x


@task
def c(x):
    return x


class Flow:
    """Submits calls to a graph."""

    def __init__(self) -> None:
        self.graph = StageGraph()

    def submit(self, called: Task, *upstream: UUID) -> UUID:
        run_id = uuid7()
        self.graph.place(called, run_id, upstream)
        return run_id

    def map(self, called: Task, upstream: Iterable[UUID | tuple[UUID, ...]]) -> list[UUID]:
        return [self.submit(called, *(each if isinstance(each, tuple) else (each,))) for each in upstream]

    def source(self, called: Task, n: int) -> list[UUID]:
        return [self.submit(called) for _ in range(n)]

    def edges(self) -> dict[tuple[str, str], str]:
        workflow = self.graph.workflow("flow")
        assert workflow is not None
        return {(edge.parent, stage.name): edge.kind for stage in workflow.stages for edge in stage.after}

    def items(self) -> dict[str, int | None]:
        workflow = self.graph.workflow("flow")
        assert workflow is not None
        return {stage.name: stage.items for stage in workflow.stages}


@pytest.fixture
def flow() -> Flow:
    return Flow()


def test_nothing_submitted_is_no_workflow(flow):
    assert flow.graph.workflow("flow") is None


def test_a_map_over_a_map_takes_item_by_item(flow):
    flow.map(b, flow.source(a, 5))
    assert flow.edges() == {("a", "b"): "item"}
    assert flow.items() == {"a": 5, "b": 5}


def test_a_reduction_takes_all_items(flow):
    flow.submit(b, *flow.source(a, 5))
    assert flow.edges() == {("a", "b"): "all"}


def test_a_map_with_one_shared_upstream_takes_all_of_it(flow):
    shared = flow.submit(a)
    flow.map(b, [shared] * 4)
    assert flow.edges() == {("a", "b"): "all"}


def test_a_map_over_pairs_takes_all(flow):
    items = flow.source(a, 4)
    flow.map(b, [(items[0], items[1]), (items[2], items[3])])
    assert flow.edges() == {("a", "b"): "all"}


def test_a_chain_of_single_calls_takes_all(flow):
    flow.submit(b, flow.submit(a))
    assert flow.edges() == {("a", "b"): "all"}


def test_kinds_are_told_apart_for_each_parent(flow):
    shared, items = flow.submit(a), flow.source(b, 3)
    flow.map(c, [(item, shared) for item in items])
    assert flow.edges() == {("a", "c"): "all", ("b", "c"): "item"}


def test_the_same_task_with_other_parents_is_another_stage(flow):
    first = flow.submit(a)
    flow.submit(c, first)
    flow.submit(c, flow.submit(b, first))
    assert flow.items() == {"a": 1, "c": 1, "b": 1, "c-2": 1}
    assert flow.edges()["b", "c-2"] == "all"


def test_the_same_task_with_the_same_parents_is_one_stage(flow):
    flow.source(a, 2)
    flow.source(a, 3)
    assert flow.items() == {"a": 5}


def test_a_loop_over_its_own_result_is_one_sequential_stage(flow):
    x = flow.submit(a)
    for _ in range(4):
        x = flow.submit(b, x)
    workflow = flow.graph.workflow("flow")
    assert {stage.name: (stage.items, stage.sequential) for stage in workflow.stages} == {
        "a": (1, False),
        "b": (4, True),
    }
    assert flow.edges() == {("a", "b"): "all"}


def test_what_follows_a_loop_follows_its_stage(flow):
    x = flow.submit(a)
    for _ in range(3):
        x = flow.submit(a, x)
    flow.submit(b, x)
    assert flow.edges() == {("a", "b"): "all"}


def test_upstream_runs_that_are_not_the_runners_own_are_no_parents(flow):
    flow.submit(a, uuid7())
    assert flow.edges() == {}


def test_stages_closer_to_the_end_are_more_urgent(flow):
    flow.submit(c, flow.submit(b, flow.submit(a)))
    depth = flow.graph.depth_first()
    assert depth["a"] < depth["b"] < depth["c"]


def test_a_task_key_is_split_into_key_and_hash():
    assert split_key("f-1a2b3c4d") == ("f", "1a2b3c4d")
    assert split_key("my-task-1a2b3c4d") == ("my-task", "1a2b3c4d")
    assert split_key("bare") == ("bare", "")


def test_ids_tell_when_they_were_made():
    before, first, second = uuid7(), uuid7(), uuid7()
    assert first.version == 7
    assert (before.int >> 80) <= (first.int >> 80) <= (second.int >> 80)
    assert len({uuid7() for _ in range(1000)}) == 1000
