"""Plans and their files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.errors import InvalidPlan, UnknownStage
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.plan import Certificate, Plan, PlanChange, Prediction, Quantiles, StagePlan, diff
from prefect_slo.resources import Option, Size

numbers = st.floats(0, 1e9)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda name: name.strip())
knobs = st.dictionaries(names, st.booleans() | st.integers() | numbers | st.text(st.characters(codec="utf-8")))
stage_plans = st.builds(
    StagePlan,
    workers=st.integers(1, 1000),
    size=st.builds(
        Size, st.floats(0.1, 64), st.integers(1, 10**6), st.floats(0, 1) | st.integers(2, 8).map(float), names
    ),
    pool=names,
    batch=st.integers(1, 1000),
    bundle=st.none() | st.integers(1, 1000),
    record=st.sampled_from(["full", "summary", "bare"]),
    knobs=knobs.map(lambda values: tuple(values.items())),
)
bounds = st.tuples(st.none() | st.floats(1e-3, 1e6), st.none() | st.floats(1e-6, 1e6)).filter(any)
objectives = st.builds(
    lambda bounds, *at: Slo(bounds[0] and Latency(bounds[0], *at), bounds[1] and Budget(bounds[1], *at)),
    bounds, st.floats(0.01, 0.999), st.floats(0.01, 0.999),
)  # fmt: skip
quantiles = st.builds(Quantiles, numbers, numbers, numbers, numbers)
plans = st.builds(
    Plan,
    workflow=names,
    objective=st.none() | objectives,
    stages=st.dictionaries(names, stage_plans, max_size=4),
    predicted=st.none() | st.builds(Prediction, quantiles, quantiles, numbers, numbers),
    certificate=st.none() | st.builds(
        Certificate, numbers, st.floats(-1, 1), numbers, st.integers(0), st.integers(0), numbers, st.integers(0)
    ),
    seed=st.integers(0, 2**63),
)  # fmt: skip


@given(plans)
def test_a_plan_file_reads_back_to_an_equal_plan_and_the_same_bytes(plan: Plan) -> None:
    copy = Plan.from_json(plan.to_json())
    assert copy == plan
    assert copy.to_json() == plan.to_json()


@given(plans)
def test_a_plan_file_is_json_for_every_parser(plan: Plan) -> None:
    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    document = json.loads(plan.to_json(), parse_constant=no_constants)
    assert list(document) == ["schema", "workflow", "objective", "seed", "stages", "predicted", "certificate"]
    assert list(document["stages"]) == list(plan.stages)


def test_numbers_of_numpy_make_the_same_bytes_as_pythons() -> None:
    ours = Plan("w", None, {"a": StagePlan(2, Size(1, 512), batch=3, knobs=(("k", 4),))}, seed=5)
    size = Size(np.float32(1), np.int32(512))  # type: ignore[arg-type]
    stage = StagePlan(np.int64(2), size, batch=np.int8(3), knobs=(("k", np.int64(4)),))  # type: ignore[arg-type]
    theirs = Plan("w", None, {"a": stage}, seed=np.uint32(5))  # type: ignore[arg-type]
    assert theirs.to_json() == ours.to_json()


def test_the_order_of_knobs_does_not_matter() -> None:
    assert StagePlan(knobs=(("b", 1), ("a", 2))) == StagePlan(knobs=(("a", 2), ("b", 1)))


def test_a_menu_option_and_its_stage_plan_lead_to_each_other() -> None:
    option = Option(4, Size(2, 2048), "gpu", 8, (("model", "small"),))
    assert StagePlan.of(option, record="summary").option == option


def test_a_changed_stage_takes_prediction_and_certificate_away() -> None:
    flat = Quantiles(1, 1, 1, 1)
    plan = Plan("w", Slo(Latency(9)), {"a": StagePlan(), "b": StagePlan()}, Prediction(flat, flat, 1, 1), seed=3)
    changed = plan.with_stage("a", workers=8)
    assert (changed["a"].workers, changed["b"], changed.predicted, changed.seed) == (8, plan["b"], None, 3)
    with pytest.raises(UnknownStage, match="one of a, b"):
        plan.with_stage("c", workers=8)
    with pytest.raises(InvalidPlan, match="one of workers, size"):
        plan.with_stage("a", worker=8)


def test_a_diff_names_each_field_that_changed() -> None:
    before = Plan("w", None, {"a": StagePlan(), "b": StagePlan()})
    after = Plan("w", None, {"a": StagePlan(workers=4, batch=2), "c": StagePlan()})
    assert diff(before, after) == (
        PlanChange("a", "workers", 1, 4),
        PlanChange("a", "batch", 1, 2),
        PlanChange("b", "stage", StagePlan(), None),
        PlanChange("c", "stage", None, StagePlan()),
    )
    assert diff(before, before) == ()


def test_the_timing_that_the_command_line_prints_is_passed_over() -> None:
    plan = Plan("w", None, {"a": StagePlan()})
    assert Plan.from_document({**plan.to_document(), "timing": {"fit_s": 0.1}}) == plan


def test_memory_on_a_gpu_is_in_the_file_where_it_is_said() -> None:
    sharing = Plan("w", None, {"a": StagePlan(1, Size(1, 512, 0.5, "gpu", 4_096)), "b": StagePlan(1, Size(1, 512))})
    stages = json.loads(sharing.to_json())["stages"]
    assert stages["a"]["gpu_memory_mb"] == 4_096
    assert "gpu_memory_mb" not in stages["b"]
    assert Plan.from_json(sharing.to_json()) == sharing
