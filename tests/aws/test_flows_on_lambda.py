"""Flows whose tasks run on Lambda: what Prefect gives stays what it was, results are those of a local run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import boto3
import numpy as np
import pytest
from prefect import flow, get_run_logger, task

from prefect_slo import SLOTaskRunner, slo_task
from prefect_slo.aws import invoke
from prefect_slo.aws.report import bill
from prefect_slo.declaration import undeclared
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.pricing import price_list
from prefect_slo.resources import Size
from prefect_slo.runner.aws_pools import LambdaPool
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.testing.aws import Fault, Faults, LocalAws

OFFSET = 1000


def shifted(x: int) -> int:
    """A helper beside the tasks: workers can't import this module."""
    return x + OFFSET


@slo_task(pool="lambda")
@task
def shift(x: int) -> int:
    return shifted(x)


@slo_task(pool="lambda")
@task
async def shift_later(x: int) -> int:
    return shifted(x)


@slo_task(pool="lambda")
@task
def where() -> tuple[int, str]:
    return os.getpid(), os.environ["AWS_LAMBDA_FUNCTION_NAME"]


class Told:
    """A director that lets the runner decide, and keeps what runs have shown."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self._recipe, self.runs = recipe or Recipe(), []
        self.invocations: list[Any] = []

    def recipe(self, flow_name: str, run_id: str, parameters: Any) -> Recipe:
        return self._recipe

    def heard(self, invocation: Any, run_id: str) -> None:
        self.invocations.append(invocation)

    def observed(self, run: ObservedRun) -> None:
        self.runs.append(run)


@pytest.fixture(scope="module")
def pool(account: LocalAws) -> LambdaPool:
    return account.pool(memory_mb=(256, 512), concurrency=4)


@pytest.fixture
def run(prefect_server: str, pool: LambdaPool) -> Callable[..., Any]:
    """Runs a function as a flow on the pool."""

    def on_lambda(body: Callable[[], Any], *, pools: Any = None, **settings: Any) -> Any:
        runner = SLOTaskRunner(pools=[pools or pool], **settings)
        return flow(task_runner=runner)(body)()

    return on_lambda


def test_tasks_run_in_sandboxes_and_helpers_travel_with_them(run: Callable[..., Any], pool: LambdaPool) -> None:
    def body():
        return shift.map(range(6)).result(), where.submit().result()

    found, (pid, function) = run(body)
    assert found == [x + OFFSET for x in range(6)]
    assert pid != os.getpid()
    assert function == pool.functions.name(256)


def test_the_results_of_a_map_travel_as_the_list_that_they_are(run: Callable[..., Any]) -> None:
    """Prefect hands a task that was given the futures of a map a list of its own, which workers don't know."""

    @slo_task(pool="lambda")
    @task
    def total(xs: list[int], named: dict[str, list[int]]) -> tuple[int, str, int]:
        return sum(xs) + sum(named["xs"]), type(xs).__name__, os.getpid()

    def body():
        xs = shift.map(range(3))
        return total.submit(xs, {"xs": xs}).result()

    found, kind, pid = run(body)
    assert (found, kind) == (2 * (3 + 3 * OFFSET), "list")
    assert pid != os.getpid()


@pytest.mark.parametrize("record", ["full", "summary", "bare"])
def test_results_are_the_same_at_every_level(run: Callable[..., Any], record: Any) -> None:
    def body():
        return shift.map(shift_later.map(range(5))).result()

    assert run(body, record=record) == [x + 2 * OFFSET for x in range(5)]


def test_a_bundle_without_the_engine_is_one_invocation(run: Callable[..., Any], account: LocalAws) -> None:
    before = len(account.lambdas.invocations)
    assert run(lambda: shift.map(range(40)).result(), record="bare", bundle=20) == [x + OFFSET for x in range(40)]
    assert len(account.lambdas.invocations) - before == 2


def test_a_plan_chooses_the_memory(run: Callable[..., Any], pool: LambdaPool) -> None:
    plan = Plan("body", None, {"where": StagePlan(1, pool.pool.sizes[-1], "lambda")})

    def body():
        return where.submit().result()

    assert run(body, plan=plan)[1] == pool.functions.name(512)


