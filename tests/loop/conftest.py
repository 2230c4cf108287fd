"""A small workflow whose truth is known, and what a loop would know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from prefect_slo.blocks import fold_in
from prefect_slo.loop.knowledge import Fitted, Knowledge
from prefect_slo.models import WorkflowModel
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.resources import Capacity, Menu, Pool, Size
from prefect_slo.runner.rules import PROCESS
from prefect_slo.telemetry import RunRecord, StageKey, StageRecord
from prefect_slo.telemetry.store import publish
from prefect_slo.workflow import Edge, Stage, Workflow

MENU = Menu(workers=(1, 2, 4), sizes=(Size(1, 1024), Size(2, 2048)), pools=(Pool(PROCESS),))


def _wall_s(stage: str, workers: int, vcpus: float) -> float:
    return 0.5 if stage == "load" else 0.5 + 8 / (workers * vcpus)


@pytest.fixture
def workflow() -> Workflow:
    """``load`` (one item, 0.5 s) and then ``train`` (8 items, 0.5 + 8/(d·v) s)."""
    single = Menu(workers=(1,), sizes=MENU.sizes[:1], pools=MENU.pools)
    stages = (
        Stage("load", menu=single, fanout="given", items=1),
        Stage("train", (Edge("load"),), MENU, "given", 8),
    )
    return Workflow("letters", stages, capacity=Capacity(vcpus=8.0, memory_mb=16384.0))


@pytest.fixture
def rows(workflow: Workflow) -> Callable[..., StageRuns]:
    """Four runs at every setting of ``train``, 3 % noise, all times multiplied by ``slower``."""

    def build(*, slower: float = 1.0, seed: int = 0, repeats: int = 4) -> StageRuns:
        rng = np.random.default_rng(seed)
        found = []
        for number, option in enumerate(o for o in workflow["train"].menu.options() for _ in range(repeats)):
            for stage in ("load", "train"):
                at = option if stage == "train" else workflow["load"].menu.options()[0]
                wall = slower * _wall_s(stage, at.workers, at.size.vcpus) * float(rng.lognormal(0, 0.03))
                items = 1 if stage == "load" else 8
                found.append(
                    StageRun(
                        f"run-{number:03d}", stage, at.workers, at.size.memory_mb, at.size.vcpus, wall,
                        overhead_s=0.02 * wall, items=items,
                    )
                )  # fmt: skip
        return StageRuns.of(found)

    return build


@pytest.fixture
def know(workflow: Workflow, rows: Callable[..., StageRuns]) -> Callable[..., Knowledge]:
    """Knowledge of the workflow; keyword arguments are fields of ``Knowledge``, or ``slower`` for its rows."""

    def build(*, slower: float = 1.0, **fields: object) -> Knowledge:
        model = WorkflowModel(workflow).fit(rows(slower=slower))
        return Knowledge("letters", workflow, Fitted.of(model), **fields)

    return build


@pytest.fixture
def stored() -> Callable[[str, Workflow, Iterable[StageRun], Mapping[str, Any]], None]:
    """Makes the profile of a flow from its runs, of one stage each, the newest on the machine with these menus."""

    def store(name: str, workflow: Workflow, runs: Iterable[StageRun], asked: Mapping[str, Any]) -> None:
        document = workflow.to_document()
        publish(name, [
            RunRecord(
                name, row.run_id, "completed", row.wall_s, row.started_at,
                (StageRecord(row, StageKey(row.stage, name, row.hardware)),), workflow=document,
            )
            for row in runs
        ])  # fmt: skip
        fold_in(name, objective=asked)

    return store
