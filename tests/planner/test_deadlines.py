"""Deadlines that are picked by what can be promised, on a calm machine and on a busy one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.planner import make_plan
from prefect_slo.planner.baselines import all_min
from prefect_slo.planner.deadlines import MOSTLY, deadlines, telling
from prefect_slo.resources import Capacity, Menu, Size
from prefect_slo.workflow import Edge, Stage, Workflow

SIZES = (Size(1, 1024), Size(2, 2048))
WORKFLOW = Workflow(
    "letters",
    (
        Stage("load", menu=Menu(workers=(1,), sizes=SIZES), fanout="given", items=1),
        Stage("train", (Edge("load"),), Menu(workers=(1, 2), sizes=SIZES), "given", 8),
    ),
    capacity=Capacity(vcpus=2.0, memory_mb=8192.0),
)
WORK_S = {"load": 1.0, "train": 4.0}
Modelled = Callable[[float, int], WorkflowModel]


@pytest.fixture(scope="module")
def modelled() -> Modelled:
    """A model of so many runs of each of six settings, whose times spread by so much."""

    def model(spread: float, repeats: int) -> WorkflowModel:
        rng, rows = np.random.default_rng(0), []
        settings = [(1, SIZES[0]), (1, SIZES[1]), (2, SIZES[0])] * (2 * repeats)
        for run, (workers, size) in enumerate(settings):
            for stage, work_s in WORK_S.items():
                at = workers if stage == "train" else 1
                wall_s = work_s / (at * size.vcpus) * float(rng.lognormal(0, spread))
                items = 8 if stage == "train" else 1
                rows.append(StageRun(f"r{run}", stage, at, size.memory_mb, size.vcpus, wall_s, items=items))
        return WorkflowModel(WORKFLOW).fit(StageRuns.of(rows))

    return model


def test_deadlines_differ_in_what_they_need_and_can_be_kept(modelled: Modelled) -> None:
    model = modelled(0.03, 2)
    found = deadlines(model, seed=0)
    low, middle, high = found.bounds_s
    assert found.tell
    assert found.confidence == 0.99
    assert low < middle < high < 1.5 * sum(WORK_S.values())
    plans = [make_plan(model, Latency(bound), seed=0) for bound in found.bounds_s]
    assert plans[0].predicted.cost_usd.mean > plans[2].predicted.cost_usd.mean
    assert plans[2].predicted.cost_usd.mean <= all_min(model, Latency(high)).predicted.cost_usd.mean
    with pytest.raises(InfeasibleSlo):
        make_plan(model, Latency(0.9 * low), seed=0)


def test_few_runs_that_differ_much_promise_deadlines_that_tell_nothing_but_less_surely(modelled: Modelled) -> None:
    model = modelled(0.6, 1)
    wide = deadlines(model, seed=0)
    assert not wide.tell
    assert wide.bounds_s[0] > 5 * sum(WORK_S.values()), "that is what makes it necessary"
    found = telling(model, seed=0, confidences=(0.99, 0.5))
    assert found.tell
    assert found.unsure <= MOSTLY
    assert found.confidence < 0.99
    assert found.bounds_s[2] < 0.5 * wide.bounds_s[0]
