"""What can't be is refused at once, by a typed error that names the field and shows the value."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from prefect_slo.constraint import Constraint
from prefect_slo.errors import SloError
from prefect_slo.observation import StageRuns
from prefect_slo.plan import Certificate, Plan, Prediction, Quantiles, StagePlan
from prefect_slo.resources import Capacity, Menu, Pool, Size
from prefect_slo.workflow import Edge, Stage, Workflow

NAN, INF = float("nan"), float("inf")
ONE = Quantiles(1, 1, 1, 1)
SIZE = {"vcpus": 1, "memory_mb": 1024}
ROWS = {"run_id": ["r"] * 3, "stage": ["a"] * 3, "workers": [1] * 3, "memory_mb": [1024] * 3, "wall_s": [1.0] * 3}

Case = tuple[Callable[[], object], str, str]


def workflow(**fields: Any) -> Callable[[], object]:
    return lambda: Workflow.from_document({"stages": [{"name": "a"}], **fields})


def stage(**fields: Any) -> Callable[[], object]:
    return workflow(stages=[{"name": "a"}, {"name": "b", **fields}])


def menu(**fields: Any) -> Callable[[], object]:
    return workflow(menu=fields)


def plan(**fields: Any) -> Callable[[], object]:
    return lambda: Plan.from_document({"schema": 1, "workflow": "w", "stages": {"a": SIZE}, **fields})


def planned(**fields: Any) -> Callable[[], object]:
    return plan(stages={"a": {**SIZE, **fields}})


def table(**columns: Any) -> Callable[[], object]:
    return lambda: StageRuns.from_table({**ROWS, **columns})


CERTIFICATE = {"lower_bound": 1, "gap": 0, "price_of_certainty": 0, "samples": 9, "violations": 0, "confidence": 0.99}
PREDICTED = {
    "latency_s": vars(ONE), "cost_usd": vars(ONE), "latency_at_percentile_s": 1, "cost_at_percentile_usd": 1
}  # fmt: skip

CASES: dict[str, Case] = {
    # workflow documents
    "no table": (lambda: Workflow.from_document([1]), "workflow", "[1]"),  # type: ignore[arg-type]
    "nothing": (lambda: Workflow.from_document(None), "workflow", "None"),  # type: ignore[arg-type]
    "unknown field": (workflow(stage=[]), "workflow.stage", "[]"),
    "stages missing": (lambda: Workflow.from_document({}), "stages", "None"),
    "stages a text": (workflow(stages="a"), "stages", "'a'"),
    "stages of numbers": (workflow(stages=[3]), "stages", "3"),
    "no stages": (workflow(stages=[]), "stages", "()"),
    "name a number": (workflow(name=3), "workflow.name", "3"),
    "name blank": (workflow(name=" "), "workflow.name", "' '"),
    "capacity a number": (workflow(capacity=8), "capacity", "8"),
    "capacity a text": (workflow(capacity={"vcpus": "8"}), "capacity.vcpus", "'8'"),
    "capacity 0": (workflow(capacity={"memory_mb": 0}), "capacity.memory_mb", "0"),
    "half a worker": (workflow(capacity={"workers": 2.5}), "capacity.workers", "2.5"),
    "capacity unknown": (workflow(capacity={"cores": 8}), "capacity.cores", "8"),
    "constraints a text": (workflow(constraints="a.workers <= 3"), "constraints", "'a.workers"),
    "constraint a number": (workflow(constraints=[3]), "constraint", "3"),
    "constraint nonsense": (workflow(constraints=["a < b"]), "constraint", "'a < b'"),
    "constraint two dots": (workflow(constraints=["a.workers <= 1.2.3"]), "constraint", "1.2.3"),
    "constraint mixed": (workflow(constraints=["a.workers <= a.vcpus"]), "constraint", "a.vcpus"),
    "constraint unknown stage": (workflow(constraints=["z.workers <= 3"]), "constraint", "z.workers"),
    "constraint endless": (workflow(constraints=["a." * 10**6]), "constraint", "'a.a.a."),
    "constraint op": (lambda: Constraint("a", "workers", "<", 3), "constraint.op", "'<'"),  # type: ignore[arg-type]
    "constraint what": (lambda: Constraint("a", "colour", "<=", 3), "constraint.what", "'colour'"),
    "constraint nan": (lambda: Constraint("a", "workers", "<=", NAN), "constraint.right", "nan"),
    # stages
    "stage unknown field": (stage(afer=["a"]), "stages.afer", "['a']"),
    "stage without name": (workflow(stages=[{}]), "stage.name", "None"),
    "stage name a number": (workflow(stages=[{"name": 3}]), "stage.name", "3"),
    "stage name blank": (workflow(stages=[{"name": ""}]), "stage.name", "''"),
    "stage twice": (workflow(stages=[{"name": "a"}, {"name": "a"}]), "stages", "'a'"),
    "parent unknown": (stage(after=["z"]), "b.after", "'z'"),
    "parent itself": (stage(after=["b"]), "stages", "'b -> b'"),
    "parent twice": (stage(after=["a"], after_items=["a"]), "b.after", "('a', 'a')"),
    "parents a text": (stage(after="a"), "b.after", "'a'"),
    "parents of numbers": (stage(after_items=[1]), "b.after_items", "1"),
    "fanout unknown": (stage(fanout="some"), "b.fanout", "'some'"),
    "fanout a list": (stage(fanout=[]), "b.fanout", "[]"),
    "items negative": (stage(items=-1), "b.items", "-1"),
    "items a text": (stage(items="9"), "b.items", "'9'"),
    "items true": (stage(items=True), "b.items", "True"),
    "probability 0": (stage(probability=0), "b.probability", "0"),
    "probability in percent": (stage(probability=50), "b.probability", "50"),
    "probability nan": (stage(probability=NAN), "b.probability", "nan"),
    "sequential a text": (stage(sequential="yes"), "b.sequential", "'yes'"),
    "opaque a number": (stage(opaque=1), "b.opaque", "1"),
    "menu a list": (stage(menu=[1]), "b.menu", "[1]"),
    "cycle": (
        workflow(stages=[{"name": "a", "after": ["b"]}, {"name": "b", "after": ["a"]}]), "stages", "a -> b"
    ),
    "edge of another kind": (lambda: Stage("b", (Edge("a", "some"),)), "b.after.a", "'some'"),  # type: ignore[arg-type]
    "edge a text": (lambda: Stage("b", ("a",)), "b.after", "'a'"),  # type: ignore[arg-type]
    "stage menu a dict": (lambda: Stage("b", menu={}), "b.menu", "{}"),  # type: ignore[arg-type]
    "workflow of texts": (lambda: Workflow("w", ("a",)), "stages", "'a'"),  # type: ignore[arg-type]
    "capacity a dict": (lambda: Workflow("w", (Stage("a"),), (), {}), "capacity", "{}"),  # type: ignore[arg-type]
    # menus
    "menu a text": (workflow(menu="local"), "menu", "'local'"),
    "menu unknown field": (menu(worker=[1]), "menu.worker", "[1]"),
    "workers a text": (menu(workers="8"), "menu.workers", "'8'"),
    "workers a number": (menu(workers=8), "menu.workers", "8"),
    "workers of texts": (menu(workers=["8"]), "menu.workers", "'8'"),
    "workers of none": (menu(workers=[None]), "menu.workers", "None"),
    "workers nested": (menu(workers=[[8]]), "menu.workers", "[8]"),
    "workers true": (menu(workers=[True]), "menu.workers", "True"),
    "workers 0": (menu(workers=[0]), "menu.workers", "0"),
    "workers past floats": (menu(workers=[10**400]), "menu.workers", "1000"),
    "no workers": (menu(workers=[]), "menu.workers", "()"),
    "no batch": (menu(batch=[]), "menu.batch", "()"),
    "batch half": (menu(batch=[0.5]), "menu.batch", "0.5"),
    "no sizes": (menu(sizes=[]), "menu.sizes", "()"),
    "no memory": (menu(memory_mb=[]), "menu.memory_mb", "()"),
    "memory negative": (menu(memory_mb=[-512]), "menu.memory_mb", "-512"),
    "memory a text": (menu(memory_mb=["1GB"]), "menu.memory_mb", "'1GB'"),
    "vcpus inf": (menu(vcpus=[INF]), "menu.vcpus", "inf"),
    "size of one number": (menu(sizes=[4]), "menu.sizes", "4"),
    "size unknown field": (menu(sizes=[{"cores": 4}]), "menu.sizes.cores", "4"),
    "size vcpus none": (menu(sizes=[{"vcpus": None}]), "size.vcpus", "None"),
    "size memory nan": (menu(sizes=[{"memory_mb": NAN}]), "size.memory_mb", "nan"),
    "size gpu negative": (menu(sizes=[{"gpu": -1}]), "size.gpu", "-1"),
    "size hardware a number": (menu(sizes=[{"hardware": 3}]), "size.hardware", "3"),
    "prices unknown": (menu(prices="moon"), "menu.prices", "'moon'"),
    "prices a list": (menu(prices=["local"]), "menu.prices", "['local']"),
    "hardware none": (menu(hardware=None), "menu.hardware", "None"),
    "pools a text": (menu(pools="gpu"), "menu.pools", "'gpu'"),
    "no pools": (menu(pools=[]), "menu.pools", "()"),
    "pool a number": (menu(pools=[3]), "menu.pools", "3"),
    "pool without name": (menu(pools=[{}]), "menu.pools.name", "None"),
    "pool blank": (menu(pools=[""]), "pool.name", "''"),
    "pool twice": (menu(pools=["a", "a"]), "menu.pools", "('a', 'a')"),
    "pool prices unknown": (menu(pools=[{"name": "a", "prices": "moon"}]), "menu.prices", "'moon'"),
    "pool size junk": (lambda: Pool("a", (4,)), "pool.a.sizes", "4"),  # type: ignore[arg-type]
    "knobs a list": (menu(knobs=[1]), "menu.knobs", "[1]"),
    "knob a number": (menu(knobs={"k": 1}), "menu.knobs.k", "1"),
    "knob without values": (menu(knobs={"k": []}), "menu.knobs.k", "[]"),
    "knob of lists": (menu(knobs={"k": [[1]]}), "menu.knobs.k", "[1]"),
    "knob nan": (menu(knobs={"k": [NAN]}), "menu.knobs.k", "nan"),
    "knob named workers": (menu(knobs={"workers": [1]}), "menu.knobs", "'workers'"),
    "menu of sizes as texts": (lambda: Menu(sizes=("large",)), "menu.sizes", "'large'"),  # type: ignore[arg-type]
    "capacity nan": (lambda: Capacity(gpu=NAN), "capacity.gpu", "nan"),
    # plans
    "plan no JSON": (lambda: Plan.from_json("{"), "plan", "'{'"),
    "plan None": (lambda: Plan.from_json(None), "plan", "None"),  # type: ignore[arg-type]
    "plan deep": (lambda: Plan.from_json("[" * 10**5), "plan", "'[[["),
    "plan a list": (lambda: Plan.from_json("[]"), "plan", "[]"),
    "plan of the future": (plan(schema=99), "plan.schema", "99"),
    "plan without stages": (lambda: Plan.from_document({"schema": 1, "workflow": "w"}), "plan.stages", "None"),
    "plan unknown field": (plan(colour="red"), "plan.colour", "'red'"),
    "plan workflow a number": (plan(workflow=3), "plan.workflow", "3"),
    "plan stages a list": (plan(stages=[1]), "plan.stages", "[1]"),
    "plan stage a number": (plan(stages={"a": 3}), "plan.stages.a", "3"),
    "plan stage without size": (plan(stages={"a": {"workers": 3}}), "plan.stages.a.vcpus", "None"),
    "plan stage unknown field": (planned(worker=3), "plan.stages.a.worker", "3"),
    "plan workers a text": (planned(workers="8"), "plan.workers", "'8'"),
    "plan workers 0": (planned(workers=0), "plan.workers", "0"),
    "plan batch none": (planned(batch=None), "plan.batch", "None"),
    "plan bundle 0": (planned(bundle=0), "plan.bundle", "0"),
    "plan record unknown": (planned(record="some"), "plan.record", "'some'"),
    "plan record a list": (planned(record=[]), "plan.record", "[]"),
    "plan pool a number": (planned(pool=3), "plan.pool", "3"),
    "plan knobs a list": (planned(knobs=[1]), "plan.stages.a.knobs", "[1]"),
    "plan knob a list": (planned(knobs={"k": [1]}), "plan.knobs.k", "[1]"),
    "plan size nan": (planned(vcpus=NAN), "size.vcpus", "nan"),
    "plan seed negative": (plan(seed=-1), "plan.seed", "-1"),
    "plan seed a text": (plan(seed="0"), "plan.seed", "'0'"),
    "objective a number": (plan(objective=30), "plan.objective", "30"),
    "objective empty": (plan(objective={"percentile": 0.95, "confidence": 0.99}), "slo", "None"),
    "objective 0 s": (plan(objective={"latency_s": 0, "percentile": 0.95, "confidence": 0.99}), "latency", "0"),
    "objective percent": (plan(objective={"latency_s": 9, "percentile": 95, "confidence": 0.99}), "percentile", "95"),
    "predicted a list": (plan(predicted=[1]), "plan.predicted", "[1]"),
    "predicted without cost": (plan(predicted={"latency_s": vars(ONE)}), "plan.predicted.cost_usd", "None"),
    "predicted nan": (plan(predicted={**PREDICTED, "cost_usd": {**vars(ONE), "p95": NAN}}), "predicted.p95", "nan"),
    "certificate unknown field": (plan(certificate={**CERTIFICATE, "sure": 1}), "plan.certificate.sure", "1"),
    "certificate a text": (plan(certificate={**CERTIFICATE, "gap": "0"}), "certificate.gap", "'0'"),
    "certificate half a sample": (plan(certificate={**CERTIFICATE, "samples": 0.5}), "certificate.samples", "0.5"),
    "certificate below 0": (lambda: Certificate(1, 0, 0, 9, -1, 0.99), "certificate.violations", "-1"),
    "prediction of a number": (lambda: Prediction(1, ONE, 1, 1), "predicted.latency_s", "1"),  # type: ignore[arg-type]
    "stage plan size a dict": (lambda: StagePlan(size={}), "plan.size", "{}"),  # type: ignore[arg-type]
    "stage plan knobs": (lambda: StagePlan(knobs=("k",)), "plan.knobs", "'k'"),  # type: ignore[arg-type]
    "plan stages of dicts": (lambda: Plan("w", None, {"a": {}}), "plan.stages.a", "{}"),  # type: ignore[dict-item]
    "plan objective a bound": (lambda: Plan("w", 30, {}), "plan.objective", "30"),  # type: ignore[arg-type]
    # stage-run tables
    "table a list": (lambda: StageRuns.from_table([1]), "table", "[1]"),
    "table None": (lambda: StageRuns.from_table(None), "table", "None"),
    "column missing": (lambda: StageRuns.from_table({"stage": ["a"]}), "column", "'run_id'"),
    "size missing": (
        lambda: StageRuns.from_table({k: v for k, v in ROWS.items() if k != "memory_mb"}), "column", "'memory_mb'"
    ),
    "wall nan": (table(wall_s=[1.0, NAN, 1.0]), "wall_s (row 1)", "nan"),
    "wall inf": (table(wall_s=[1.0, 1.0, INF]), "wall_s (row 2)", "inf"),
    "wall negative": (table(wall_s=[-1, 1, 1]), "wall_s (row 0)", "-1.0"),
    "wall 0": (table(wall_s=[1, 0, 1]), "wall_s (row 1)", "0.0"),
    "wall a text": (table(wall_s=[1, "fast", 1]), "wall_s (row 1)", "'fast'"),
    "wall true": (table(wall_s=[True, True, False]), "wall_s (row 0)", "True"),
    "wall a list": (table(wall_s=[1, [2], 1]), "wall_s", "[1, [2], 1]"),
    "wall one number": (table(wall_s=3.0), "wall_s", "3.0"),
    "wall durations": (table(wall_s=pd.to_timedelta([1, 2, 3], unit="s")), "wall_s (row 0)", ""),
    "wall too short": (table(wall_s=[1.0]), "wall_s", "1 rows"),
    "extra too long": (table(note=["x"] * 9), "note", "9 rows"),
    "extra ragged": (table(note=[[1], [2, 3], 4]), "note", "[[1], [2, 3], 4]"),
    "workers nan": (table(workers=[1, NAN, 1]), "workers (row 1)", "nan"),
    "workers half": (table(workers=[1, 1.5, 1]), "workers (row 1)", "1.5"),
    "workers zero": (table(workers=[1, 1, 0]), "workers (row 2)", "0"),
    "workers past ints": (table(workers=[1, 1e300, 1]), "workers (row 1)", "1e+300"),
    "items negative ": (table(items=[0, -3, 0]), "items (row 1)", "-3"),
    "cost negative": (table(cost_usd=[0, 0, -0.1]), "cost_usd (row 2)", "-0.1"),
    "overhead inf": (table(overhead_s=[0, INF, 0]), "overhead_s (row 1)", "inf"),
    "started inf": (table(started_at=[0, INF, 0]), "started_at (row 1)", "inf"),
    "cold maybe": (table(cold=[0, "maybe", 1]), "cold (row 1)", "'maybe'"),
    "cold 2": (table(cold=[0, 2, 1]), "cold (row 1)", "2"),
    "stage empty": (table(stage=["a", None, "a"]), "stage (row 1)", "None"),
    "stage nan": (table(stage=["a", "a", NAN]), "stage (row 2)", "nan"),
    "run blank": (table(run_id=["r", " ", "r"]), "run_id (row 1)", "' '"),
    "memory 0": (table(memory_mb=[1024, 0, 1024]), "memory_mb (row 1)", "0.0"),
    "both sizes empty": (table(memory_mb=[1, None, 1]), "memory_mb (row 1)", "nan"),
    "tie 0": (lambda: StageRuns.from_table(ROWS, mb_per_vcpu=0), "mb_per_vcpu", "0"),
    "size from a text": (lambda: Size("4", 1024), "size.vcpus", "'4'"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize(("make", "field", "value"), CASES.values(), ids=CASES.keys())
def test_bad_input_is_refused_at_once_by_field_and_value(make: Callable[[], object], field: str, value: str) -> None:
    started = time.thread_time()
    with pytest.raises(SloError) as refused:
        make()
    spent_s = time.thread_time() - started
    message = str(refused.value)
    assert message.startswith(f"{field} is "), message
    assert value in message.split("; expected ")[0], message
    assert len(message) < 500
    assert spent_s < 0.1  # CPU time: a user's typo must not cost a parse of everything


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 150
