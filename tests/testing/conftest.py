"""A flow, and the profile of runs whose times are known."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from prefect import Flow, flow, task

from prefect_slo import slo
from prefect_slo.blocks import SLOProfile
from prefect_slo.blocks.folding import fit_model
from prefect_slo.observation import StageRun
from prefect_slo.resources import Capacity, Menu, Pool, Size
from prefect_slo.runner.graph import split_key
from prefect_slo.telemetry import RunRecord, StageKey, StageRecord
from prefect_slo.telemetry.store import Stored
from prefect_slo.workflow import Edge, Stage, Workflow


@task
def load(n: int) -> int:
    return n


@task
def train(shard: int) -> int:
    return shard


MENU = Menu(workers=(1, 2, 4), sizes=(Size(1, 1024), Size(2, 2048)), pools=(Pool("process"),))


@pytest.fixture
def letters() -> Callable[..., Flow[..., Any]]:
    """load → train x 8, under a bound."""

    def build(latency: float | str | None = 4.0, **options: Any) -> Flow[..., Any]:
        @flow(name="letters")
        def body(n: int = 8) -> int:
            return sum(train.map(range(load.submit(n).result())).result())

        return slo(latency, **options)(body)

    return build


@pytest.fixture
def workflow() -> Workflow:
    single = Menu(workers=(1,), sizes=MENU.sizes[:1], pools=MENU.pools)
    stages = (Stage("load", menu=single, fanout="given", items=1), Stage("train", (Edge("load"),), MENU, "given", 8))
    return Workflow("letters", stages, capacity=Capacity(vcpus=8.0))


@pytest.fixture
def stored(workflow: Workflow) -> Callable[..., SLOProfile]:
    """The profile of four runs at each setting: load takes 0.5 s, train 0.5 + 8/(d·v) s, 3 % noise."""

    def build(*, version: str | None = None) -> SLOProfile:
        rng = np.random.default_rng(0)
        records = []
        for number, option in enumerate(o for o in MENU.options() for _ in range(4)):
            rows = []
            for name, fn in (("load", load), ("train", train)):
                at = option if name == "train" else workflow["load"].menu.options()[0]
                seconds = 0.5 if name == "load" else 0.5 + 8 / (at.workers * at.size.vcpus)
                wall = seconds * float(rng.lognormal(0, 0.03))
                key, source = split_key(fn.task_key)
                row = StageRun(
                    f"run-{number:03d}", name, at.workers, at.size.memory_mb, at.size.vcpus, wall,
                    overhead_s=0.02 * wall, items=1 if name == "load" else 8, started_at=1.7e9 + 60 * number,
                )  # fmt: skip
                rows.append(StageRecord(row, StageKey(key, version or source)))
            latency = sum(record.row.wall_s for record in rows) + 0.1
            records.append(
                RunRecord("letters", f"run-{number:03d}", "completed", latency, 1.7e9 + 60 * number, tuple(rows),
                          workflow=workflow.to_document())
            )  # fmt: skip
        profile = SLOProfile(flow_name="letters").absorbed([Stored(datetime.now(UTC), tuple(records))])
        training = profile.training()
        assert training is not None
        return profile.with_model(fit_model(profile.workflow(), training.stage_runs, training.run_latency_s))

    return build