def test_a_stage_is_cold_where_an_environment_had_to_start_and_only_there(
    run: Callable[..., Any], account: LocalAws
) -> None:
    def body():
        return shift.map(range(3)).result(), where.submit().result()

    told = Told(Recipe(workers=1))
    account.lambdas.reap()
    run(body, director=told)
    run(body, director=told)
    first, again = ({row.stage: row.cold for row in seen.stage_runs} for seen in told.runs)
    assert first == {"shift": True, "where": False}
    assert again == {"shift": False, "where": False}


def test_prefects_retries_run_again_on_lambda_and_the_error_is_the_tasks_own(run: Callable[..., Any], account) -> None:
    @slo_task(pool="lambda")
    @task(retries=2)
    def refuse(x: int) -> int:
        raise LookupError(x)

    before = len(account.lambdas.invocations)

    def body():
        return refuse.submit(7).wait() or refuse.submit(7).result(raise_on_failure=False)

    error = run(body)
    assert isinstance(error, LookupError)
    assert error.args == (7,)
    assert "On the worker" in error.__notes__[0]
    assert len(account.lambdas.invocations) - before == 6


def test_a_failure_is_of_its_own_item_alone(run: Callable[..., Any]) -> None:
    @slo_task(pool="lambda")
    @task
    def odd(x: int) -> int:
        if x % 2 == 0:
            raise ValueError(f"{x} is even")
        return x

    def body():
        return [future.state.name for future in odd.map(range(4)) if future.wait() is None]

    for record in ("full", "bare"):
        assert run(body, record=record) == ["Failed", "Completed", "Failed", "Completed"]


def test_a_batched_task_gets_lists_there_too(run: Callable[..., Any], account: LocalAws, pool: LambdaPool) -> None:
    @slo_task(pool="lambda", batched=True)
    @task
    def doubled(xs: list[int]) -> list[int]:
        return [2 * x for x in xs]

    plan = Plan(
        "body", None, {"doubled": StagePlan(1, pool.pool.sizes[0], "lambda", batch=5, bundle=10, record="bare")}
    )
    before = len(account.lambdas.invocations)

    def body():
        return doubled.map(range(10)).result()

    assert run(body, plan=plan) == [2 * x for x in range(10)]
    assert len(account.lambdas.invocations) - before == 2
    assert run(body, record="full") == [2 * x for x in range(10)]


def test_a_task_that_overruns_its_timeout_is_ended_there(run: Callable[..., Any], account: LocalAws) -> None:
    @slo_task(pool="lambda")
    @task(timeout_seconds=0.5)
    def slow() -> None:
        time.sleep(60)

    def body():
        future = slow.submit()
        future.wait()
        return future.state.name

    assert run(body) == "TimedOut"
    assert account.lambdas.invocations[-1].duration_ms < 10_000


def objects() -> list[str]:
    """Keys of what lies in the bucket, but for functions."""
    found = boto3.client("s3").list_objects_v2(Bucket="prefect-slo-test").get("Contents", [])
    return [entry["Key"] for entry in found if "/code/" not in entry["Key"]]


def test_large_arguments_and_results_go_over_s3(run: Callable[..., Any], account: LocalAws) -> None:
    @slo_task(pool="lambda")
    @task
    def reverse(data: bytes) -> bytes:
        return data[::-1]

    data = os.urandom(1 << 20) * 6
    before = objects()

    def body():
        return reverse.submit(data).result()

    assert run(body) == data[::-1]
    assert objects() == before, "nothing is left behind"


def test_without_a_bucket_what_is_too_large_runs_in_the_flows_process(
    run: Callable[..., Any], account: LocalAws, caplog: pytest.LogCaptureFixture
) -> None:
    @slo_task(pool="lambda")
    @task
    def pid_and_size(data: bytes) -> tuple[int, int]:
        return os.getpid(), len(data)

    def body():
        return pid_and_size.submit(b"x" * 6_000_000).result(), pid_and_size.submit(b"x").result()

    (big, size), (small, _) = run(body, pools=account.pool(memory_mb=(256,), bucket=None))
    assert (big, size) == (os.getpid(), 6_000_000)
    assert small == os.getpid(), "the whole stage has moved"
    assert "give the pool a bucket" in caplog.text


