"""Jobs on Batch: arrays for fan-out, retries by rule, a minute at least, few looks; queues, states and policies."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import cloudpickle
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from prefect_slo import BatchJobs, BatchPool, BatchQueue
from prefect_slo.aws.arrays import Submitter
from prefect_slo.aws.exchange import Exchange, Order, Returned
from prefect_slo.aws.invoke import Failed
from prefect_slo.aws.jobs import PATIENCE_S, BatchInvoker, Watch, end_jobs
from prefect_slo.aws.report import NOTHING, Billed
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.aws.spending import CappedCaller, SpendLimit
from prefect_slo.aws.storage import at_most
from prefect_slo.errors import InvalidValue
from prefect_slo.runner.backends.aws_lambda import LambdaBackend
from prefect_slo.runner.payloads import by_value
from prefect_slo.testing.aws import Faults, LocalAws, local_aws

REGION = "us-east-1"


@pytest.fixture(scope="module")
def account() -> Iterator[LocalAws]:
    with local_aws() as account:
        yield account


@pytest.fixture(scope="module")
def jobs(account: LocalAws) -> BatchJobs:
    jobs = BatchJobs(account.batch.queue(), "image", memory_mb=2048, poll_s=(0.02, 0.1), gather_s=0.3, region=REGION)
    jobs.deploy()
    return jobs


@pytest.fixture(scope="module")
def store(account: LocalAws) -> S3Prefix:
    return S3Prefix.of(account.bucket, region=REGION)


def sent(exchange: Exchange, function: Callable[..., Any], *args: Any, key: str) -> Returned:
    with by_value():
        code = cloudpickle.dumps(function)
    call = [(1, cloudpickle.dumps((args, {})))]
    return exchange.run("", Order("function", code, call, ("runs", key)))


def value(returned: Returned) -> Any:
    [one] = returned.items[:1]
    loaded = cloudpickle.loads(one.payload)
    return loaded[0] if one.failed else loaded


def test_a_fan_out_is_one_array_job(jobs: BatchJobs, store: S3Prefix) -> None:
    def place(n: int) -> tuple[int, str]:
        return n, os.environ["AWS_BATCH_JOB_ARRAY_INDEX"]

    exchange = Exchange(BatchInvoker(jobs, store), store)
    with Faults() as faults, ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: value(sent(exchange, place, n, key=f"array-{n}")), range(4)))
    assert [n for n, _ in made] == [0, 1, 2, 3], "each has its own event"
    assert sorted(index for _, index in made) == ["0", "1", "2", "3"]
    assert faults.calls["batch.SubmitJob"] == 1
    array = max(boto3.client("batch").list_jobs(jobQueue=jobs.queue, jobStatus="SUCCEEDED")["jobSummaryList"],
                key=lambda job: job["createdAt"])  # fmt: skip
    assert array["status"] == "SUCCEEDED"
    store.forget([("runs", f"array-{n}") for n in range(4)])
    assert store.delete("runs", "array-0") == 0, "its list of events is forgotten, too"


def test_one_that_fails_in_an_array_takes_no_other_with_it(jobs: BatchJobs, store: S3Prefix) -> None:
    def fails_at_one(n: int) -> int:
        if n == 1:
            print("one says goodbye", flush=True)
            os._exit(9)
        return n

    exchange = Exchange(BatchInvoker(jobs, store), store)

    def run(n: int) -> Any:
        try:
            return value(sent(exchange, fails_at_one, n, key=f"partly-{n}"))
        except Failed as failed:
            return failed

    with ThreadPoolExecutor(3) as pool:
        first, failed, last = pool.map(run, range(3))
    assert (first, last) == (0, 2)
    assert failed.why == "died"
    assert "exit code 9" in str(failed)
    assert "one says goodbye" in str(failed)
    described = boto3.client("batch").list_jobs(jobQueue=jobs.queue, jobStatus="FAILED")["jobSummaryList"]
    assert any(":" not in job["jobId"] for job in described), "and the array has failed"


def test_arrays_have_their_largest_size_and_a_refusal_reaches_everyone(store: S3Prefix, monkeypatch) -> None:
    asked: list[dict[str, Any]] = []

    def submit(name: str, event: str, **more: Any) -> str:
        asked.append(more)
        if name == "refused":
            raise ConnectionError("no")
        return f"job-{len(asked)}"

    monkeypatch.setattr("prefect_slo.aws.arrays.MOST", 3)
    gathered = threading.Event()
    together = Submitter(submit, store, 1.0, wait=lambda _: gathered.wait(20) and None)
    with ThreadPoolExecutor(7) as pool:
        waiting = [pool.submit(together.job, "fine", f"w/{n}") for n in range(7)]
        while len(together._asked) < 7:
            time.sleep(0.005)
        gathered.set()
        ids = sorted(one.result() for one in waiting)
    assert ids == ["job-1:0", "job-1:1", "job-1:2", "job-2:0", "job-2:1", "job-2:2", "job-3"]
    assert [more.get("arrayProperties", {}).get("size") for more in asked] == [3, 3, None]
    gathered.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(together.job, "refused", f"r/{n}") for n in range(2)]
        while len(together._asked) < 2:
            time.sleep(0.005)
        gathered.set()
        assert all(isinstance(one.exception(), ConnectionError) for one in waiting)


def test_a_machine_taken_back_is_another_attempt_and_a_failure_none(
    account: LocalAws, jobs: BatchJobs, store: S3Prefix, tmp_path: Path
) -> None:
    patient = replace(jobs, attempts=3, only_lost=True)
    patient.deploy()
    exchange = Exchange(BatchInvoker(patient, store), store)

    def attempts(folder: str) -> str:
        tries = Path(folder) / "tries"
        with tries.open("a") as file:
            file.write(os.environ["AWS_BATCH_JOB_ATTEMPT"])
        if len(tries.read_text()) < 2:
            time.sleep(120)
        return tries.read_text()

    def reclaim() -> None:
        while not (tmp_path / "tries").exists():
            time.sleep(0.02)
        account.batch.reclaim()

    thief = threading.Thread(target=reclaim)
    thief.start()
    returned = sent(exchange, attempts, str(tmp_path), key="spot")
    thief.join()
    assert value(returned) == "12"
    assert returned.answer.billed.usd == 2 * 60 * Decimal(repr(jobs.usd_s)), "both attempts, a minute at least each"
    with pytest.raises(Failed, match="exit code 5"):
        sent(exchange, lambda: os._exit(5), key="fails")
    [failed] = [
        job for job in boto3.client("batch").list_jobs(jobQueue=jobs.queue, jobStatus="FAILED")["jobSummaryList"]
        if job["jobDefinition"].split("/")[-1].startswith(patient.definition)
    ]  # fmt: skip
    [described] = boto3.client("batch").describe_jobs(jobs=[failed["jobId"]])["jobs"]
    assert len(described["attempts"]) == 1


def test_a_claimed_run_whose_machine_was_taken_back_is_given_up_at_once(
    account: LocalAws, jobs: BatchJobs, store: S3Prefix, tmp_path: Path
) -> None:
    patient = replace(jobs, attempts=3, only_lost=True)
    patient.deploy()
    begun = tmp_path / "begun"

    def runs(path: str) -> None:
        with Path(path).open("a") as file:
            file.write("x")
        time.sleep(300)

    def reclaim() -> None:
        while not begun.exists():
            time.sleep(0.02)
        account.batch.reclaim()

    thief = threading.Thread(target=reclaim)
    thief.start()
    with pytest.raises(Failed, match="claimed this work and left no result") as caught:
        sent(Exchange(BatchInvoker(patient, store), store, once=True), runs, str(begun), key="claimed")
    thief.join()
    assert caught.value.why == "unknown"
    assert begun.read_text() == "x"


def test_an_attempt_that_never_started_costs_nothing(jobs: BatchJobs, store: S3Prefix) -> None:
    invoker = BatchInvoker(jobs, store)
    assert invoker._bill({"attempts": []}) == NOTHING
    assert invoker._bill({"attempts": [{"startedAt": 0, "stoppedAt": 5}]}) == NOTHING
    long = invoker._bill({"attempts": [{"startedAt": 1000, "stoppedAt": 91_000}]})
    assert long == Billed(90 * Decimal(repr(jobs.usd_s)), 90_000, 1)


MINUTE_MS = 60_000
ENDED = {"startedAt": 1 * MINUTE_MS, "stoppedAt": 5 * MINUTE_MS}


@pytest.mark.parametrize(
    ("described", "minutes"),
    [
        ({"status": "RUNNING", "startedAt": 1 * MINUTE_MS}, 9),
        ({"status": "RUNNING", "attempts": [{"startedAt": 1 * MINUTE_MS}]}, 9),
        ({"status": "RUNNING", "startedAt": 7 * MINUTE_MS, "attempts": [ENDED]}, 7),
        ({"status": "FAILED", "startedAt": 1 * MINUTE_MS, "stoppedAt": 3 * MINUTE_MS}, 2),
        ({"status": "RUNNABLE"}, 0),
        (None, None),
    ],
)
def test_a_cancelled_job_is_billed_until_it_was_terminated(
    store: S3Prefix, described: dict[str, Any] | None, minutes: int | None
) -> None:
    terminated = threading.Event()

    class Service:
        def submit_job(self, **_: Any) -> dict[str, str]:
            return {"jobId": "job-1"}

        def describe_jobs(self, jobs: list[str]) -> dict[str, Any]:
            if not terminated.is_set():
                cancelled.set()
                return {"jobs": [{"jobId": "job-1", "status": "RUNNING"}]}
            return {"jobs": [{"jobId": "job-1", **described}] if described is not None else []}

        def terminate_job(self, **_: Any) -> None:
            terminated.set()

    class Jobs(BatchJobs):
        batch = submitting = Service()

    cancelled, event = threading.Event(), {"out": {"key": "runs/gone"}, "fn": {}, "args": {}}
    jobs = Jobs("queue", "image", gather_s=0, poll_s=(0.001, 0.001))
    invoker, limit = BatchInvoker(jobs, store, now=lambda: 600.0), SpendLimit(Decimal(9))
    capped = CappedCaller(invoker, limit, lambda name: Decimal(5))
    with pytest.raises(Failed, match="cancelled"):
        capped.call("", event, again=False, cancelled=cancelled)
    worst = Decimal(5) + at_most(event).usd
    assert limit.spent_usd == (worst if minutes is None else minutes * 60 * Decimal(repr(jobs.usd_s)))


def test_an_array_whose_jobs_fail_at_once_has_failed(account: LocalAws, jobs: BatchJobs) -> None:
    """The jobs ask for a GPU, and there is none; moto tells an array of its jobs after it has started all of them."""
    wanting = replace(jobs, gpu=1)
    definition = wanting.deploy()
    array = wanting.batch.submit_job(
        jobName="wanting", jobQueue=wanting.queue_name, jobDefinition=definition, arrayProperties={"size": 20}
    )["jobId"]
    deadline = time.monotonic() + 20
    while wanting.batch.describe_jobs(jobs=[array])["jobs"][0]["status"] != "FAILED":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_jobs_under_way_are_ended_with_their_run(store: S3Prefix) -> None:
    ended, looked = list[str](), threading.Event()

    class Service:
        def submit_job(self, **_: Any) -> dict[str, str]:
            return {"jobId": "array:1"}

        def describe_jobs(self, jobs: list[str]) -> dict[str, Any]:
            looked.set()
            return {"jobs": [{"jobId": "array:1", "status": "FAILED" if ended else "RUNNING"}]}

        def terminate_job(self, jobId: str, reason: str) -> None:
            ended.append(jobId)

    class Jobs(BatchJobs):
        batch = submitting = Service()

    jobs = Jobs("queue", "image", gather_s=0, poll_s=(0.001, 0.001))
    invoker = BatchInvoker(jobs, store)
    exchange = Exchange(invoker, store)
    backends = {
        key: LambdaBackend(exchange, lambda _: "", concurrency=1, memory_mb=4096, run_key=key)
        for key in ("run-a", "run-b")
    }
    event = {"out": {"key": store.key("runs", "run-a", "1")}, "fn": {}, "args": {}}
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(invoker.call, "", event, again=False, cancelled=threading.Event())
        assert looked.wait(20)
        backends["run-b"].shutdown()
        assert not ended, "that run is another one"
        backends["run-a"].shutdown()
        assert isinstance(waits.exception(20), Failed)
    end_jobs()
    assert ended == ["array"], "the whole of it, and once"


def test_a_job_whose_reply_cannot_be_read_is_paid_for(store: S3Prefix) -> None:
    class Service:
        def submit_job(self, **_: Any) -> dict[str, str]:
            return {"jobId": "job-1"}

        def describe_jobs(self, jobs: list[str]) -> dict[str, Any]:
            return {"jobs": [{"jobId": "job-1", "status": "SUCCEEDED", "startedAt": 1000, "stoppedAt": 91_000}]}

    class Jobs(BatchJobs):
        batch = submitting = Service()

    jobs = Jobs("queue", "image", gather_s=0, poll_s=(0.001, 0.001))
    with pytest.raises(Failed, match="NoSuchKey") as failed:
        sent(Exchange(BatchInvoker(jobs, store), store), time.time, key="unreadable")
    assert (failed.value.why, failed.value.billed.ms) == ("unknown", 90_000)


def test_jobs_are_looked_at_a_hundred_to_a_request_and_seldom(monkeypatch) -> None:
    """250 jobs that end in the third round: three rounds of three requests, further and further apart."""
    asked: list[int] = []
    pauses: list[float] = []
    everyone = threading.Event()

    class Service:
        def describe_jobs(self, jobs: list[str]) -> dict[str, Any]:
            everyone.wait(20)
            asked.append(len(jobs))
            status = "SUCCEEDED" if len(asked) > 6 else "RUNNABLE"
            return {"jobs": [{"jobId": job, "status": status} for job in jobs]}

    watch = Watch(Service(), 0.001, 0.01)
    monkeypatch.setattr(watch._fresh, "wait", lambda pause=None: pauses.append(pause))
    with ThreadPoolExecutor(250) as pool:
        waiting = [pool.submit(watch.ended, f"job-{n:03}", threading.Event()) for n in range(250)]
        while len(watch._waiting) < 250:
            time.sleep(0.005)
        everyone.set()
        assert all(one.result()["status"] == "SUCCEEDED" for one in waiting)
    assert max(asked) <= 100
    assert sum(asked[-3:]) == 250


class Passing:
    """Time that passes by waiting alone."""

    def __init__(self) -> None:
        self.now, self.waited = 0.0, list[float]()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.now += seconds


UNREACHED = EndpointConnectionError(endpoint_url="http://batch")


def refusal(code: str, status: int) -> ClientError:
    told = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(told, "DescribeJobs")  # type: ignore[arg-type]


class Looks:
    """A Batch that answers each look in turn, the last for ever: with an error, a state, or nothing."""

    def __init__(self, *answers: Exception | str | None, ends: bool = True) -> None:
        self.answers, self.ends, self.terminated = list(answers), ends, list[str]()

    def submit_job(self, **_: Any) -> dict[str, str]:
        return {"jobId": "job-1"}

    def describe_jobs(self, jobs: list[str]) -> dict[str, Any]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return {"jobs": [{"jobId": job, "status": answer} for job in jobs] if answer else []}

    def terminate_job(self, *, jobId: str, reason: str) -> None:
        self.terminated.append(jobId)
        if not self.ends:
            raise UNREACHED


def watched(*answers: Exception | str | None) -> tuple[Watch, Passing]:
    passing = Passing()
    return Watch(Looks(*answers), 1.0, 1.0, clock=passing.clock, sleep=passing.sleep), passing


@pytest.mark.parametrize(
    "error", [UNREACHED, refusal("TooManyRequestsException", 429), refusal("ServerException", 500)]
)
def test_looks_that_fail_for_minutes_lose_no_job(error: Exception) -> None:
    passing = Passing()
    service = Looks("RUNNING", *[error] * 8, "SUCCEEDED")
    watch = Watch(service, 1.0, 60.0, clock=passing.clock, sleep=passing.sleep)
    watch._fresh.set()  # no pause between looks but those after a failure
    watch._fresh.clear = lambda: None  # type: ignore[method-assign]
    ended = watch.ended("first", threading.Event())
    assert ended is not None
    assert ended["status"] == "SUCCEEDED"
    assert passing.waited[1:9] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_looks_that_fail_for_ever_end_and_the_next_job_is_looked_at_again() -> None:
    watch, passing = watched(*[UNREACHED] * 601, "SUCCEEDED")
    with pytest.raises(Failed, match="cannot be looked at") as failed:
        watch.ended("first", threading.Event())
    assert failed.value.why == "unknown"
    assert passing.now == PATIENCE_S
    ended = watch.ended("second", threading.Event())
    assert ended is not None
    assert ended["status"] == "SUCCEEDED"


def test_who_may_not_look_hears_so_at_once() -> None:
    watch, passing = watched(refusal("AccessDeniedException", 403))
    with pytest.raises(Failed, match="AccessDenied"):
        watch.ended("first", threading.Event())
    assert passing.now == 0


def test_a_job_that_batch_says_nothing_of_for_long_is_given_up() -> None:
    watch, passing = watched(*[None] * 30, "SUCCEEDED")
    assert watch.ended("an array's", threading.Event()) == {"jobId": "an array's", "status": "SUCCEEDED"}
    watch, passing = watched(None)
    with pytest.raises(Failed, match="nothing of job lost for 600 s") as failed:
        watch.ended("lost", threading.Event())
    assert failed.value.why == "unknown"
    assert passing.now >= PATIENCE_S


@pytest.mark.parametrize(
    ("ends", "words"),
    [(True, "cannot be looked at .* asked to end it"), (False, "it may run on, .* for up to 3600 s .*--job-id job-1")],
)
@pytest.mark.parametrize("look", [UNREACHED, None])
def test_a_job_that_is_given_up_is_ended_or_said_to_run_on(
    store: S3Prefix, look: Exception | None, ends: bool, words: str
) -> None:
    service, passing = Looks(look, ends=ends), Passing()

    class Jobs(BatchJobs):
        batch = submitting = service

    jobs = Jobs("queue", "image", gather_s=0, poll_s=(1.0, 1.0), timeout_s=3600)
    invoker = BatchInvoker(jobs, store, clock=passing.clock, sleep=passing.sleep)
    with pytest.raises(Failed, match=words if look else words.partition(".*")[2]) as failed:
        sent(Exchange(invoker, store), time.time, key="unseen")
    assert service.terminated == ["job-1"]
    assert (failed.value.why, failed.value.lost) == ("unknown", 1)


# ---- queues, states, policies ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(account: LocalAws) -> dict[str, tuple[str, ...]]:
    ec2 = boto3.client("ec2", region_name=REGION)
    subnet = ec2.describe_subnets()["Subnets"][0]
    group = ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [subnet["VpcId"]]}])["SecurityGroups"][0]
    return {"subnets": (subnet["SubnetId"],), "security_groups": (group["GroupId"],)}


@pytest.fixture(scope="module")
def profile(account: LocalAws) -> str:
    iam = boto3.client("iam", region_name=REGION)
    made = iam.create_instance_profile(InstanceProfileName="machines")["InstanceProfile"]
    iam.create_role(RoleName="machines", AssumeRolePolicyDocument="{}")
    iam.add_role_to_instance_profile(InstanceProfileName="machines", RoleName="machines")
    return str(made["Arn"])


@pytest.mark.parametrize("kind", ["fargate", "fargate-spot", "ec2", "spot"])
def test_a_pool_makes_its_queue_and_takes_it_away(
    account: LocalAws, network: dict[str, Any], profile: str, kind: Any
) -> None:
    machines = {} if kind.startswith("fargate") else {"instance_role": profile, "instance_types": ("c5.large",)}
    queue = BatchQueue(f"own-{kind}", kind, **network, **machines, service_role=account.role, region=REGION)
    role = {"execution_role": account.role} if queue.fargate else {}
    jobs = BatchJobs(queue, "image", vcpus=1, memory_mb=2048, region=REGION, prefix=f"own-{kind}", **role)
    assert jobs.fargate == kind.startswith("fargate")
    pool = BatchPool(jobs, S3Prefix.of(f"{account.bucket}-{kind}", region=REGION))
    assert {row.state for row in pool.status()} == {"missing"}
    assert pool.deploy() == pool.deploy() == [pool.jobs.definition]
    assert [row.state for row in pool.status()] == ["deployed", "deployed"]
    [environment] = boto3.client("batch").describe_compute_environments(computeEnvironments=[queue.name])["computeEnvironments"]  # fmt: skip  # noqa: E501
    assert environment["computeResources"]["type"] == kind.upper().replace("-", "_")
    other = replace(pool.jobs, vcpus=2, memory_mb=4096)
    assert {row.name: row.state for row in other.status()}[pool.jobs.definition] == "old"
    boto3.client("batch").update_job_queue(jobQueue=queue.name, state="DISABLED")
    assert pool.status()[-1].state == "changed"
    assert other.destroy(only_old=True) == [pool.jobs.definition]
    assert pool.destroy() == [queue.name]
    assert pool.status()[-1].state == "missing"


def test_states_of_a_queue_of_somebody_else(jobs: BatchJobs) -> None:
    assert [row.state for row in jobs.status() if row.name == jobs.queue] == ["deployed"]
    assert replace(jobs, queue="nowhere").status()[-1].state == "missing"


def test_policies_say_the_least_that_is_needed(account: LocalAws, jobs: BatchJobs, network: dict[str, Any]) -> None:
    pool = BatchPool(replace(jobs, job_role="arn:aws:iam::1:role/job"), account.bucket)
    policy = pool.policy()
    actions = {who: {a for s in policy[who]["Statement"] for a in s["Action"]} for who in policy}
    assert {"batch:SubmitJob", "batch:DescribeJobs", "batch:TerminateJob", "s3:PutObject"} <= actions["caller"]
    assert actions["worker"] == {"s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload", "s3:ListBucket"}
    assert {"batch:RegisterJobDefinition", "iam:PassRole"} <= actions["deployer"]
    assert "batch:CreateComputeEnvironment" not in actions["deployer"], "the queue is somebody else's"
    own = replace(jobs, queue=BatchQueue("own", **network), execution_role="r")
    named = {a for s in own.policy()["deployer"] for a in s["Action"]}
    assert {"batch:CreateComputeEnvironment", "batch:DeleteJobQueue"} <= named
    assert json.dumps(policy)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "outpost"},
        {"subnets": ()},
        {"security_groups": ()},
        {"kind": "ec2"},
        {"max_vcpus": 0},
        {"name": ""},
    ],
)
def test_queues_that_batch_does_not_have_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        BatchQueue(**{"name": "q", "subnets": ("s",), "security_groups": ("g",), **settings})


@pytest.mark.parametrize(("vcpus", "memory_mb"), [(3, 8192), (0.25, 4096), (1, 1024), (1, 2500), (8, 17_000)])
def test_sizes_that_fargate_does_not_have_are_refused(vcpus: float, memory_mb: int) -> None:
    with pytest.raises(InvalidValue, match="Fargate"):
        BatchJobs("q", "i", vcpus=vcpus, memory_mb=memory_mb, fargate=True, execution_role="r")
    BatchJobs("q", "i", vcpus=4, memory_mb=9216, fargate=True, execution_role="r")
