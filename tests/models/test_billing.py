"""Costs where a service bills every invocation: what is predicted is the mean of the bills, on every setting."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from math import ceil
from typing import Any

import numpy as np
import pytest

from prefect_slo.aws.report import bill
from prefect_slo.models import WorkflowModel
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.pricing import price_list
from prefect_slo.resources import Menu, Option, Size
from prefect_slo.workflow import Stage, Workflow

PRICES = price_list("aws-lambda-x86")
SIZES = tuple(Size(mb / 1769, mb, hardware="lambda") for mb in (256, 512, 1024, 1769))
Runs = Callable[..., list[StageRun]]


def workflow(items: int, **menu: Any) -> Workflow:
    return Workflow("one", (Stage("a", menu=Menu("aws-lambda-x86", (1, 2, 4), SIZES, **menu), items=items),))


def run(number: int, option: Option, items: int, calls: int, rng: np.random.Generator, *, item_s: float) -> StageRun:
    """One run as the backend measures it: every invocation is billed in whole milliseconds, and in 4 ms of overhead."""
    per_call = items / calls
    took = (
        per_call * item_s / option.size.vcpus * np.exp(0.03 * rng.standard_normal() + 0.02 * rng.standard_normal(calls))
    )
    billed_ms = np.ceil(1000 * (0.003 + took)).astype(int)
    usd = sum((bill(PRICES, option.memory_mb, int(ms)) for ms in billed_ms), Decimal())
    waves = [took[worker :: option.workers].sum() for worker in range(option.workers)]
    wall = max(waves) + 0.004 * ceil(calls / option.workers)
    return StageRun(
        f"r{number:04d}",
        "a",
        option.workers,
        option.memory_mb,
        option.size.vcpus,
        wall,
        overhead_s=wall - float(np.mean(waves)),
        items=items,
        batch=option.batch,
        hardware="lambda",
        started_at=1.7e9 + number,
        cost_usd=float(usd),
        requests=calls,
        billed_s=float(billed_ms.sum()) / 1000,
    )


def learned(items: int, calls: Callable[[Option], int], *, item_s: float, **menu: Any) -> WorkflowModel:
    flow, rng = workflow(items, **menu), np.random.default_rng(1)
    options = [option for option in flow["a"].menu.options() for _ in range(6)]
    rows = [run(k, option, items, calls(option), rng, item_s=item_s) for k, option in enumerate(options)]
    return WorkflowModel(flow).fit(StageRuns.of(rows))


@pytest.mark.parametrize("at", [Option(1, SIZES[0]), Option(4, SIZES[1]), Option(2, SIZES[3])])
def test_the_predicted_mean_is_the_mean_of_bills(at: Option) -> None:
    """Twelve short calls, an invocation each: requests and rounding are a third of the bill here."""
    model, rng = learned(12, lambda _: 12, item_s=0.002), np.random.default_rng(2)
    bills = [run(k, at, 12, 12, rng, item_s=0.002).cost_usd for k in range(400)]
    assert model.predict({"a": at}).cost_usd.mean == pytest.approx(np.mean(bills), rel=0.02)


def test_counting_workers_instead_of_invocations_would_miss_the_bill() -> None:
    at, model = Option(2, SIZES[0]), learned(12, lambda _: 12, item_s=0.002)
    requests = 12 * PRICES.request
    assert requests > 0.2 * model.predict({"a": at}).cost_usd.mean
    assert model.predict({"a": at}).cost_usd.mean > requests + 12 * 0.015 * PRICES.rate(0, 256)


@pytest.mark.parametrize("workers", [1, 4])
def test_calls_that_travel_together_are_one_request(workers: int) -> None:
    """400 tiny calls: a plan bundles them, so that a run makes a few dozen invocations."""
    items, bundle = 400, 40
    model = learned(items, lambda option: ceil(items / bundle), item_s=0.0005)
    at, rng = Option(workers, SIZES[3]), np.random.default_rng(3)
    bills = [run(k, at, items, 10, rng, item_s=0.0005).cost_usd for k in range(200)]
    plan = Plan("one", None, {"a": StagePlan.of(at, bundle=bundle, record="summary")})
    assert model.predict(plan).cost_usd.mean == pytest.approx(np.mean(bills), rel=0.02)
    alone = Plan("one", None, {"a": StagePlan.of(at)})
    extra = model.predict(alone).cost_usd.mean - model.predict(plan).cost_usd.mean
    assert extra == pytest.approx((400 - 10) * PRICES.request, rel=1e-3)


def test_a_batch_is_one_request() -> None:
    model = learned(12, lambda option: 12 // option.batch, item_s=0.01, batch=(1, 4))
    rng = np.random.default_rng(4)
    for batch in (1, 4):
        at = Option(2, SIZES[2], batch=batch)
        bills = [run(k, at, 12, 12 // batch, rng, item_s=0.01).cost_usd for k in range(200)]
        assert model.predict({"a": at}).cost_usd.mean == pytest.approx(np.mean(bills), rel=0.02)


def test_objects_cost_as_often_as_invocations_are_made() -> None:
    flow, rng = workflow(8), np.random.default_rng(5)
    rows = []
    for k, option in enumerate(option for option in flow["a"].menu.options() for _ in range(4)):
        row = run(k, option, 8, 8, rng, item_s=0.05)
        rows.append(StageRun(**{**row.__dict__, "storage_usd": 8 * 1.1e-5, "cost_usd": row.cost_usd + 8 * 1.1e-5}))
    model = WorkflowModel(flow).fit(StageRuns.of(rows))
    at = Option(2, SIZES[1])
    seen = np.mean([row.cost_usd for row in rows if (row.workers, row.memory_mb) == (2, 512)])
    assert model.predict({"a": at}).cost_usd.mean == pytest.approx(seen, rel=0.03)


def test_a_stored_model_keeps_what_is_billed() -> None:
    model = learned(12, lambda _: 12, item_s=0.002)
    again = WorkflowModel.from_document(model.workflow, model.to_document())
    assert again.predict({"a": Option(2, SIZES[1])}) == model.predict({"a": Option(2, SIZES[1])})


def test_a_least_time_is_billed_for_each_job(tmp_path: Any) -> None:
    """Where a minute is billed at least, ten seconds cost a minute."""
    flow = Workflow("one", (Stage("a", menu=Menu("aws-fargate-x86", (1,), (Size(1, 2048),)), items=1),))
    rows = [StageRun(f"r{k}", "a", 1, 2048, 1, 10 + 0.01 * k, overhead_s=0, items=1) for k in range(8)]
    rate = price_list("aws-fargate-x86").rate(1, 2048)
    predicted = WorkflowModel(flow).fit(StageRuns.of(rows)).predict({"a": Option(1, Size(1, 2048))})
    assert predicted.cost_usd.mean == pytest.approx(60 * rate, rel=1e-4)


def on_a_cluster(number: int, workers: int, rng: np.random.Generator, *, items: int = 100, slots: int = 8) -> StageRun:
    """Items of a second on a cluster with room for eight at once, whose bundles cost what they hold of it."""
    took = np.exp(0.03 * rng.standard_normal() + 0.02 * rng.standard_normal(items))
    at_once = min(workers, slots)
    wall = max(took[slot::at_once].sum() for slot in range(at_once))
    return StageRun(
        f"r{number:04d}", "a", workers, 1024, 1, wall, overhead_s=wall - took.sum() / workers, items=items,
        hardware="dask", started_at=1.7e9 + number, requests=items, billed_s=took.sum(),
    )  # fmt: skip


@pytest.mark.parametrize("workers", [1, 8, 64])
def test_a_cluster_costs_what_bundles_hold_and_nothing_for_those_that_find_no_room(workers: int) -> None:
    counts, rng = (1, 4, 8, 64), np.random.default_rng(6)
    menu = Menu("local", counts, (Size(1, 1024, hardware="dask"),))
    flow = Workflow("one", (Stage("a", menu=menu, items=100),))
    rows = [on_a_cluster(k, count, rng) for k, count in enumerate(count for count in counts for _ in range(6))]
    predicted = WorkflowModel(flow).fit(StageRuns.of(rows)).predict({"a": Option(workers, menu.sizes[0])})
    rate = price_list("local").rate(1, 1024, 0, "dask")
    assert predicted.cost_usd.mean == pytest.approx(100 * rate, rel=0.04)