def test_calls_that_are_too_large_together_go_out_one_by_one(run: Callable[..., Any], account: LocalAws) -> None:
    @slo_task(pool="lambda")
    @task
    def pid_and_size(data: bytes) -> tuple[int, int]:
        return os.getpid(), len(data)

    def body():
        return pid_and_size.map([b"x" * 3_000_000] * 2).result()

    found = run(body, pools=account.pool(memory_mb=(256,), bucket=None), record="bare", bundle=2)
    assert [size for _, size in found] == [3_000_000] * 2
    assert os.getpid() not in {pid for pid, _ in found}


def test_what_does_not_pickle_runs_in_the_flows_process(run: Callable[..., Any]) -> None:
    import threading

    @slo_task(pool="lambda")
    @task
    def lock_of(x: int) -> Any:
        return os.getpid(), threading.Lock()

    assert run(lambda: lock_of.submit(1).result())[0] == os.getpid()


def test_a_task_that_runs_out_of_memory_says_so(run: Callable[..., Any]) -> None:
    from prefect_slo.errors import OutOfMemory

    @slo_task(pool="lambda", isolation="process")
    @task
    def hungry() -> int:
        data = []
        for _ in range(100):
            data.append(b"1" * (16 << 20))
            time.sleep(0.02)
        return len(data)

    def body():
        return hungry.submit().result(raise_on_failure=False)

    error = run(body)
    assert isinstance(error, OutOfMemory)
    assert error.limit_mb == 256


def test_a_task_that_runs_out_of_memory_grows_where_its_plan_may(run: Callable[..., Any], pool: LambdaPool) -> None:
    @slo_task(pool="lambda", idempotent=True)
    @task
    def hungry() -> str:
        data = b"1" * (300 << 20)
        time.sleep(0.3)
        return f"{len(data)} {os.environ['AWS_LAMBDA_FUNCTION_MEMORY_SIZE']}"

    small, large = pool.pool.sizes
    plan = Plan("body", None, {"hungry": StagePlan(1, small, "lambda")})
    recipe = Recipe(plan, ladders={"hungry": (large,)})

    def body():
        return hungry.submit().result()

    assert run(body, director=Told(recipe)) == f"{300 << 20} 512"


def test_a_worker_that_dies_is_lost_unless_the_task_may_run_again(run: Callable[..., Any], tmp_path: Any) -> None:
    from prefect_slo.errors import WorkerLost

    @slo_task(pool="lambda")
    @task
    def dies_once(flag: str) -> str:
        if not os.path.exists(flag):
            open(flag, "w").close()
            os._exit(3)
        return "alive"

    def body():
        return dies_once.submit(str(tmp_path / "a")).result(raise_on_failure=False)

    error = run(body)
    assert isinstance(error, WorkerLost)
    assert "exit status 3" in str(error)
    again = slo_task(pool="lambda", idempotent=True)(task(undeclared(dies_once.fn)))

    def second():
        return again.submit(str(tmp_path / "b")).result()

    assert run(second) == "alive"


def test_throttled_calls_wait_and_nothing_is_lost(run: Callable[..., Any]) -> None:
    with Faults(Fault("lambda.Invoke", "throttle", probability=0.3), seed=3) as faults:
        found = run(lambda: shift.map(range(20)).result())
    assert found == [x + OFFSET for x in range(20)]
    assert faults.struck["lambda.Invoke", "throttle"] > 0


