"""Pools beyond this machine's: named by tasks, menus and plans, opened per flow run, priced and limited apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from prefect import flow, task

from prefect_slo import slo, slo_task
from prefect_slo.declaration import Declaration
from prefect_slo.errors import InvalidValue, UnknownPool
from prefect_slo.loop.menus import MenuSettings, capacity_of, stage_menu
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.pricing import price_list
from prefect_slo.resources import Capacity, Pool, Size
from prefect_slo.runner.backends.protocol import Backend
from prefect_slo.runner.backends.threads import ThreadBackend
from prefect_slo.runner.pools import by_name, on_cpu, sizes_on
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.runner.rules import stage_rule
from prefect_slo.runner.task_runner import SLOTaskRunner

SMALL, LARGE = Size(0.5, 512, hardware="cloud"), Size(2, 4096, hardware="cloud")
OPENED: list[Size] = []


class Counted(ThreadBackend):
    """Threads that note which sizes they were asked for."""

    def open(self, lease: int, size: Size, sink: Any) -> None:
        OPENED.append(size)
        super().open(lease, size, sink)


@dataclass(frozen=True)
class Cloud:
    """A pool that is somewhere else."""

    pool: Pool = field(default=Pool("cloud", (SMALL, LARGE), "aws-lambda-x86", (1, 4, 16)))
    capacity: Capacity = field(default=Capacity(workers=16))

    def backend(self, client: Any) -> Backend:
        return Counted()


@pytest.fixture(autouse=True)
def opened() -> list[Size]:
    OPENED.clear()
    return OPENED


class Told:
    def __init__(self) -> None:
        self.runs: list[ObservedRun] = []

    def recipe(self, flow_name: str, run_id: str, parameters: Any) -> Recipe:
        return Recipe()

    def heard(self, invocation: Any, run_id: str) -> None: ...

    def observed(self, run: ObservedRun) -> None:
        self.runs.append(run)


@slo_task(pool="cloud", memory_mb=1000)
@task
def square(x: int) -> int:
    return x * x


@task
def double(x: int) -> int:
    return 2 * x


@flow
def squares(n: int):
    return sum(square.map(range(n)).result())


@flow
def doubles(n: int):
    return sum(double.map(range(n)).result())


def test_a_task_runs_on_the_pool_that_it_declares(prefect_server: str, opened: list[Size]) -> None:
    told = Told()
    runner = SLOTaskRunner(pools=[Cloud()], director=told)
    assert squares.with_options(task_runner=runner)(4) == 14
    assert opened
    assert set(opened) == {LARGE}, "the smallest size with the memory that it needs"
    [run] = told.runs
    assert run.stages["square"].pool == "cloud"
    assert run.stage_runs[0].hardware == "cloud"


def test_a_plan_names_pools(prefect_server: str, opened: list[Size]) -> None:
    plan = Plan("doubles", None, {"double": StagePlan(4, SMALL, "cloud")})
    assert doubles.with_options(task_runner=SLOTaskRunner(plan, pools=[Cloud()]))(4) == 12
    assert set(opened) == {SMALL}
    assert len(opened) <= 4


def test_time_on_a_pool_costs_what_the_pool_costs(prefect_server: str) -> None:
    told = Told()
    squares.with_options(task_runner=SLOTaskRunner(pools=[Cloud()], director=told))(2)
    assert 0 < told.runs[0].cost_usd < 1e-3
    rates = [price_list(name).rate(LARGE.vcpus, LARGE.memory_mb) for name in ("aws-lambda-x86", "local")]
    free = Cloud(Pool("cloud", (LARGE,), "aws-lambda-arm"))
    assert rates[0] != rates[1]
    assert by_name([free])["cloud"].pool.prices == "aws-lambda-arm"


def test_a_pool_that_nobody_gave_is_refused_by_name(prefect_server: str) -> None:
    with pytest.raises(UnknownPool, match=r"'cloud'.*process.*'square'.*pools="):
        squares.with_options(task_runner=SLOTaskRunner())(2)
    with pytest.raises(UnknownPool, match="'clout'"):
        slo(latency="1s", stages={"square": {"pool": "clout"}}, pools=[Cloud()])(squares)
    with pytest.raises(UnknownPool, match="'clout'"):
        slo(latency="1s", menu={"pools": "clout"}, pools=[Cloud()])(squares)


@pytest.mark.parametrize(
    ("pools", "says"),
    [
        ([Cloud(), Cloud()], "differ"),
        ([Cloud(Pool("process", (SMALL,)))], "differ"),
        ([Cloud(Pool("cloud"))], "at least one size"),
        (["cloud"], "pool definitions"),
        ([Cloud], "pool definitions"),
    ],
)
def test_pools_that_are_none_are_refused(pools: Any, says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        SLOTaskRunner(pools=pools)


def test_a_pool_that_does_not_pickle_is_refused() -> None:
    import threading

    definition = Cloud()
    object.__setattr__(definition, "lock", threading.Lock())
    with pytest.raises(InvalidValue, match="pickles"):
        by_name([definition])


def test_pools_travel_with_the_flow() -> None:
    runner = cloudpickle.loads(cloudpickle.dumps(SLOTaskRunner(pools=[Cloud()])))
    assert runner.duplicate().pools == {"cloud": Cloud()}
    decorated = slo(latency="1s", pools=[Cloud()])(squares)
    again = slo(latency="2s")(decorated.with_options(task_runner=SLOTaskRunner(pools=[Cloud()])))
    assert again.task_runner.pools == {"cloud": Cloud()}
    assert again.task_runner.director.pools == {"cloud": Cloud()}


def test_without_a_plan_the_first_of_several_pools_is_taken() -> None:
    pools = by_name([Cloud()])
    rule = stage_rule("s", double, Recipe(), Declaration(pool=("cloud", "process")), processes=True, pools=pools)
    assert (rule.pool, rule.size, rule.workers, rule.fallback) == ("cloud", SMALL, 16, "thread")


@pytest.mark.parametrize("pool", ["process", "cloud"])
def test_with_a_plan_the_plans_choice_among_them_holds(pool: str) -> None:
    plan = Plan("f", None, {"s": StagePlan(2, LARGE, pool)})
    declared = Declaration(pool=("cloud", "process"))
    rule = stage_rule("s", double, Recipe(plan), declared, processes=True, pools=by_name([Cloud()]))
    assert (rule.pool, rule.size, rule.workers) == (pool, LARGE, 2)


def test_a_plan_for_another_pool_than_the_declared_one_sizes_nothing() -> None:
    plan = Plan("f", None, {"s": StagePlan(2, Size(64, 64), "process")})
    rule = stage_rule("s", double, Recipe(plan), Declaration(pool="cloud"), processes=True, pools=by_name([Cloud()]))
    assert (rule.pool, rule.size) == ("cloud", SMALL)


def test_a_menu_offers_several_pools_each_with_its_own_sizes_and_workers() -> None:
    declared = Declaration(pool=("process", "cloud"), memory_mb=1000)
    menu = stage_menu(MenuSettings(workers=(1, 2), vcpus=(1.0,)), declared, pools=by_name([Cloud()]))
    found = {(option.pool, option.workers, option.size.hardware) for option in menu.options()}
    assert found == {
        *((("process", workers, "cpu")) for workers in (1, 2)),
        *((("cloud", workers, "cloud")) for workers in (1, 4, 16)),
    }
    assert {option.size for option in menu.options() if option.pool == "cloud"} == {LARGE}
    assert menu.prices_of("cloud").name == "aws-lambda-x86"
    assert menu.prices_of("process").name == "local"


def test_pins_and_concurrency_hold_on_every_pool() -> None:
    pools = by_name([Cloud()])
    declared = Declaration(pool=("process", "cloud"), concurrency=4, pins={"memory_mb": 512})
    options = stage_menu(MenuSettings(workers=(1, 8)), declared, pools=pools).options()
    assert {option.size.memory_mb for option in options} == {512}
    assert max(option.workers for option in options) == 4
    pinned = stage_menu(MenuSettings(), Declaration(pool=("process", "cloud"), pins={"pool": "cloud"}), pools=pools)
    assert [pool.name for pool in pinned.pools] == ["cloud"]


def test_the_flows_menu_names_pools_for_tasks_that_declare_none() -> None:
    pools, settings = by_name([Cloud()]), MenuSettings.of({"pools": ("thread", "cloud")})
    assert [pool.name for pool in stage_menu(settings, pools=pools).pools] == ["thread", "cloud"]
    hardware = {option.pool: option.size.hardware for option in stage_menu(settings, pools=pools).options()}
    assert hardware == {"thread": "thread", "cloud": "cloud"}


def test_what_is_elsewhere_takes_no_room_on_this_machine() -> None:
    capacity = capacity_of(by_name([Cloud()]))
    here = stage_menu(MenuSettings(workers=(1,), vcpus=(capacity.vcpus,))).options()[0]
    there = stage_menu(MenuSettings(), Declaration(pool="cloud"), pools=by_name([Cloud()])).options()[-1]
    assert there.workers == 16
    assert capacity.fits(here, there)
    assert not capacity.fits(here, here)
    assert not capacity.fits(there, there)


@dataclass(frozen=True)
class Bare(Cloud):
    """A pool whose machines have no GPU after all."""

    why: str = "its driver is gone"

    def lacks_gpus(self) -> str:
        return self.why


WITH_GPU = Size(2, 4096, 1, "cloud")


def test_where_a_pool_turns_out_to_have_no_gpu_a_stage_runs_on_its_cpus_and_the_price_is_said(
    prefect_server: str, opened: list[Size], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    prices = str(tmp_path / "ours.toml")
    Path(prices).write_text('name = "ours"\nvcpu_second = 1e-5\ngb_second = 1e-6\ngpu_second = 1e-3\n')
    pool = Bare(Pool("cloud", (WITH_GPU, LARGE), prices, (1, 4)))
    plan = Plan("doubles", None, {"double": StagePlan(2, WITH_GPU, "cloud")})
    assert doubles.with_options(task_runner=SLOTaskRunner(plan, pools=[pool]))(4) == 12
    assert set(opened) == {LARGE}
    was, now = (3600 * price_list(prices).rate(s.vcpus, s.memory_mb, s.gpu, s.hardware) for s in (WITH_GPU, LARGE))
    said = " ".join(caplog.text.split())
    assert "'double' was to have 1 GPU, and its driver is gone: it runs on the CPU" in said
    assert f"at ${now:.3g} an hour a worker in place of ${was:.3g}" in said
    assert was > now > 0


def test_a_list_without_a_price_for_cpus_makes_none_up(prefect_server: str, caplog: pytest.LogCaptureFixture) -> None:
    pool = Bare(Pool("cloud", (WITH_GPU,), "aws-ec2-gpu", (1, 4)))
    plan = Plan("doubles", None, {"double": StagePlan(2, WITH_GPU, "cloud")})
    assert doubles.with_options(task_runner=SLOTaskRunner(plan, pools=[pool]))(2) == 2
    assert "at a price that the list 'aws-ec2-gpu' does not have in place of $" in " ".join(caplog.text.split())


def test_a_pool_that_may_have_gpus_is_asked_and_left_as_planned(prefect_server: str, opened: list[Size]) -> None:
    pool = Bare(Pool("cloud", (WITH_GPU,), None, (1, 4)), why="")
    plan = Plan("doubles", None, {"double": StagePlan(2, WITH_GPU, "cloud")})
    assert doubles.with_options(task_runner=SLOTaskRunner(plan, pools=[pool]))(4) == 12
    assert set(opened) == {WITH_GPU}


def test_the_size_without_a_gpu_is_the_least_that_holds_as_much_or_the_same_on_machines_of_their_own() -> None:
    offered = by_name([Cloud(Pool("cloud", (WITH_GPU, SMALL, LARGE, Size(4, 8192, hardware="cloud"))))])
    assert on_cpu(WITH_GPU, "cloud", offered) == LARGE
    alone = by_name([Cloud(Pool("cloud", (WITH_GPU,)))])
    assert on_cpu(WITH_GPU, "cloud", alone) == Size(2, 4096, hardware="cloud-cpu")
    assert on_cpu(WITH_GPU, "process", {}) == Size(2, 4096)
    assert on_cpu(SMALL, "cloud", alone) == SMALL


def test_what_runs_without_a_gpu_in_a_pool_that_has_some_is_measured_apart() -> None:
    sizes = sizes_on("ours", (Size(1, 1024), Size(1, 1024, 1), Size(1, 1024, 1, "h100")), "here")
    assert [size.kind for size in sizes] == ["ours-cpu", "ours", "h100"]
    assert [size.kind for size in sizes_on("ours", (Size(1, 1024),), "here")] == ["ours"]
