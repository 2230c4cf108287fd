"""Plans of pipelines whose workers have to start: the search takes starts for part of each wave, tests know better."""

from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.planner import make_plan
from prefect_slo.resources import Menu, Pool, Size
from prefect_slo.workflow import Edge, Stage, Workflow

SIZES = tuple(Size(vcpus, 1024, hardware="elsewhere") for vcpus in (1, 2))
WORK_S = {"a": 8.0, "b": 16.0, "c": 6.0}


@pytest.fixture(scope="module")
def model() -> WorkflowModel:
    """Three stages that hand on their items one by one; three runs of ten wait 5 s for workers in each of them."""
    menu = Menu(workers=(1, 2, 4), sizes=SIZES, pools=(Pool("pool", SIZES),))
    after = {"a": (), "b": (Edge("a", "item"),), "c": (Edge("b", "item"),)}
    workflow = Workflow("piped", tuple(Stage(name, edges, menu, items=8) for name, edges in after.items()))
    rng, rows = np.random.default_rng(3), []
    settings = [(workers, size) for _ in range(8) for workers in menu.workers for size in SIZES]
    for number, (workers, size) in enumerate(settings):
        cold = rng.random() < 0.3
        for stage, seconds in WORK_S.items():
            work = seconds / (workers * size.vcpus**0.8) * float(rng.lognormal(0, 0.03))
            start = 5 * float(rng.lognormal(0, 0.1)) if cold else 0.0
            rows.append(
                StageRun(
                    f"run-{number}", stage, workers, 1024, size.vcpus, start + work, overhead_s=start + 0.02 * work,
                    items=8, cold=cold, hardware="elsewhere", start_s=start, billed_s=workers * (work + start),
                )
            )  # fmt: skip
    return WorkflowModel(workflow).fit(StageRuns.of(rows))


def test_a_plan_that_failed_its_test_is_not_found_again(model: WorkflowModel) -> None:
    with pytest.raises(InfeasibleSlo) as refused:
        make_plan(model, Latency(14.0), seed=0)
    nearest = refused.value.nearest
    assert nearest is not None
    for bound in (nearest.bound, 1.02 * nearest.bound, 1.1 * nearest.bound):
        plan = make_plan(model, Latency(bound), seed=0)
        assert plan.certificate is not None
        assert plan.predicted is not None
        assert plan.predicted.latency_s.p95 <= bound
