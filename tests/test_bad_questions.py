"""What can't be learned, planned or predicted: a typed error that names field and value, or a documented result."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from prefect_slo.errors import InfeasibleSlo, NotEnoughObservations, SloError
from prefect_slo.models import WorkflowModel
from prefect_slo.models.calibration import Calibration, runs_needed
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.planner import make_plan
from prefect_slo.resources import Menu, Option, Size
from prefect_slo.simulate import simulate
from prefect_slo.workflow import Edge, Stage, Workflow

NAN, INF = float("nan"), float("inf")
MENU = Menu(workers=(1, 2, 4), sizes=(Size(1, 1024), Size(2, 2048)))
WORKFLOW = Workflow("w", (Stage("a", menu=MENU), Stage("b", (Edge("a"),), MENU)))
OPTION = Option(2, Size(1, 1024))
PLAN = {"a": OPTION, "b": OPTION}
BOUND = Latency(30.0)
Case = tuple[Callable[[], object], str, str]


def rows(**columns: Any) -> dict[str, list[Any]]:
    """Two runs at every setting, both stages."""
    settings = [(r, d, v) for r in range(2) for d in (1, 2, 4) for v in (1, 2)]
    return {
        "run_id": [f"r{i}" for i in range(len(settings)) for _ in "ab"],
        "stage": ["a", "b"] * len(settings),
        "workers": [d for _, d, _ in settings for _ in "ab"],
        "vcpus": [float(v) for *_, v in settings for _ in "ab"],
        "memory_mb": [1024 * v for *_, v in settings for _ in "ab"],
        "wall_s": [(1 + 4 / (d * v)) * 1.03**r for r, d, v in settings for _ in "ab"],
        **columns,
    }


@cache
def model() -> WorkflowModel:
    return WorkflowModel(WORKFLOW).fit(rows())


def fit(table: object, latencies: Any = None, **settings: Any) -> Callable[[], object]:
    return lambda: WorkflowModel(WORKFLOW, **settings).fit(table, latencies)


def planned(objective: Any = BOUND, **settings: Any) -> Callable[[], object]:
    return lambda: make_plan(model(), objective, **settings)


def predicted(plan: Any = PLAN, **settings: Any) -> Callable[[], object]:
    return lambda: model().predict(plan, **settings)


def stage_time(stage: str = "a", **at: Any) -> Callable[[], object]:
    return lambda: model().stage_time(stage, **at)


def read(document: Any) -> Callable[[], object]:
    return lambda: WorkflowModel.from_document(WORKFLOW, document)


CASES: dict[str, Case] = {
    # objectives
    "percentile 1": (lambda: Latency(3.0, percentile=1.0), "percentile", "1.0"),
    "percentile 0": (lambda: Latency(3.0, percentile=0), "percentile", "0"),
    "percentile 95": (lambda: Budget(3.0, percentile=95), "percentile", "95"),
    "confidence 1": (lambda: Latency(3.0, confidence=1.0), "confidence", "1.0"),
    "confidence nan": (lambda: Latency(3.0, confidence=NAN), "confidence", "nan"),
    "bound nan": (lambda: Latency(NAN), "latency", "nan"),
    "bound inf": (lambda: Latency(INF), "latency", "inf"),
    "bound a word": (lambda: Latency("fast"), "latency", "'fast'"),
    "bound negative": (lambda: Latency("-3s"), "latency", "'-3s'"),
    "budget 0": (lambda: Budget(0), "budget_usd", "0"),
    "no bound": (lambda: Slo(), "slo", "None"),
    # plans to be made
    "objective None": (planned(None), "objective", "None"),
    "objective a number": (planned(30.0), "objective", "30.0"),
    "objective a text": (planned("30s"), "objective", "'30s'"),
    "seed negative": (planned(seed=-1), "seed", "-1"),
    "seed a text": (planned(seed="x"), "seed", "'x'"),
    "seed half": (planned(seed=0.5), "seed", "0.5"),
    "samples 0": (planned(samples=0), "samples", "0"),
    "samples nan": (planned(samples=NAN), "samples", "nan"),
    "fresh samples 0": (planned(certify_samples=0), "certify_samples", "0"),
    "no nodes": (planned(node_limit=0), "node_limit", "0"),
    "cold twice": (planned(cold=2), "cold", "2"),
    "cold nan": (planned(cold=NAN), "cold", "nan"),
    "cold a text": (planned(cold="yes"), "cold", "'yes'"),
    "pin of no stage": (planned(pins={"z": {"workers": 1}}), "stage", "'z'"),
    "pin off the menu": (planned(pins={"a": {"workers": 99}}), "pins.a", "{'workers': 99}"),
    "pin of a colour": (planned(pins={"a": {"colour": 1}}), "pin", "'colour'"),
    "pin a number": (planned(pins={"a": 3}), "pins.a", "3"),
    # rows
    "rows None": (fit(None), "stage_runs", "'NoneType'"),
    "rows a list": (fit([1]), "stage_runs", "'list'"),
    "no rows": (fit({name: [] for name in rows()}), "stage_runs", "0"),
    "column missing": (fit({k: v for k, v in rows().items() if k != "wall_s"}), "column", "'wall_s'"),
    "unknown stage": (fit(rows(stage=["a", "z"] * 12)), "stage", "'z'"),
    "time nan": (fit(rows(wall_s=[NAN] * 24)), "wall_s (row 0)", "nan"),
    "time negative": (fit(rows(wall_s=[-1.0] * 24)), "wall_s (row 0)", "-1.0"),
    "time of ages": (fit(rows(wall_s=[1e300] * 24)), "wall_s (row 0)", "1e+300"),
    "time of nothing": (fit(rows(wall_s=[1e-300] * 24)), "wall_s (row 0)", "1e-300"),
    "overhead negative": (fit(rows(overhead_s=[-1.0] * 24)), "overhead_s (row 0)", "-1.0"),
    "kind unknown": (fit(rows(), kind="magic"), "kind", "'magic'"),
    "half-life 0": (fit(rows(), half_life_runs=0), "half_life_runs", "0"),
    "half-life nan": (fit(rows(), half_life_runs=NAN), "half_life_runs", "nan"),
    "latency of a run nan": (fit(rows(), {"r0": NAN}), "run_latency_s[r0]", "nan"),
    "latency of a run negative": (fit(rows(), {"r0": -3.0}), "run_latency_s[r0]", "-3.0"),
    "latency of a run a text": (fit(rows(), {"r0": "x"}), "run_latency_s[r0]", "'x'"),
    # predictions
    "plan None": (predicted(None), "plan", "None"),
    "plan lacks a stage": (predicted({"a": OPTION}), "stage", "'b'"),
    "no draws": (predicted(n_samples=0), "n_samples", "0"),
    "stage that isn't": (stage_time("z", vcpus=1), "stage", "'z'"),
    "workers 0": (stage_time(workers=0, vcpus=1), "workers", "0"),
    "workers half": (stage_time(workers=1.5, vcpus=1), "workers", "1.5"),
    "no size": (stage_time(), "memory_mb", "None"),
    "memory nan": (stage_time(memory_mb=NAN), "memory_mb", "nan"),
    "memory negative": (stage_time(memory_mb=-5), "memory_mb", "-5"),
    "vcpus 0": (stage_time(vcpus=0), "vcpus", "0"),
    "vcpus inf": (stage_time(vcpus=INF), "vcpus", "inf"),
    "batch 0": (stage_time(vcpus=1, batch=0), "batch", "0"),
    "items negative": (stage_time(vcpus=1, items=-1), "items", "-1"),
    "upstream negative": (stage_time(vcpus=1, upstream=-1), "upstream", "-1"),
    "quantile 1": (lambda: model().stage_time("a", vcpus=1).quantile(1.0), "q", "1.0"),
    "quantile nan": (lambda: model().stage_time("a", vcpus=1).quantile(NAN), "q", "nan"),
    "feature nan": (lambda: model().given({"bytes_in": NAN}), "features.bytes_in", "nan"),
    "feature 0": (lambda: model().given({"bytes_in": 0}), "features.bytes_in", "0"),
    "feature a text": (lambda: model().given({"bytes_in": "big"}), "features.bytes_in", "'big'"),
    "features a list": (lambda: model().given([1]), "features", "[1]"),  # type: ignore[arg-type]
    "no runs": (lambda: simulate(model(), PLAN, runs=0), "runs", "0"),
    "a stage too many": (lambda: simulate(model(), {**PLAN, "z": OPTION}), "stage", "'z'"),
    "a stage too few": (lambda: simulate(model(), {"a": OPTION}), "plan.stages", "['a']"),
    # stored models and calibrations
    "document a list": (read([1]), "model", "[1]"),
    "document empty": (read({}), "model.schema", "None"),
    "document of the future": (read({"schema": 9}), "model.schema", "9"),
    "document torn": (read({"schema": 1}), "model.kind", "None"),
    "calibration at 1": (lambda: Calibration(1.0), "percentile", "1.0"),
    "calibration surely": (lambda: Calibration().quantile(1.0), "confidence", "1.0"),
    "calibration a list": (lambda: Calibration.from_document([1]), "calibration", "[1]"),  # type: ignore[arg-type]
    "runs for certainty": (lambda: runs_needed(1.0), "percentile", "1.0"),
    "run of no time": (lambda: Calibration().observe(0.0, 1.0), "actual", "0.0"),
}


@pytest.mark.parametrize(("ask", "field", "value"), CASES.values(), ids=CASES.keys())
def test_bad_questions_are_refused_at_once_by_field_and_value(
    ask: Callable[[], object], field: str, value: str
) -> None:
    model()
    started = time.thread_time()
    with pytest.raises(SloError) as refused:
        ask()
    spent_s = time.thread_time() - started
    message = str(refused.value)
    assert message.startswith(f"{field} is "), message
    assert value in message.split("; expected ")[0], message
    assert spent_s < 0.1  # CPU time


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 75


def test_duplicate_rows_change_nothing() -> None:
    twice = WorkflowModel(WORKFLOW).fit({name: column + column for name, column in rows().items()})
    assert twice.predict(PLAN).latency_s == model().predict(PLAN).latency_s


def test_overhead_above_the_wall_time_counts_as_all_of_it() -> None:
    found = WorkflowModel(WORKFLOW).fit(rows(overhead_s=[99.0] * 24)).predict(PLAN)
    assert found.latency_s.p50 == pytest.approx(model().predict(PLAN).latency_s.p50, rel=0.05)


def test_latencies_of_runs_without_rows_and_features_never_seen_are_ignored() -> None:
    odd = WorkflowModel(WORKFLOW).fit(rows(), {"another run": 99.0}).given({"colour": 3.0})
    assert odd.predict(PLAN).latency_s == model().predict(PLAN).latency_s


def test_one_setting_predicts_itself_and_is_not_planned_on() -> None:
    walls = np.tile([5.0, 5.1], 12) * np.linspace(0.98, 1.02, 24)
    one = rows(workers=[1] * 24, vcpus=[1.0] * 24, memory_mb=[1024] * 24, wall_s=walls.tolist())
    found = WorkflowModel(WORKFLOW).fit(one)
    single = Option(1, Size(1, 1024))
    assert found.predict({"a": single, "b": single}).latency_s.p50 == pytest.approx(10.1, rel=0.05)
    with pytest.raises(NotEnoughObservations, match="only 1 was measured"):
        found.require_identified()


def test_a_stage_that_was_never_measured_is_named() -> None:
    half = WorkflowModel(WORKFLOW).fit({name: column[::2] for name, column in rows().items()})
    with pytest.raises(NotEnoughObservations, match="stage 'b' has 0"):
        make_plan(half, BOUND)


def test_what_cannot_be_met_says_what_can() -> None:
    with pytest.raises(InfeasibleSlo) as refused:
        make_plan(model(), Latency(0.5))
    nearest = refused.value.nearest
    assert nearest is not None
    assert make_plan(model(), Latency(nearest.bound)).certificate is not None
