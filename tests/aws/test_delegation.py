"""Lambda, then Batch: the right path in every case, nothing lost, nothing written twice, every cause and cost told."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import cloudpickle
import pytest
from prefect import flow, task

from prefect_slo import BatchJobs, BatchPool, LambdaPool, SLOTaskRunner, slo_task
from prefect_slo.aws.delegating import Ends
from prefect_slo.aws.exchange import Order, Returned
from prefect_slo.aws.invoke import Failed
from prefect_slo.aws.report import bill
from prefect_slo.control.delegation import LEAST_SEEN, Needs
from prefect_slo.errors import InvalidValue, OutOfMemory, TaskTimedOut
from prefect_slo.pricing import price_list
from prefect_slo.runner.payloads import by_value
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.testing.aws import Fault, Faults, LocalAws, local_aws
from prefect_slo.testing.aws.disk import own_file_systems

QUICK = (0.02, 0.1)


@pytest.fixture(scope="module")
def account() -> Iterator[LocalAws]:
    with local_aws(gpus=1) as account:
        yield account


@pytest.fixture(scope="module")
def jobs(account: LocalAws) -> BatchJobs:
    quick: dict[str, Any] = {"poll_s": QUICK, "gather_s": 0.0}
    return BatchJobs(account.batch.queue(), "image", memory_mb=2048, timeout_s=60, region="us-east-1", **quick)


@pytest.fixture(scope="module")
def pool(account: LocalAws, jobs: BatchJobs) -> LambdaPool:
    return account.pool(memory_mb=(256,), timeout_s=2, batch=jobs, patience_s=0.2)


def run(pool: LambdaPool, function: Callable[..., Any], *args: Any) -> Any:
    """The value of one call, sent as the backend sends it."""
    return value(sent(pool, function, *args))


def sent(pool: LambdaPool, function: Callable[..., Any], *args: Any) -> Returned:
    with by_value():
        code = cloudpickle.dumps(function)
    name, call = pool.functions.name(256), [(1, cloudpickle.dumps((args, {})))]
    key = ("runs", "r", str(time.monotonic_ns()))
    return pool.exchange().run(name, Order("function", code, call, key))


def value(returned: Returned) -> Any:
    [one] = returned.items[:1]
    loaded = cloudpickle.loads(one.payload)
    return loaded[0] if one.failed else loaded


def on_lambda() -> bool:
    return "AWS_LAMBDA_FUNCTION_NAME" in os.environ


def where(_: Any = None) -> str:
    return "lambda" if on_lambda() else "batch"


def too_slow_there(x: int) -> tuple[int, str]:
    if on_lambda():
        time.sleep(60)
    return x, where()


def too_large_there(x: int) -> tuple[int, str]:
    data = b"1" * (400 << 20)
    time.sleep(0.3)
    return x + (len(data) >> 60), where()


def fails_everywhere() -> None:
    if on_lambda():
        time.sleep(60)
    print("the job says goodbye", flush=True)
    os._exit(7)


def test_what_fits_stays_on_lambda(pool: LambdaPool) -> None:
    assert run(pool, where) == "lambda"


def test_a_timeout_goes_to_batch_and_both_are_paid_for(pool: LambdaPool, account: LocalAws) -> None:
    before = len(account.lambdas.invocations)
    returned = sent(pool, too_slow_there, 7)
    assert value(returned) == (7, "batch")
    [lost] = account.lambdas.invocations[before:]
    assert lost.error == "Sandbox.Timedout"
    on_lambda_usd = bill(price_list("aws-lambda-x86"), lost.memory_mb, lost.billed_ms)
    job_usd = returned.answer.billed.usd - on_lambda_usd
    assert job_usd == Decimal(60) * Decimal(repr(pool.batch.usd_s)), "a minute of a job at least"
    assert returned.answer.billed.requests == 2, "an invocation and a job"
    assert returned.answer.billed.ms == lost.billed_ms + 60_000


def test_running_out_of_memory_goes_to_batch(account: LocalAws, jobs: BatchJobs) -> None:
    roomy = account.pool(memory_mb=(256,), timeout_s=30, batch=jobs)
    assert run(roomy, too_large_there, 8) == (8, "batch")


def fills_the_disk_there(x: int, folder: str) -> tuple[int, str]:
    with (Path(folder) / f"{x}-{where()}").open("a") as file:
        file.write("x")
    if on_lambda() and x == 2:
        with open("/dev/full", "wb") as full:
            full.write(bytes(100_000))
    return x, where()


def test_what_finds_the_disk_full_goes_to_batch_and_nothing_else(pool: LambdaPool, tmp_path: Path) -> None:
    with by_value():
        code = cloudpickle.dumps(fills_the_disk_there)
    calls = [(n, cloudpickle.dumps(((n, str(tmp_path)), {}))) for n in range(1, 4)]
    returned = pool.exchange().run(pool.functions.name(256), Order("function", code, calls, ("runs", "full")))
    assert [cloudpickle.loads(one.payload) for one in returned.items] == [(1, "lambda"), (2, "batch"), (3, "lambda")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-lambda", "2-batch", "2-lambda", "3-lambda"]
    assert returned.answer.billed.usd > 60 * Decimal(repr(pool.batch.usd_s)), "both are paid for"


def test_without_batch_a_full_disk_is_the_tasks_own_exception(account: LocalAws, tmp_path: Path) -> None:
    error = run(account.pool(memory_mb=(256,)), fills_the_disk_there, 2, str(tmp_path))
    assert isinstance(error, OSError)


def test_a_storm_of_throttling_goes_to_batch_after_patience(pool: LambdaPool) -> None:
    with Faults(Fault("lambda.Invoke", "throttle")) as faults:
        assert run(pool, where) == "batch"
    assert faults.struck["lambda.Invoke", "throttle"] >= 3


def test_where_both_fail_the_error_has_both_causes(pool: LambdaPool) -> None:
    with pytest.raises(Failed) as failed:
        sent(pool, fails_everywhere)
    assert "on Lambda: Sandbox.Timedout" in str(failed.value)
    assert "on Batch" in str(failed.value)
    assert "exit code 7" in str(failed.value)
    assert "the job says goodbye" in str(failed.value), "the end of its log"


@slo_task(pool="lambda")
@task
def fated(what: str, folder: str) -> tuple[str, str]:
    with (Path(folder) / f"{what}-{where()}").open("a") as file:
        file.write("x")
    if on_lambda() and what == "slow":
        time.sleep(60)
    if on_lambda() and what == "large":
        too_large_there(1)
    if on_lambda() and what == "full":
        with open("/dev/full", "wb") as full:
            full.write(bytes(100_000))
    if what == "wrong":
        raise LookupError(what)
    return what, where()


def test_whatever_calls_meet_no_input_is_lost_and_none_is_done_twice(
    prefect_server: str, pool: LambdaPool, tmp_path: Path
) -> None:
    """The rule table by a flow: each call ends where its rule says, once on each side that it came to."""
    fates = ["fine", "slow", "large", "full", "wrong", "fine too"]

    with Faults(Fault("lambda.Invoke", "throttle", times=1)):
        made: list[Any] = []

        @flow(task_runner=SLOTaskRunner(pools=[pool], record="bare"))
        def each() -> None:
            futures = fated.map(fates, str(tmp_path))
            futures.wait()
            made.extend(future.state for future in futures)

        each(return_state=True)
    ends = [state.result(raise_on_failure=False) for state in made]
    assert ends[:4] == [("fine", "lambda"), ("slow", "batch"), ("large", "batch"), ("full", "batch")]
    assert isinstance(ends[4], LookupError), "an exception of the task goes nowhere"
    assert ends[5] == ("fine too", "lambda")
    done = {path.name: path.read_text() for path in tmp_path.iterdir()}
    moved = {f"{what}-{place}" for what in ("slow", "large", "full") for place in ("lambda", "batch")}
    assert done == dict.fromkeys({"fine-lambda", "fine too-lambda", "wrong-lambda", *moved}, "x")


class Told:
    """A director that keeps what a run has shown."""

    def __init__(self) -> None:
        self.runs: list[ObservedRun] = []

    def recipe(self, flow_name: str, run_id: str, parameters: Any) -> Recipe:
        return Recipe(record="bare")

    def heard(self, invocation: Any, run_id: str) -> None: ...

    def observed(self, run: ObservedRun) -> None:
        self.runs.append(run)


def test_a_run_counts_every_invocation_and_every_job_that_it_is_billed_for(
    prefect_server: str, pool: LambdaPool, account: LocalAws, tmp_path: Path
) -> None:
    told, invoked, jobs = Told(), len(account.lambdas.invocations), account.batch.states.copy()

    @flow(task_runner=SLOTaskRunner(pools=[pool], director=told))
    def each() -> Any:
        return fated.map(["fine", "slow", "full"], str(tmp_path)).result()

    assert [place for _, place in each()] == ["lambda", "batch", "batch"]
    done, ran = account.lambdas.invocations[invoked:], account.batch.states - jobs
    assert (len(done), ran) == (3, {"SUCCEEDED": 2})
    [row] = told.runs[0].stage_runs
    assert row.requests == 5
    functions = sum((bill(price_list("aws-lambda-x86"), one.memory_mb, one.billed_ms) for one in done), Decimal())
    at_least = functions + 2 * 60 * Decimal(repr(pool.batch.usd_s))
    assert row.cost_usd == pytest.approx(float(at_least) + row.storage_usd, rel=1e-9)


@slo_task(pool="lambda", idempotent=False)
@task
def with_an_effect(folder: str) -> None:
    with (Path(folder) / "effects").open("a") as file:
        file.write("x")
    if on_lambda():
        time.sleep(60)


def test_what_ran_on_lambda_runs_nowhere_again_where_batch_takes_no_jobs(
    prefect_server: str, account: LocalAws, jobs: BatchJobs, tmp_path: Path
) -> None:
    pool = account.pool(memory_mb=(256,), timeout_s=1, batch=replace(jobs, queue="no-such-queue"))
    made: list[Any] = []

    @flow(task_runner=SLOTaskRunner(pools=[pool], record="bare"))
    def once() -> None:
        future = with_an_effect.submit(str(tmp_path))
        future.wait()
        made.append(future.state)

    once(return_state=True)
    [state] = made
    assert state.is_failed()
    assert state.name == "TimedOut"
    assert "Sandbox.Timedout" in str(state.message)
    assert "no job could be submitted" in str(state.message)
    assert (tmp_path / "effects").read_text() == "x"


@slo_task(pool="lambda")
@task
def takes_400_mb() -> None:
    too_large_there(1)


@slo_task(pool="closed")
@task(timeout_seconds=45)
def takes_a_minute() -> None:
    time.sleep(60)


def test_what_a_flow_says_of_a_loss_has_both_causes(prefect_server: str, account: LocalAws, jobs: BatchJobs) -> None:
    """And names what to raise: where Batch had the last word that is the memory of its jobs."""
    pool = account.pool(memory_mb=(256,), timeout_s=2, batch=replace(jobs, memory_mb=200))
    closed = account.pool(memory_mb=(256,), timeout_s=1, batch=replace(jobs, queue="no-such-queue"), name="closed")
    made: list[Any] = []

    @flow(task_runner=SLOTaskRunner(pools=[pool, closed], record="bare"))
    def both() -> None:
        futures = [takes_400_mb.submit(), takes_a_minute.submit()]
        for future in futures:
            future.wait()
        made.extend(future.state for future in futures)

    both(return_state=True)
    full, late = (state.result(raise_on_failure=False) for state in made)
    assert isinstance(full, OutOfMemory)
    assert "on Lambda: Runtime.OutOfMemory" in str(made[0].message)
    assert "then on Batch: job" in str(made[0].message)
    assert "BatchJobs(memory_mb=" in str(made[0].message)
    assert full.limit_mb == 200
    assert isinstance(late, TaskTimedOut)
    assert "on Lambda: Sandbox.Timedout" in str(made[1].message)
    assert "then on Batch: no job could be submitted" in str(made[1].message)


def takes_disk(mb: int) -> tuple[int, str]:
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, mb << 20)
    return mb, where()


def test_a_task_that_needs_more_temporary_disk_than_its_function_has_goes_to_batch(
    account: LocalAws, jobs: BatchJobs
) -> None:
    if own_file_systems() is None or shutil.disk_usage(tempfile.gettempdir()).free < 2 << 30:
        pytest.skip("sandboxes can have no disk of their own here, or this machine, which jobs have, too little")
    before, pool = len(account.lambdas.invocations), account.pool(memory_mb=(256,), batch=jobs, storage_mb=512)
    assert run(pool, takes_disk, 600) == (600, "batch")
    assert run(pool, takes_disk, 50) == (50, "lambda")
    assert len(account.lambdas.invocations) == before + 2


def test_an_exception_of_the_task_goes_nowhere(pool: LambdaPool) -> None:
    def refuse() -> None:
        raise LookupError("no")

    assert isinstance(run(pool, refuse), LookupError)


def test_without_batch_a_timeout_is_a_failure(account: LocalAws) -> None:
    alone = account.pool(memory_mb=(256,), timeout_s=1)
    with pytest.raises(Failed, match="Timedout"):
        sent(alone, too_slow_there, 1)


def test_what_no_function_has_goes_to_batch_at_once(pool: LambdaPool, account: LocalAws) -> None:
    before = len(account.lambdas.invocations)
    assert run(replace(pool, needs=Needs(gpu=1)), where) == "batch"
    assert run(replace(pool, needs=Needs(storage_mb=20_000)), where) == "batch"
    assert len(account.lambdas.invocations) == before


def test_what_keeps_overrunning_is_not_tried_on_lambda_for_ever(account: LocalAws, jobs: BatchJobs) -> None:
    pool = account.pool(memory_mb=(256,), timeout_s=1, batch=replace(jobs, launch_s=0.1))
    with by_value():
        exchange, code = pool.exchange(), cloudpickle.dumps(too_slow_there)
    before = len(account.lambdas.invocations)
    exchange._ends[hashlib.sha256(code).hexdigest()] = Ends(deque([(1.0, False)] * (LEAST_SEEN - 1)))
    for n in range(2):
        call = [(1, cloudpickle.dumps(((n,), {})))]
        returned = exchange.run(pool.functions.name(256), Order("function", code, call, ("runs", "k", str(n))))
        assert value(returned) == (n, "batch")
    assert len(account.lambdas.invocations) - before == 1


def test_a_job_that_is_lost_is_started_again_as_often_as_it_may(
    account: LocalAws, jobs: BatchJobs, tmp_path: Path
) -> None:
    def fails_twice(folder: str) -> str:
        tries = Path(folder) / "tries"
        with tries.open("a") as file:
            file.write("x")
        if len(tries.read_text()) < 3:
            os._exit(1)
        return tries.read_text()

    pool = account.pool(memory_mb=(256,), batch=replace(jobs, attempts=3), needs=Needs(gpu=1))
    assert run(pool, fails_twice, str(tmp_path)) == "xxx"


def test_a_job_that_outgrows_its_memory_says_so(account: LocalAws, jobs: BatchJobs) -> None:
    pool = account.pool(memory_mb=(256,), batch=replace(jobs, memory_mb=200), needs=Needs(gpu=1))
    with pytest.raises(Failed, match="OutOfMemory") as failed:
        sent(pool, too_large_there, 1)
    assert (failed.value.why, failed.value.memory_mb) == ("memory", 200)


def test_gpus_are_held_one_job_at_a_time_and_shown_to_it(account: LocalAws, jobs: BatchJobs) -> None:
    def device() -> str:
        time.sleep(0.2)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    pool = account.pool(memory_mb=(256,), batch=replace(jobs, gpu=1), needs=Needs(gpu=1))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(run(pool, device))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["0", "0", "0"]
    assert account.batch.most_gpus == 1


def test_a_cancelled_job_is_terminated(pool: LambdaPool, account: LocalAws) -> None:
    gone = threading.Event()
    code, call = cloudpickle.dumps(time.sleep), [(1, cloudpickle.dumps(((60,), {})))]
    exchange = replace(pool, needs=Needs(gpu=1)).exchange()
    threading.Timer(1.0, gone.set).start()
    with pytest.raises(Failed, match="cancelled"):
        exchange.run(pool.functions.name(256), Order("function", code, call, ("runs", "gone"), cancelled=gone))
    deadline = time.monotonic() + 30
    while not account.batch.states["FAILED"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert account.batch.states["FAILED"] > 0


def test_results_are_written_once(pool: LambdaPool) -> None:
    """A result on S3 is never written over: not by a job either that runs the same event again."""
    from prefect_slo.aws import worker

    out = {"bucket": pool.bucket.bucket, "key": pool.bucket.key("runs", "twice")}
    worker._STATE["s3"] = None
    assert worker._put(out, "result", b"first")
    assert not worker._put(out, "result", b"second")
    assert worker._found(out, "result") == b"first"
    worker._STATE["s3"] = None


def test_a_definition_is_registered_once_and_changes_with_its_settings(jobs: BatchJobs) -> None:
    assert jobs.deploy() == jobs.deploy()
    assert replace(jobs, vcpus=2).definition != jobs.definition
    found = boto3.client("batch").describe_job_definitions(jobDefinitionName=jobs.definition)["jobDefinitions"]
    assert len(found) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"gpu": 1, "fargate": True},
        {"fargate": True},
        {"timeout_s": 30},
        {"attempts": 11},
        {"vcpus": 0},
        {"prices": "x"},
    ],
)
def test_settings_that_batch_does_not_have_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        BatchJobs("queue", "image", **settings)
    with pytest.raises(InvalidValue, match="bucket"):
        LambdaPool(batch=BatchJobs("queue", "image"))


@slo_task(pool="batch")
@task
def place_of(x: int) -> tuple[int, str]:
    return x, where()


def test_a_flow_runs_a_stage_on_batch(prefect_server: str, account: LocalAws, jobs: BatchJobs) -> None:
    pool = BatchPool(jobs, account.bucket, concurrency=3)
    pool.deploy()

    @flow(task_runner=SLOTaskRunner(pools=[pool], record="bare", bundle=2))
    def places() -> Any:
        return place_of.map(range(4)).result()

    assert places() == [(x, "batch") for x in range(4)]


def test_a_pool_of_jobs_spends_no_more_than_it_may(prefect_server: str, account: LocalAws, jobs: BatchJobs) -> None:
    minute_usd = 60 * jobs.usd_s
    pool = BatchPool(jobs, account.bucket, concurrency=1, once=True, max_spend_usd=1.5 * minute_usd)
    pool.deploy()

    @flow(task_runner=SLOTaskRunner(pools=[pool], record="bare", bundle=1))
    def places() -> Any:
        return [future.state for future in place_of.map(range(4)) if future.wait() is None]

    states = places(return_state=True).result(raise_on_failure=False)
    assert sorted(state.name for state in states) == ["Completed", "Completed", "Failed", "Failed"]
    assert all("max_spend_usd" in str(state.message) for state in states if state.name == "Failed")
