"""The workflow model end to end: tables, predictions, documents, updates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from prefect_slo.errors import InvalidObservation, InvalidValue, NotEnoughObservations, UnknownStage
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency, Slo
from prefect_slo.observation import StageRuns
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.planner.sampling import Sampler
from prefect_slo.resources import Menu, Option, Size
from prefect_slo.simulate import SIMULATED
from prefect_slo.workflow import Edge, Stage, Workflow, chain

Build = Callable[..., dict[str, list[object]]]


def _plan(workflow: Workflow, workers: int = 4, vcpus: float = 2.0) -> dict[str, Option]:
    return {stage.name: Option(workers, Size(vcpus, int(1024 * vcpus))) for stage in workflow.stages}


def test_a_table_fits_the_same_as_pandas_mapping_or_stage_runs(diamond: Workflow, table: Build) -> None:
    rows = table(diamond)
    models = [WorkflowModel(diamond).fit(form) for form in (rows, pd.DataFrame(rows), StageRuns.from_table(rows))]
    predictions = [model.predict(_plan(diamond), n_samples=500) for model in models]
    assert predictions[0] == predictions[1] == predictions[2]


def test_the_prediction_is_near_the_truth(diamond: Workflow, table: Build, truth: Callable[..., np.ndarray]) -> None:
    model = WorkflowModel(diamond).fit(table(diamond, repeats=4))
    predicted = model.predict(_plan(diamond))
    one = float(truth(np.array(4), np.array(2.0)))
    rate = 4 * (2 * 0.000011244 + 2 * 0.0000012347)
    assert predicted.latency_s.p50 == pytest.approx(3 * one, rel=0.04)
    assert predicted.cost_usd.mean == pytest.approx(4 * one * rate, rel=0.04)
    assert predicted.latency_s.p50 < predicted.latency_s.p95 < predicted.latency_s.p99


def test_a_plan_predicts_at_its_own_percentile(diamond: Workflow, table: Build) -> None:
    model = WorkflowModel(diamond).fit(table(diamond))
    stages = {name: StagePlan.of(option) for name, option in _plan(diamond).items()}
    plan = Plan("diamond", Slo(latency=Latency(30.0, percentile=0.5)), stages)
    predicted = model.predict(plan)
    assert predicted.latency_at_percentile_s == predicted.latency_s.p50
    assert predicted.samples.latency_s.shape == (20_000,)


def test_tables_hold_every_option_and_agree_with_the_plan(diamond: Workflow, table: Build) -> None:
    model = WorkflowModel(diamond).fit(table(diamond))
    tables = model.tables(8000, np.random.default_rng(0))
    for name in diamond.order:
        entry = tables[name]
        assert entry.options == diamond[name].menu.options()
        assert entry.latency_s.shape == entry.cost_usd.shape == (len(entry.upstream), 16, 8000)
        assert entry.latency_s.dtype == np.float32
    at = tables["join"].options.index(Option(4, Size(2.0, 2048)))
    drawn = tables["join"].latency_s[tables["join"].at(8), at]
    alone = model.stage_time("join", workers=4, memory_mb=2048, upstream=8)
    assert float(np.quantile(drawn, 0.95)) == pytest.approx(alone.quantile(0.95), rel=0.03)
    assert float(drawn.mean()) == pytest.approx(alone.mean, rel=0.03)


def test_stages_draw_independently(diamond: Workflow, table: Build) -> None:
    tables = WorkflowModel(diamond).fit(table(diamond)).tables(4000, np.random.default_rng(0))
    left, right = (tables[name].latency_s[0, 5] for name in ("left", "right"))
    assert abs(np.corrcoef(left, right)[0, 1]) < 0.06


def test_renaming_stages_changes_no_draw(diamond: Workflow, table: Build) -> None:
    rows = table(diamond)
    new = {"load": "z", "left": "y", "right": "x", "join": "a"}
    renamed = replace(
        diamond,
        stages=tuple(
            replace(s, name=new[s.name], after=tuple(Edge(new[e.parent], e.kind) for e in s.after))
            for s in diamond.stages
        ),
    )
    rows_renamed = {**rows, "stage": [new[str(name)] for name in rows["stage"]]}
    before = WorkflowModel(diamond).fit(rows).tables(100, np.random.default_rng(5))
    after = WorkflowModel(renamed).fit(rows_renamed).tables(100, np.random.default_rng(5))
    for old, name in new.items():
        np.testing.assert_array_equal(before[old].latency_s, after[name].latency_s)
        np.testing.assert_array_equal(before[old].cost_usd, after[name].cost_usd)


def test_a_document_round_trips_to_identical_predictions(diamond: Workflow, table: Build) -> None:
    model = WorkflowModel(diamond).fit(table(diamond), {"run-0000": 200.0, "run-0001": 150.0})
    document = json.loads(json.dumps(model.to_document()))
    again = WorkflowModel.from_document(diamond, document)
    assert again.predict(_plan(diamond)) == model.predict(_plan(diamond))
    assert again.to_document() == model.to_document()
    assert len(json.dumps(document)) < 30_000


def test_an_update_equals_a_fit_on_all_rows(diamond: Workflow, table: Build) -> None:
    old, new = table(diamond, repeats=4), table(diamond, repeats=3, seed=1, start=500)
    both = {name: [*old[name], *new[name]] for name in old}
    updated = WorkflowModel(diamond, half_life_runs=20).fit(old).update(new)
    fitted = WorkflowModel(diamond, half_life_runs=20).fit(both)
    assert updated.predict(_plan(diamond)) == fitted.predict(_plan(diamond))


def test_old_runs_are_forgotten(diamond: Workflow, table: Build) -> None:
    old, new = table(diamond, repeats=4), table(diamond, repeats=4, seed=1, start=500)
    new["wall_s"] = [2.0 * float(w) for w in new["wall_s"]]  # type: ignore[arg-type]
    fresh = WorkflowModel(diamond).fit(new).stage_time("left", workers=2, vcpus=1.0).mean
    for half_life, tolerance in ((8.0, 0.12), (None, 0.5)):
        model = WorkflowModel(diamond, half_life_runs=half_life).fit(old).update(new)
        error = abs(model.stage_time("left", workers=2, vcpus=1.0).mean / fresh - 1)
        assert error < tolerance
    assert error > 0.12


def test_copies_of_the_table_do_not_shrink_p95(diamond: Workflow, table: Build) -> None:
    rows = table(diamond)
    copies = {
        name: [f"{value}-copy{k}" if name == "run_id" else value for k in range(5) for value in values]
        for name, values in rows.items()
    }
    once, often = (WorkflowModel(diamond).fit(form).predict(_plan(diamond)) for form in (rows, copies))
    assert often.latency_s.p95 >= once.latency_s.p95 * 0.999


def test_scaling_every_price_scales_cost_alone(table: Build, tmp_path: Any) -> None:
    path = tmp_path / "double.toml"
    path.write_text('name = "double"\nvcpu_second = 0.000022488\ngb_second = 0.0000024694\n')
    sizes = tuple(Size(v, int(1024 * v)) for v in (0.5, 1.0, 2.0, 4.0))
    predictions = []
    for prices in ("local", str(path)):
        workflow = Workflow("one", (Stage("a", menu=Menu(prices, (1, 2, 4, 8), sizes)),))
        predictions.append(WorkflowModel(workflow).fit(table(workflow)).predict(_plan(workflow)))
    assert predictions[1].latency_s == predictions[0].latency_s
    assert predictions[1].cost_usd.mean == pytest.approx(2 * predictions[0].cost_usd.mean, rel=1e-5)


def test_a_function_service_bills_busy_time_and_requests(table: Build) -> None:
    workflow = Workflow("one", (Stage("a", menu=Menu("aws-lambda-x86", (4,), (Size(2.0, 2048),))),))
    model = WorkflowModel(workflow).fit(table(workflow))
    busy = model.busy_time("a", workers=4, vcpus=2.0).mean
    expected = 4 * (busy * 2 * 0.0000166667 + 2e-7)
    assert model.predict(_plan(workflow)).cost_usd.mean == pytest.approx(expected, rel=0.01)


def test_the_driver_is_what_runs_take_beyond_their_path(diamond: Workflow, table: Build) -> None:
    rows = table(diamond)
    walls: dict[str, dict[str, float]] = {}
    for run, stage, wall in zip(rows["run_id"], rows["stage"], rows["wall_s"], strict=True):
        walls.setdefault(str(run), {})[str(stage)] = float(wall)  # type: ignore[arg-type]
    latency = {
        run: times["load"] + max(times["left"], times["right"]) + times["join"] + 5.0 + 0.01 * k
        for k, (run, times) in enumerate(walls.items())
    }
    without, with_driver = WorkflowModel(diamond).fit(rows), WorkflowModel(diamond).fit(rows, latency)
    gap = with_driver.predict(_plan(diamond)).latency_s.mean - without.predict(_plan(diamond)).latency_s.mean
    assert gap == pytest.approx(5.155, abs=0.02)
    assert with_driver.tables(50, np.random.default_rng(0)).driver_s.min() > 4.5


def test_a_prediction_draws_what_no_search_has_seen(diamond: Workflow, table: Build) -> None:
    class Watched(WorkflowModel):
        def sample_plan(self, plan: Any, n_samples: int, rng: np.random.Generator, **more: Any) -> Any:
            self.first = np.random.default_rng(rng.bit_generator.seed_seq).random()
            return super().sample_plan(plan, n_samples, rng, **more)

    model = Watched(diamond).fit(table(diamond))
    model.predict(_plan(diamond), n_samples=10, seed=5)
    sampler = Sampler(model, 5)
    streams = [sampler._stream(use, attempt) for use in range(3) for attempt in range(3)]
    simulated = np.random.default_rng(np.random.SeedSequence([5, *SIMULATED]))
    assert model.first not in [float(stream.random()) for stream in (*streams, simulated)]


def test_cold_runs_cost_what_cold_rows_showed(diamond: Workflow, table: Build) -> None:
    rows = table(diamond, sigma=0.01)
    chilled = {name: list(values) for name, values in rows.items()}
    chilled["run_id"] = [f"cold-{run}" for run in rows["run_id"]]
    chilled["wall_s"] = [float(wall) + 3.0 for wall in rows["wall_s"]]  # type: ignore[arg-type]
    both = {name: [*rows[name], *chilled[name]] for name in rows}
    both["cold"] = [False] * len(rows["run_id"]) + [True] * len(rows["run_id"])
    model = WorkflowModel(diamond).fit(both)
    warm, cold = (model.predict(_plan(diamond), cold=share).latency_s.mean for share in (False, True))
    half = model.predict(_plan(diamond), cold=0.5).latency_s.mean
    assert warm == pytest.approx(WorkflowModel(diamond).fit(rows).predict(_plan(diamond)).latency_s.mean, rel=0.01)
    assert cold - warm == pytest.approx(9.0, abs=0.5)
    assert half == pytest.approx((warm + cold) / 2, rel=0.02)


def test_a_branch_costs_as_often_as_it_is_taken(menu: Menu, table: Build) -> None:
    workflow = Workflow("two", (Stage("a", menu=menu), Stage("b", (Edge("a"),), menu, probability=0.5)))
    rows = table(workflow, repeats=8)
    keep = [
        stage == "a" or int(str(run)[-4:]) % 4 == 0 for run, stage in zip(rows["run_id"], rows["stage"], strict=True)
    ]
    rows = {name: [value for value, k in zip(values, keep, strict=True) if k] for name, values in rows.items()}
    tables = WorkflowModel(workflow).fit(rows).tables(8000, np.random.default_rng(0))
    assert tables.ran["a"].all()
    assert tables.ran["b"].mean() == pytest.approx(0.254, abs=0.02)
    skipped = ~tables.ran["b"]
    assert (tables["b"].latency_s[..., skipped] == 0).all()
    assert (tables["b"].cost_usd[..., skipped] == 0).all()
    assert (tables["b"].latency_s[..., ~skipped] > 0).all()


def test_hardware_gets_a_model_of_its_own(table: Build) -> None:
    sizes = (Size(1, 1024), Size(1, 1024, gpu=1.0, hardware="gpu"), Size(1, 1024, hardware="tpu"))
    workflow = Workflow("one", (Stage("a", menu=Menu(workers=(1, 2, 4, 8), sizes=sizes)),))
    rows = table(workflow)
    fast = {**rows, "run_id": [f"gpu-{r}" for r in rows["run_id"]], "wall_s": [float(w) / 10 for w in rows["wall_s"]],
            "overhead_s": [0.0] * len(rows["run_id"])}  # type: ignore[arg-type]  # fmt: skip
    both = {name: [*rows[name], *fast[name]] for name in rows}
    both["hardware"] = ["cpu"] * len(rows["run_id"]) + ["gpu"] * len(rows["run_id"])
    model = WorkflowModel(workflow).fit(both)
    cpu, gpu = (model.stage_time("a", workers=2, vcpus=1.0, hardware=h).mean for h in ("cpu", "gpu"))
    assert cpu / gpu == pytest.approx(10, rel=0.05)
    known = model.tables(10, np.random.default_rng(0))["a"].options
    assert {option.size.hardware for option in known} == {"cpu", "gpu"}
    with pytest.raises(NotEnoughObservations, match="hardware"):
        model.stage_time("a", workers=2, vcpus=1.0, hardware="tpu")


def test_knobs_are_menu_dimensions() -> None:
    menu = Menu(workers=(1, 2, 4, 8), sizes=(Size(1, 1024),), knobs={"resolution": (480, 720, 1080)})
    workflow = Workflow("one", (Stage("a", menu=menu),))
    settings = [(d, r) for _ in range(3) for d in (1, 2, 4, 8) for r in (480, 720)]
    rng = np.random.default_rng(0)
    rows = {
        "run_id": [f"r{k}" for k in range(len(settings))],
        "stage": ["a"] * len(settings),
        "workers": [d for d, _ in settings],
        "vcpus": [1.0] * len(settings),
        "resolution": [r for _, r in settings],
        "wall_s": [(1 + 6 / d) * (r / 480) ** 2 * float(np.exp(0.02 * rng.standard_normal())) for d, r in settings],
    }
    model = WorkflowModel(workflow).fit(rows)
    slow, fast = (model.stage_time("a", workers=2, vcpus=1.0, knobs={"resolution": r}).mean for r in (720, 480))
    assert slow / fast == pytest.approx(2.25, rel=0.05)
    assert {dict(o.knobs)["resolution"] for o in model.tables(5, np.random.default_rng(0))["a"].options} == {480, 720}


def test_fan_out_is_a_random_variable(table: Build) -> None:
    menu = Menu(workers=(1, 2, 4, 8), sizes=tuple(Size(v, int(1024 * v)) for v in (0.5, 1.0, 2.0, 4.0)))
    workflow = Workflow("one", (Stage("a", menu=menu, fanout="given"),))
    rows = table(workflow, repeats=4)
    items = [16 if k % 3 else 64 for k in range(len(rows["run_id"]))]
    rng = np.random.default_rng(0)
    wall = [
        0.5 + -(-n // d) * (0.2 + 1.0 / v) * float(np.exp(0.03 * rng.standard_normal()))  # type: ignore[operator]
        for n, d, v in zip(items, rows["workers"], rows["vcpus"], strict=True)
    ]
    model = WorkflowModel(workflow).fit({**rows, "items": items, "wall_s": wall, "overhead_s": [0.3] * len(wall)})
    for n in (16, 64, 128):
        expected = 0.5 + -(-n // 4) * 0.7
        assert model.stage_time("a", workers=4, vcpus=2.0, items=n).mean == pytest.approx(expected, rel=0.06)
    spread = model.stage_time("a", workers=4, vcpus=2.0)
    assert spread.quantile(0.9) / spread.quantile(0.3) > 3


def test_identification_says_what_is_missing(diamond: Workflow, table: Build) -> None:
    rows = table(diamond)
    model = WorkflowModel(diamond).fit(rows)
    assert model.identified("left")
    model.require_identified()
    one_setting = {
        name: [v for v, d in zip(values, rows["workers"], strict=True) if d == 4] for name, values in rows.items()
    }
    verdict = WorkflowModel(diamond).fit(one_setting).identified("left")
    assert not verdict
    assert "workers" in verdict.reason
    nothing = {
        name: [v for v, s in zip(values, rows["stage"], strict=True) if s == "load"] for name, values in rows.items()
    }
    blank = WorkflowModel(diamond).fit(nothing)
    assert blank.identified("join").have == 0
    with pytest.raises(NotEnoughObservations, match="left"):
        blank.tables(10, np.random.default_rng(0))
    with pytest.raises(NotEnoughObservations, match="left"):
        blank.require_identified()


def _local_rows(seed: int, sigma: float) -> dict[str, list[object]]:
    """Six runs of two single-item stages: three sizes, twice."""
    rng = np.random.default_rng(seed)
    names = ("run_id", "stage", "workers", "vcpus", "memory_mb", "wall_s", "items")
    rows: dict[str, list[object]] = {name: [] for name in names}
    for k, v in enumerate((0.5, 1.0, 2.0) * 2):
        for stage in ("fetch", "score"):
            wall = (0.4 + 1.0 / v) * float(np.exp(sigma * rng.standard_normal()))
            for name, value in zip(names, (f"r{k}", stage, 1, v, 1024, wall, 1), strict=True):
                rows[name].append(value)
    return rows


def test_few_rows_of_local_runs_give_a_sane_and_cautious_model() -> None:
    sizes = tuple(Size(v, 1024) for v in (0.5, 1.0, 2.0))
    workflow = Workflow("local", chain("fetch", "score", menu=Menu(workers=(1,), sizes=sizes)))
    fresh = 1.4 * np.exp(0.05 * np.random.default_rng(9).standard_normal(4000))
    met = []
    for seed in range(25):
        time = WorkflowModel(workflow).fit(_local_rows(seed, 0.05)).stage_time("score", vcpus=1.0)
        assert time.mean == pytest.approx(1.4, rel=0.15)
        assert time.quantile(0.95) < 1.4 * 2
        met.append(np.mean(fresh <= time.quantile(0.95)))
    assert np.mean(met) >= 0.95


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"stage": ["nowhere"]}, UnknownStage),
        ({"wall_s": [-1.0]}, InvalidObservation),
        ({"wall_s": [float("nan")]}, InvalidObservation),
        ({"workers": [0]}, InvalidObservation),
        ({"vcpus": [float("inf")]}, InvalidObservation),
        ({"items": [-3]}, InvalidObservation),
    ],
)
def test_bad_rows_are_refused(change: dict[str, list[object]], error: type[Exception]) -> None:
    workflow = Workflow("one", (Stage("a"),))
    row: dict[str, list[object]] = {"run_id": ["r"], "stage": ["a"], "workers": [1], "vcpus": [1.0], "wall_s": [1.0]}
    with pytest.raises(error):
        WorkflowModel(workflow).fit({**row, **change})


def test_bad_settings_are_refused(diamond: Workflow, table: Build) -> None:
    rows = table(diamond)
    with pytest.raises(InvalidValue, match="kind"):
        WorkflowModel(diamond, kind="magic").fit(rows)
    with pytest.raises(InvalidObservation, match="table"):
        WorkflowModel(diamond).fit(17)
    with pytest.raises(InvalidObservation, match="row"):
        WorkflowModel(diamond).fit({name: [] for name in rows})
    model = WorkflowModel(diamond).fit(rows)
    with pytest.raises(UnknownStage):
        model.stage_time("nowhere", workers=1, vcpus=1.0)
    with pytest.raises(UnknownStage):
        model.predict({"load": Option(1, Size(1, 1024))})
    with pytest.raises(InvalidValue, match="memory_mb"):
        model.stage_time("left", workers=2)
    for bad in ({"cold": 2.0}, {"cold": -0.1}):
        with pytest.raises(InvalidValue, match="cold"):
            model.tables(5, np.random.default_rng(0), **bad)
    with pytest.raises(InvalidValue, match="n_samples"):
        model.tables(0, np.random.default_rng(0))
    with pytest.raises(InvalidValue, match="blocks"):
        model.sample_plan(_plan(diamond), 101, np.random.default_rng(0), blocks=10)
    with pytest.raises(InvalidValue, match="upstream"):
        model.stage_time("left", workers=1, vcpus=1.0, upstream=-5)
    with pytest.raises(InvalidValue, match="half_life_runs"):
        WorkflowModel(diamond, half_life_runs=0).fit(rows)
    with pytest.raises(InvalidValue, match="schema"):
        WorkflowModel.from_document(diamond, {**model.to_document(), "schema": 99})


def test_too_little_memory_is_not_on_offer() -> None:
    sizes = tuple(Size(1.0, memory) for memory in (512, 1024, 2048))
    workflow = Workflow("one", (Stage("a", menu=Menu(workers=(1, 2), sizes=sizes)),))
    rows = {
        "run_id": [f"r{k}" for k in range(8)],
        "stage": ["a"] * 8,
        "workers": [1, 2] * 4,
        "vcpus": [1.0] * 8,
        "memory_mb": [2048] * 8,
        "wall_s": [2.0 + 0.01 * k for k in range(8)],
        "peak_memory_mb": [700.0] * 8,
    }
    model = WorkflowModel(workflow).fit(rows)
    assert 700 < model.memory_needed("a") < 1024
    assert {o.memory_mb for o in model.tables(5, np.random.default_rng(0))["a"].options} == {1024, 2048}


def test_blocks_of_a_plan_vary_as_little_is_known(diamond: Workflow, table: Build) -> None:
    few, many = (WorkflowModel(diamond).fit(table(diamond, repeats=n, sigma=0.1)) for n in (2, 8))
    spreads = []
    for model in (few, many):
        latency = model.sample_plan(_plan(diamond), 20_000, np.random.default_rng(0), blocks=100).latency_s
        spreads.append(np.std(np.quantile(latency.reshape(100, 200), 0.5, axis=1)))
    assert spreads[0] > 1.3 * spreads[1]
