"""Edges of a plan: which way, what it takes, when another would be taken; and what runs teach of sizes and speeds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from prefect_slo.edges import EdgePlan, Way
from prefect_slo.errors import InvalidValue
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import HandingOn, Menu, Pool, Size
from prefect_slo.transform import DataStage, Links, Transfer, direct_until, with_passing
from prefect_slo.transform.crossovers import by_fan_out, by_size
from prefect_slo.transform.edge_plans import CLUSTER, ELSEWHERE, HERE
from prefect_slo.transform.learned import broadcasts, learn_links, learn_sizes
from prefect_slo.transform.passing import methods_of
from prefect_slo.workflow import Edge, Stage, Workflow

MB = 2.0**20
HANDING_ON: dict[str, HandingOn] = {"lambda": "storage", "dask": "workers", "ray": "workers"}


def rows(
    stage: str, sizes_mb: list[float], *, taken_mb: float = 0.0, items: int = 1, **fields: object
) -> list[StageRun]:
    return [
        StageRun(
            f"run-{i}", stage, 2, 1769, 1.0, 1.0, read_s=0.0, write_s=0.0, overhead_s=0.0, items=items,
            bytes_in=taken_mb * MB, bytes_out=size * MB, **fields,  # type: ignore[arg-type]
        )
        for i, size in enumerate(sizes_mb)
    ]  # fmt: skip


def workflow(pools: tuple[str, str], *, kind: str = "all") -> tuple[Workflow, Plan]:
    """Two stages on these pools, and a plan for them."""
    menus = [
        Menu("aws-lambda-x86" if pool == "lambda" else "local", pools=(Pool(pool, handing_on=HANDING_ON.get(pool)),))
        for pool in pools
    ]
    stages = (Stage("make", menu=menus[0]), Stage("use", (Edge("make", kind),), menus[1], "given", 8))  # type: ignore[arg-type]
    sizes = [Size(1, 1769, hardware=pool if pool in ("lambda", "dask", "ray") else "cpu") for pool in pools]
    plans = {stage.name: StagePlan(4, size, pool) for stage, size, pool in zip(stages, sizes, pools, strict=True)}
    return Workflow("w", stages), Plan("w", None, plans)


def passed(pools: tuple[str, str], size_mb: float, *, broadcast: bool, kind: str = "all", n: int = 8) -> EdgePlan:
    flow, plan = workflow(pools, kind=kind)
    hardware = [pool if pool in ("lambda", "dask", "ray") else "cpu" for pool in pools]
    taken = size_mb * (8 if broadcast else 1)
    runs = [
        *rows("make", [size_mb] * n, hardware=hardware[0]),
        *rows("use", [0.01] * n, taken_mb=taken, items=8, hardware=hardware[1]),
    ]
    [edge] = with_passing(plan, flow, StageRuns.of(runs)).passing
    return edge


def test_a_large_broadcast_on_one_machine_goes_through_shared_memory() -> None:
    edge = passed(("process", "process"), 50.0, broadcast=True)
    assert (edge.method, edge.broadcast) == ("machine", True)
    [other] = edge.others
    assert other.method == "inline"
    assert other.seconds > edge.chosen.seconds
    assert edge.size_mb == pytest.approx(50.0)
    assert "50 MB to each of 8 calls" in edge.why
    assert edge.why.startswith("machine")
    assert "by size: inline, machine above" in edge.why


def test_what_is_small_goes_with_the_call() -> None:
    assert passed(("process", "process"), 0.001, broadcast=True).method == "inline"
    assert passed(("lambda", "lambda"), 0.1, broadcast=False).method == "inline"


def test_elsewhere_large_messages_go_over_storage_and_pay_its_requests() -> None:
    edge = passed(("lambda", "lambda"), 50.0, broadcast=True)
    assert (edge.method, edge.others) == ("remote", ()), "no request takes so much"
    assert edge.chosen.cost_usd > 7 * ELSEWHERE.put_usd
    shares = passed(("lambda", "lambda"), 8.0, broadcast=False)
    assert shares.chosen.seconds < edge.chosen.seconds


def test_over_storage_nothing_passes_by_the_flow_but_what_it_takes_apart() -> None:
    whole, apart = (passed(("lambda", "lambda"), 50.0, broadcast=False, kind=kind) for kind in ("item", "all"))
    assert (whole.method, apart.method) == ("remote", "remote")
    assert apart.chosen.seconds - whole.chosen.seconds == pytest.approx(2 * 50 / ELSEWHERE.relay_mb_s)


def test_from_this_machine_to_elsewhere_it_is_the_request_or_storage() -> None:
    assert passed(("process", "lambda"), 50.0, broadcast=True).method == "remote"
    assert passed(("lambda", "process"), 50.0, broadcast=True).method == "remote"
    assert passed(("process", "lambda"), 1.0, broadcast=False).method == "inline"


def test_threads_hand_on_objects_as_they_are() -> None:
    edge = passed(("thread", "thread"), 500.0, broadcast=True)
    assert (edge.method, edge.chosen.seconds, edge.others) == ("machine", 0.0, ())
    assert "no other way" in edge.why


@pytest.mark.parametrize("pool", ["dask", "ray"])
def test_on_one_cluster_what_is_large_goes_from_worker_to_worker(pool: str) -> None:
    edge = passed((pool, pool), 50.0, broadcast=True)
    assert (edge.method, [way.method for way in edge.others]) == ("direct", ["inline"])
    assert edge.others[0].seconds > 2 * edge.chosen.seconds
    assert "by size: inline, direct above" in edge.why
    assert passed((pool, pool), 0.001, broadcast=False, kind="item").method == "inline"
    assert passed((pool, pool), 50.0, broadcast=False, kind="item").method == "direct"


def test_from_one_cluster_to_another_pool_it_is_the_flows_process() -> None:
    for pools in (("dask", "ray"), ("dask", "process"), ("process", "ray")):
        assert passed(pools, 50.0, broadcast=True).method == "inline"


def test_what_the_flow_takes_apart_comes_by_the_flow() -> None:
    apart = passed(("dask", "dask"), 50.0, broadcast=False)
    assert (apart.method, apart.others) == ("inline", ())
    assert passed(("dask", "dask"), 50.0, broadcast=False, n=2).method == "inline"


def test_item_wise_edges_are_no_broadcast() -> None:
    assert not passed(("process", "process"), 50.0, broadcast=True, kind="item").broadcast


@pytest.mark.parametrize(("pools", "way"), [(("process", "process"), "inline"), (("lambda", "lambda"), "remote")])
def test_until_sizes_are_known_the_way_that_bears_any_size_is_taken(pools: tuple[str, str], way: str) -> None:
    early = passed(pools, 1.0, broadcast=False, n=2)
    assert early.method == way
    assert "bears any size" in early.why


def test_parts_of_a_result_that_the_flow_takes_apart_travel_with_their_calls() -> None:
    apart = passed(("process", "process"), 50.0, broadcast=False)
    assert (apart.method, apart.others) == ("inline", ())
    item_wise = passed(("process", "process"), 50.0, broadcast=False, kind="item")
    assert item_wise.method == "machine"


def test_a_stage_that_few_runs_come_by_counts_by_its_chance() -> None:
    flow, plan = workflow(("lambda", "lambda"))
    sure = passed(("lambda", "lambda"), 50.0, broadcast=True)
    rare = replace(flow, stages=(flow.stages[0], replace(flow.stages[1], probability=0.1)))
    runs = [*rows("make", [50.0] * 8, hardware="lambda"), *rows("use", [0.01] * 8, taken_mb=400, items=8)]
    [edge] = with_passing(plan, rare, StageRuns.of(runs)).passing
    assert edge.chosen.seconds == pytest.approx(0.1 * sure.chosen.seconds)
    assert edge.chosen.cost_usd == pytest.approx(0.1 * sure.chosen.cost_usd)


def test_edges_without_bytes_are_left_out() -> None:
    flow, plan = workflow(("process", "process"))
    assert with_passing(plan, flow, StageRuns.of([*rows("make", [0.0]), *rows("use", [0.0])])).passing == ()


def test_plans_with_passing_are_written_and_read() -> None:
    flow, plan = workflow(("lambda", "lambda"))
    runs = StageRuns.of([*rows("make", [3.0] * 8, hardware="lambda"), *rows("use", [0.01] * 8, taken_mb=3, items=8)])
    planned = with_passing(plan, flow, runs)
    assert planned.passing
    assert Plan.from_json(planned.to_json()) == planned
    assert "passing" not in plan.to_document()
    assert planned.with_stage("use", workers=2).passing == ()
    document = planned.to_document()
    document["passing"][0]["method"] = "pigeon"
    with pytest.raises(InvalidValue, match="machine, direct, remote, inline"):
        Plan.from_document(document)
    with pytest.raises(InvalidValue):
        EdgePlan("a", "b", Way("remote", math.nan, 0.0))


def test_a_plan_for_another_input_passes_data_as_the_one_in_force() -> None:
    flow, plan = workflow(("process", "process"))
    runs = StageRuns.of([*rows("make", [50.0] * 8), *rows("use", [0.01] * 8, taken_mb=400, items=8)])
    in_force = with_passing(plan, flow, runs)
    assert plan.with_stage("use", workers=1).passing_as(in_force).passing == in_force.passing
    assert plan.with_stage("use", pool="lambda").passing_as(in_force).passing == (), "it runs somewhere else"
    assert plan.passing_as(None) is plan
    assert in_force.passing_as(plan) is in_force


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_follow_the_input_once_enough_runs_are_seen() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 10, (30, 1))
    truth = 2 + 3 * x[:, 0] + 0.5 * x[:, 0] ** 2
    sizes = learn_sizes(truth * rng.normal(1, 0.02, 30), x)
    assert sizes.converged
    assert sizes.at({"n": 20.0}) == pytest.approx(2 + 60 + 200, rel=0.1), "beyond what was seen"
    assert not learn_sizes(truth[:4], x[:4]).converged


def test_sizes_that_no_feature_explains_do_not_converge() -> None:
    rng = np.random.default_rng(1)
    sizes = learn_sizes(rng.lognormal(0, 1.5, 40), rng.uniform(1, 2, (40, 1)))
    assert not sizes.converged
    assert sizes.error > 0.15


def test_they_converge_after_so_many_runs() -> None:
    """With 10 % of noise on a line, within a dozen of runs; SONIC needed about 35 of its jobs."""
    rng = np.random.default_rng(2)
    x = rng.uniform(1, 10, (40, 1))
    noisy = (1 + 4 * x[:, 0]) * rng.lognormal(0, 0.1, 40)
    first = next(n for n in range(1, 41) if learn_sizes(noisy[:n], x[:n]).converged)
    assert first <= 12
    assert all(learn_sizes(noisy[:n], x[:n]).converged for n in range(max(first, 12), 41))


def test_who_broadcasts_shows_in_what_is_taken() -> None:
    assert broadcasts(10 * 16 + 5, (10, 5), 16) == (True, False)
    assert broadcasts(15, (10, 5), 16) == (False, False)
    assert broadcasts(15 * 16, (10, 5), 16) == (True, True)
    assert broadcasts(15, (10, 5), 1) == (False, False)


# ---- speeds ---------------------------------------------------------------------------------------------------------


def moved(seconds_of_mb: float, *, workers: int, noise: float = 0.0) -> StageRuns:
    rng = np.random.default_rng(3)
    table = [
        StageRun(
            f"r{i}", stage, workers, 1769, 1.0, 9.0, read_s=0.1, write_s=0.0, items=8, bytes_in=size * MB, bytes_out=0,
            overhead_s=base + seconds_of_mb * size / (1 if workers == 1 else workers) * rng.lognormal(0, noise),
        )
        for i in range(12)
        for stage, base in (("a", 0.2), ("b", 3.0))
        for size in (rng.uniform(5, 200),)
    ]  # fmt: skip
    return StageRuns.of(table)


def test_bandwidth_is_learned_where_more_bytes_took_longer() -> None:
    links = learn_links(moved(1 / 37, workers=1), HERE, "inline")
    assert links.inline_mb_s == pytest.approx(37, rel=0.01)
    assert links.machine_mb_s / HERE.machine_mb_s == pytest.approx(37 / HERE.inline_mb_s, rel=0.01)
    noisy = learn_links(moved(1 / 37, workers=1, noise=0.3), HERE, "inline")
    assert noisy.inline_mb_s == pytest.approx(37, rel=0.25)
    remote = learn_links(moved(1 / 37, workers=4), ELSEWHERE, "remote")
    assert remote.down_mb_s == pytest.approx(37, rel=0.01)
    direct = learn_links(moved(1 / 37, workers=4), CLUSTER, "direct")
    assert direct.direct_mb_s == pytest.approx(37, rel=0.01)
    assert direct.inline_mb_s / CLUSTER.inline_mb_s == pytest.approx(37 / CLUSTER.direct_mb_s, rel=0.01)


def test_where_rows_say_nothing_of_speed_the_usual_one_stays() -> None:
    same = StageRuns.of(rows("make", [3.0] * 20))
    assert learn_links(same, HERE, "inline") == HERE
    assert learn_links(moved(-1e-3, workers=1), HERE, "inline") == HERE
    crawl = learn_links(moved(1e3, workers=1), HERE, "inline")
    assert crawl.inline_mb_s == pytest.approx(HERE.inline_mb_s / 20), "never beyond a factor of 20"


# ---- crossovers -----------------------------------------------------------------------------------------------------

AT = ("together", "spread")


@pytest.mark.parametrize("direct_mb_s", [50.0, 100.0, 300.0, 900.0])
@pytest.mark.parametrize("size_mb", [6.0, 50.0, 1500.0])
def test_the_crossover_by_fan_out_is_within_one_of_the_closed_form(direct_mb_s: float, size_mb: float) -> None:
    links = Links(direct_mb_s, 80, 90, 1e-3, remote_s=0.02)
    edge = Transfer("a", "b", size_mb, broadcast=True, ways=("direct", "remote"))
    ends = (DataStage("a", 1, 1.0), DataStage("b", 1, 1.0))
    found = by_fan_out(edge, *ends, replace(links), AT, most=64)  # type: ignore[arg-type]
    closed = direct_until(edge, links)
    if 1 <= closed < 64:
        assert [c.method for c in found] == ["direct", "remote"]
        assert abs(found[1].at - closed) <= 1
    else:
        assert len(found) == 1


def test_the_crossover_by_size_is_where_both_take_as_long() -> None:
    """``r_d + D/b_d = 2·r_s + D/b_up + D/b_down``: a slow link starts at once, storage takes a second first."""
    links = Links(20, 80, 90, 1e-9, remote_s=0.5)
    edge = Transfer("a", "b", 1.0, ways=("direct", "remote"))
    ends = (DataStage("a", 1, 1.0), DataStage("b", 1, 1.0))
    found = by_size(edge, *ends, links, AT)  # type: ignore[arg-type]
    closed = 1.0 / (1 / 20 - 1 / 80 - 1 / 90)
    assert [c.method for c in found] == ["direct", "remote"]
    assert found[1].at == pytest.approx(closed, rel=2e-3)
    just_over = methods_of(*ends, replace(edge, size_mb=closed * 1.01), links, AT)  # type: ignore[arg-type]
    assert just_over["remote"] < just_over["direct"]


def test_on_other_pools_data_travel_with_their_bundle_whatever_their_size() -> None:
    flow, plan = workflow(("k8s", "k8s"))
    runs = [*rows("make", [50.0] * 8), *rows("use", [0.01] * 8, taken_mb=400, items=8)]
    [edge] = with_passing(plan, flow, StageRuns.of(runs)).passing
    assert (edge.method, edge.others) == ("inline", ())


# ---- what pools are -------------------------------------------------------------------------------------------------


def between(pools: tuple[Pool, Pool], hardware: str = "cpu") -> EdgePlan:
    """The edge between a stage on one pool and one on another, of 50 MB to each call."""
    sizes = [Size(1, 1769, hardware=hardware)] * 2
    stages = (
        Stage("make", menu=Menu(pools=pools[:1])),
        Stage("use", (Edge("make", "all"),), Menu(pools=pools[1:]), "given", 8),
    )
    names = [pool.name for pool in pools]
    plans = {s.name: StagePlan(4, size, name) for s, size, name in zip(stages, sizes, names, strict=True)}
    runs = [
        *rows("make", [50.0] * 8, hardware=hardware),
        *rows("use", [0.01] * 8, taken_mb=400.0, items=8, hardware=hardware),
    ]
    [edge] = with_passing(Plan("w", None, plans), Workflow("w", stages), StageRuns.of(runs)).passing
    return edge


@pytest.mark.parametrize("name", ["functions", "gpus", "lambda", "default"])
def test_what_a_pool_declares_counts_and_not_what_it_or_its_machines_are_called(name: str) -> None:
    for hardware in ("cpu", "lambda", "dask"):
        methods = {
            declared: between((Pool(name, handing_on=declared), Pool(name, handing_on=declared)), hardware).method
            for declared in get_args(HandingOn)
        }
        assert methods == {
            "objects": "machine", "machine": "machine", "workers": "direct", "storage": "remote", "requests": "inline",
            "calls": "inline",
        }  # fmt: skip


@pytest.mark.parametrize("storage", ["s3://x/z", None])
def test_only_pools_of_one_folder_hand_on_past_the_flow(storage: str | None) -> None:
    def seconds(other: str | None, name: str = "b") -> float:
        ends = (Pool("a", handing_on="storage", storage="s3://x/y"), Pool(name, handing_on="storage", storage=other))
        return between(ends).chosen.seconds

    own, same, through = seconds("s3://x/y", "a"), seconds("s3://x/y"), seconds(storage)
    assert same == own
    assert through - same == pytest.approx(2 * 50 / ELSEWHERE.relay_mb_s)


@pytest.mark.parametrize("other", ["storage", "calls", "machine", "requests"])
def test_without_a_bucket_what_fits_into_no_request_is_said_to_run_elsewhere(other: HandingOn) -> None:
    for ends in (("requests", other), (other, "requests")):
        edge = between((Pool("a", handing_on=ends[0]), Pool("b", handing_on=ends[1])))
        assert (edge.method, edge.others) == ("inline", ())
        assert "50 MB do not fit into a request of 4.4 MB" in edge.why
        assert "give the pool a bucket" in edge.why


def test_a_pool_that_declares_nothing_passes_with_calls_unless_it_is_of_this_machine() -> None:
    methods = {name: between((Pool(name), Pool(name))).method for name in ("lambda", "dask", "process", "thread")}
    assert methods == {"lambda": "inline", "dask": "inline", "process": "machine", "thread": "machine"}


def test_pools_say_what_becomes_of_large_results() -> None:
    from prefect_slo import BatchJobs, BatchPool, LambdaPool

    declared = {
        "bucket": LambdaPool(bucket="s3://bucket/prefix").pool,
        "no bucket": LambdaPool().pool,
        "jobs": BatchPool(BatchJobs("queue", "image"), "s3://bucket/prefix").pool,
    }
    assert {what: pool.handing_on for what, pool in declared.items()} == {
        "bucket": "storage", "no bucket": "requests", "jobs": "storage",
    }  # fmt: skip
    assert declared["bucket"].storage == declared["jobs"].storage == "s3://bucket/prefix"
    assert declared["no bucket"].storage is None


def test_a_workflow_file_may_say_it(tmp_path: Path) -> None:
    file = tmp_path / "workflow.toml"
    file.write_text(
        """
        [[stages]]
        name = "a"
        menu.prices = "aws-lambda-x86"
        menu.pools = [{ name = "default", handing_on = "storage", storage = "s3://x/y" }, "process"]
        """
    )
    read = Workflow.load(file)
    assert [pool.handing_on for pool in read["a"].menu.pools] == ["storage", None]
    assert [pool.storage for pool in read["a"].menu.pools] == ["s3://x/y", None]
    assert Workflow.from_document(read.to_document()) == read
    file.write_text(file.read_text().replace('"storage",', '"pigeons",'))
    with pytest.raises(InvalidValue, match="objects, machine, workers, storage, requests, calls"):
        Workflow.load(file)