def test_where_lambda_cannot_be_reached_a_task_runs_here_though_it_may_run_once_only(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing has run there: that is no lost reply."""
    monkeypatch.setattr(invoke, "UNREACHED_TRIES", 2)
    with Faults(Fault("lambda.Invoke", "unreachable")) as faults:
        assert run(lambda: where_am_i.submit().result()) == os.getpid()
    assert faults.calls["lambda.Invoke"] >= 2
    assert "AWS cannot be reached" in caplog.text


def test_concurrency_is_never_exceeded(run: Callable[..., Any], account: LocalAws) -> None:
    account.lambdas.concurrency = 2
    try:
        account.lambdas.throttled.clear()
        assert run(lambda: shift.map(range(12)).result(), max_workers=2) == [x + OFFSET for x in range(12)]
        assert not account.lambdas.throttled
    finally:
        account.lambdas.concurrency = 1000


def test_a_lost_reply_never_runs_the_work_twice_and_its_bill_is_said_to_be_unknown(
    run: Callable[..., Any], account: LocalAws, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @slo_task(pool="lambda")
    @task
    def note(x: int) -> int:
        with open(tmp_path / "effects", "a") as effects:
            effects.write(f"{x}\n")
        return x

    once, told = account.pool(memory_mb=(256,), once=True), Told()
    with Faults(Fault("lambda.Invoke", "lost-reply", when="after", probability=0.4), seed=1) as faults:
        assert run(lambda: note.map(range(10)).result(), pools=once, director=told) == list(range(10))
    lost = faults.struck["lambda.Invoke", "lost-reply"]
    assert lost > 0
    assert told.runs[0].untold == lost
    assert f"{lost} invocations and jobs may have been billed" in caplog.text
    assert math.isnan(told.runs[0].stage_runs[0].billed_s), "which nothing is learned from"
    assert sorted((tmp_path / "effects").read_text().split(), key=int) == [str(x) for x in range(10)]


def test_s3_that_asks_to_slow_down_is_waited_for(run: Callable[..., Any]) -> None:
    @slo_task(pool="lambda")
    @task
    def size(data: bytes) -> int:
        return len(data)

    with Faults(Fault("s3.PutObject", "slow-down", times=2)) as faults:
        assert run(lambda: size.submit(b"x" * 5_000_000).result()) == 5_000_000
    assert faults.struck["s3.PutObject", "slow-down"] == 2


def test_a_run_costs_what_lambda_bills_to_the_last_digit(run: Callable[..., Any], account: LocalAws) -> None:
    for record in ("full", "bare"):
        told, before = Told(Recipe(record=record, bundle=3)), len(account.lambdas.invocations)
        run(lambda: shift.map(range(7)).result(), director=told)
        prices, done = price_list("aws-lambda-x86"), account.lambdas.invocations[before:]
        billed = sum((bill(prices, one.memory_mb, one.billed_ms) for one in done), Decimal())
        assert told.runs[0].cost_usd == float(billed)
        assert {one.cost_usd for one in told.runs[0].stage_runs} == {float(billed)}


def test_a_runs_row_says_what_was_billed_and_for_how_many_requests(run: Callable[..., Any], account: LocalAws) -> None:
    told, before = Told(), len(account.lambdas.invocations)
    run(lambda: shift.map(range(7)).result(), director=told, pools=account.pool(memory_mb=(256,), once=True))
    done, prices = account.lambdas.invocations[before:], price_list("aws-lambda-x86")
    [row] = told.runs[0].stage_runs
    assert row.requests == len(done) == 7
    assert row.billed_s == pytest.approx(sum(one.billed_ms for one in done) / 1000, abs=1e-9)
    assert row.storage_usd == pytest.approx(7 * 2 * 5e-6), "a claim and a result for each"
    billed = sum((bill(prices, one.memory_mb, one.billed_ms) for one in done), Decimal())
    assert row.cost_usd == pytest.approx(float(billed) + row.storage_usd, rel=1e-12)


def test_an_invocation_tells_where_its_time_went(run: Callable[..., Any], account: LocalAws) -> None:
    @slo_task(pool="lambda")
    @task
    def echo(data: bytes) -> bytes:
        return bytes(bytearray(data))

    account.lambdas.reap()
    told, before = Told(), len(account.lambdas.invocations)
    storm = Fault("lambda.Invoke", "throttle", times=2)
    with Faults(storm):
        run(lambda: [echo.submit(os.urandom(1 << 20) * 6).result() for _ in range(2)] and None, director=told)
    (cold, warm), done = told.invocations, account.lambdas.invocations[before:]
    assert [one.billed_ms for one in (cold, warm)] == [one.billed_ms for one in done]
    assert [one.requests for one in (cold, warm)] == [1, 1]
    assert cold.init_s == pytest.approx(done[0].init_ms / 1000, abs=1e-4)
    assert (cold.cold, warm.cold, warm.init_s) == (True, False, 0.0)
    assert cold.waited_s > 0
    for one in (cold, warm):
        for name in ("read_s", "load_s", "compute_s", "dump_s", "cpu_s", "peak_memory_mb"):
            assert getattr(one, name) > 0, name
        assert one.write_s > one.dump_s, "the result went over S3"
        assert min(one.bytes_in, one.bytes_out) > 6 << 20


def test_objects_are_part_of_what_a_run_has_cost(run: Callable[..., Any], account: LocalAws) -> None:
    @slo_task(pool="lambda")
    @task
    def echo(data: bytes) -> bytes:
        return data

    told, counted = Told(), Faults()
    with counted:
        run(lambda: echo.submit(os.urandom(1 << 20) * 6).result(), director=told)
    here = {name: counted.calls[f"s3.{name}"] for name in ("PutObject", "GetObject")}
    assert here == {"PutObject": 1, "GetObject": 1}
    worker = 5e-6 + 4e-7  # one read of the arguments, one write of the result, over there
    assert told.runs[0].stage_runs[0].storage_usd == pytest.approx(5e-6 + 4e-7 + worker)


def test_functions_that_are_not_deployed_leave_the_flow_running_and_say_so(run: Callable[..., Any], caplog) -> None:
    absent = LambdaPool(memory_mb=(128,), prefix="absent", region="us-east-1")
    assert run(lambda: where_am_i.submit().result(), pools=absent) == os.getpid()
    assert "prefect-slo aws deploy" in caplog.text


def test_a_package_that_was_not_deployed_is_named(run: Callable[..., Any], caplog) -> None:
    @slo_task(pool="lambda")
    @task
    def arrays() -> str:
        return np.__name__

    assert run(lambda: arrays.submit().result()) == "numpy"
    assert "No module named 'numpy'" in caplog.text


@slo_task(pool="lambda")
@task
def where_am_i() -> int:
    return os.getpid()


def test_prefects_logger_of_a_lost_task_still_works(run: Callable[..., Any]) -> None:
    def body():
        get_run_logger().info("a flow on Lambda")
        return shift.submit(1).result()

    assert run(body) == 1 + OFFSET


def test_another_python_on_the_worker_is_refused_and_named(run: Callable[..., Any], monkeypatch, caplog) -> None:
    """What one minor version pickles another can't always load: nothing is tried."""
    from types import SimpleNamespace

    from prefect_slo.aws import exchange

    monkeypatch.setattr(exchange, "sys", SimpleNamespace(version_info=(3, 99, 0)))
    assert run(lambda: where_am_i.submit().result()) == os.getpid()
    assert "pickled by Python 3.99" in caplog.text


def test_sizes_have_the_vcpus_of_their_memory(pool: LambdaPool) -> None:
    assert [(size.memory_mb, round(size.vcpus, 3)) for size in pool.pool.sizes] == [(256, 0.145), (512, 0.289)]
    assert pool.pool.sizes[0] == Size(256 / 1769, 256, hardware="lambda")


@pytest.mark.parametrize("record", ["full", "bare"])
def test_a_run_spends_no_more_than_it_may(run: Callable[..., Any], account: LocalAws, record: Any) -> None:
    most = 5e-6  # a dozen invocations or so
    before = len(account.lambdas.invocations)

    def body():
        return [future.state.name for future in shift.map(range(60)) if future.wait() is None]

    capped = account.pool(memory_mb=(256,), concurrency=4, max_spend_usd=most)
    names = run(body, pools=capped, record=record, bundle=1)
    done = account.lambdas.invocations[before:]
    costs = [bill(price_list("aws-lambda-x86"), one.memory_mb, one.billed_ms) for one in done]
    assert names.count("Completed") == len(done) < 60
    assert set(names) == {"Completed", "Failed"}
    assert most <= sum(costs) < Decimal(str(most)) + max(costs)
