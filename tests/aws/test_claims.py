"""A reply that is lost, whoever asks again: the work is done once, and nobody waits for itself."""

from __future__ import annotations

import base64
import json
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import cloudpickle
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError

from prefect_slo import BatchJobs
from prefect_slo.aws import worker
from prefect_slo.aws.clients import forget_clients
from prefect_slo.aws.exchange import Exchange, Order, Returned
from prefect_slo.aws.invoke import Failed
from prefect_slo.aws.jobs import SUBMIT_TRIES, BatchInvoker
from prefect_slo.aws.refusals import PERMIT, QUEUE
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.runner.payloads import by_value
from prefect_slo.testing.aws import Fault, Faults, LocalAws

REGION = "us-east-1"


def note(path: str) -> str:
    with Path(path).open("a") as file:
        file.write("x")
    return "done"


def order(function: Callable[..., Any], *args: Any, key: str) -> Order:
    with by_value():
        code = cloudpickle.dumps(function)
    return Order("function", code, [(1, cloudpickle.dumps((args, {})))], ("runs", key))


def value(returned: Returned) -> Any:
    [one] = returned.items[:1]
    loaded = cloudpickle.loads(one.payload)
    return loaded[0] if one.failed else loaded


@pytest.fixture
def insistent(account: LocalAws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A user who has told botocore to try everything again, by every way that there is."""
    config = tmp_path / "config"
    keys = "aws_access_key_id = testing\naws_secret_access_key = testing\n"
    config.write_text(f"[default]\nmax_attempts = 7\nretry_mode = standard\n[profile mine]\nmax_attempts = 9\n{keys}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
    monkeypatch.setenv("AWS_RETRY_MODE", "adaptive")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", boto3.session.Session(profile_name="mine", region_name=REGION))
    forget_clients()
    yield
    forget_clients()


@pytest.mark.parametrize("once", [False, True])
def test_a_reply_that_is_lost_runs_nothing_twice_however_often_botocore_would_ask(
    account: LocalAws, insistent: None, tmp_path: Path, once: bool
) -> None:
    pool = account.pool(memory_mb=(256,), once=once)
    name, effects = pool.functions.name(256), tmp_path / "effects"
    with Faults(Fault("lambda.Invoke", "lost-reply", "after", times=1)) as faults:
        boto3.client("lambda").invoke(FunctionName=name, Payload=b'{"warm": true}')
    assert faults.calls["lambda.Invoke"] == 2, "a client as the user has set it up asks twice"
    with Faults(Fault("lambda.Invoke", "lost-reply", "after", times=1)) as faults, suppress(Failed):
        returned = pool.exchange().run(name, order(note, str(effects), key=f"lost-{once}"))
        assert once
        assert value(returned) == "done"
        assert returned.answer.lost == 1
    assert effects.read_text() == "x"
    assert faults.calls["lambda.Invoke"] == 1 + once, "ours asks again where the work is claimed, and not else"


# ---- the claim itself -----------------------------------------------------------------------------------------------


@pytest.fixture
def here(account: LocalAws, monkeypatch: pytest.MonkeyPatch) -> S3Prefix:
    """The worker in this process."""
    monkeypatch.setitem(worker._STATE, "s3", None)
    monkeypatch.delenv("AWS_BATCH_JOB_ID", raising=False)
    return S3Prefix.of(account.bucket, region=REGION)


def handled(store: S3Prefix, function: Callable[..., Any], *args: Any, key: str, left_s: float = 60.0) -> Any:
    """The reply of a worker that has so long; what is left of it passes as it is asked for, and is soon over."""
    told: list[dict[str, Any]] = []

    class Here:
        def call(self, function: str, event: dict[str, Any], **_: Any) -> Any:
            told.append(event)
            raise Failed("cancelled", "")

    with suppress(Failed):
        Exchange(Here(), store, once=True).run("f", order(function, *args, key=key))  # type: ignore[arg-type]
    left = iter([left_s, left_s, left_s, *([0.0] * 1000)])
    context = SimpleNamespace(get_remaining_time_in_millis=lambda: 1000 * next(left))
    return worker.handler(told[0], context)


def test_a_claim_whose_own_reply_was_lost_is_known_by_its_run(here: S3Prefix, tmp_path: Path) -> None:
    """boto3 writes it again and is told that it is there: this run would wait for itself until its time is over."""
    with Faults(Fault("s3.PutObject", "lost-reply", "after", times=1)) as faults:
        reply = handled(here, note, str(tmp_path / "effects"), key="own-claim")
    assert faults.struck["s3.PutObject", "lost-reply"] == 1
    assert faults.calls["s3.PutObject"] == 3, "the claim, the claim again, the result"
    assert reply["ok"]
    assert "again" not in reply
    assert (tmp_path / "effects").read_text() == "x"


def test_a_second_run_finds_the_first_ones_result(here: S3Prefix, tmp_path: Path) -> None:
    replies = [handled(here, note, str(tmp_path / "effects"), key="twice") for _ in range(2)]
    assert replies[1]["again"]
    assert replies[0]["result"] == replies[1]["result"]
    assert (tmp_path / "effects").read_text() == "x"


def test_a_claim_of_a_run_whose_time_is_over_is_waited_for_no_longer(here: S3Prefix, tmp_path: Path) -> None:
    key = here.key("runs", "long-gone")
    until = time.time() - worker.SKEW_S - 1
    here.put(f"{key}/claim", json.dumps({"run": "other", "job": "", "until": until}).encode())
    with Faults() as faults:
        reply = handled(here, note, str(tmp_path / "effects"), key="long-gone", left_s=900)
    assert reply["error"]["kind"] == "claimed"
    assert faults.calls["s3.GetObject"] == 2, "the claim, and the result once"
    assert not (tmp_path / "effects").exists()


class Busy:
    """An S3 that is asked for one object by several at once."""

    def __init__(self, times: int) -> None:
        self.times, self.asked = times, 0

    def put_object(self, **_: Any) -> None:
        self.asked += 1
        if self.asked <= self.times:
            told = {"Error": {"Code": "ConditionalRequestConflict"}, "ResponseMetadata": {"HTTPStatusCode": 409}}
            raise ClientError(told, "PutObject")


@pytest.mark.parametrize(("times", "written"), [(0, True), (2, True), (99, False)])
def test_a_write_that_meets_another_is_tried_again(times: int, written: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    s3 = Busy(times)
    monkeypatch.setitem(worker._STATE, "s3", s3)
    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=lambda seconds: None))
    assert worker._put({"bucket": "b", "key": "k"}, "claim", b"x") == written
    assert s3.asked == min(times + 1, worker.CONFLICTS)


def test_a_large_result_that_an_earlier_attempt_has_left_is_told_with_its_own_size(
    here: S3Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts of a job may make results of different sizes; what is there stays, and is read to its end."""
    monkeypatch.setattr(worker, "INLINE_RESULT", 1000)
    out = {"bucket": here.bucket, "key": here.key("runs", "attempts")}
    first, second = pickle.dumps(bytes(5000)), pickle.dumps(bytes(2000))
    sizes = [worker._sent({"out": out}, result)["size"] for result in (first, second)]
    assert sizes == [len(first), len(first)]
    assert here.get(f"{out['key']}/result", sizes[1]) == first


# ---- jobs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs(account: LocalAws) -> BatchJobs:
    jobs = BatchJobs(account.batch.queue(), "image", memory_mb=2048, poll_s=(0.02, 0.1), gather_s=0.1, region=REGION)
    jobs.deploy()
    return jobs


def submitted(jobs: BatchJobs, key: str) -> list[dict[str, Any]]:
    """Jobs for some work, by their name."""
    listed = boto3.client("batch").list_jobs(
        jobQueue=jobs.queue_name, filters=[{"name": "JOB_NAME", "values": [f"{jobs.prefix}-{key}"]}]
    )
    return list(listed["jobSummaryList"])


def test_a_submission_whose_reply_was_lost_is_one_job(
    account: LocalAws, jobs: BatchJobs, insistent: None, tmp_path: Path
) -> None:
    store, waits = S3Prefix.of(account.bucket, region=REGION), list[float]()
    exchange = Exchange(BatchInvoker(jobs, store, sleep=waits.append), store)
    with Faults(Fault("batch.SubmitJob", "lost-reply", "after", times=1)) as faults:
        assert value(exchange.run("", order(note, str(tmp_path / "effects"), key="lostjob"))) == "done"
    assert faults.calls["batch.SubmitJob"] == 1
    assert len(submitted(jobs, "lostjob")) == 1
    assert (tmp_path / "effects").read_text() == "x"


def test_an_array_whose_submission_had_no_reply_is_found_too(
    account: LocalAws, jobs: BatchJobs, tmp_path: Path
) -> None:
    store = S3Prefix.of(account.bucket, region=REGION)
    exchange = Exchange(BatchInvoker(jobs, store), store)
    with Faults(Fault("batch.SubmitJob", "error", "after", times=1)) as faults, ThreadPoolExecutor(3) as pool:
        made = [
            pool.submit(exchange.run, "", order(note, str(tmp_path / str(n)), key=f"lostarray{n}")) for n in range(3)
        ]
        assert [value(one.result()) for one in made] == ["done"] * 3
    assert faults.struck["batch.SubmitJob", "error"] == 1
    assert [(tmp_path / str(n)).read_text() for n in range(3)] == ["x"] * 3


class Service:
    """A Batch that answers as it is told."""

    def __init__(self, error: Exception, listed: tuple[list[str], ...] = ()) -> None:
        self.error, self.listed, self.asked = error, list(listed), 0

    def submit_job(self, **_: Any) -> dict[str, str]:
        self.asked += 1
        raise self.error

    def list_jobs(self, **_: Any) -> dict[str, Any]:
        found = self.listed.pop(0) if self.listed else []
        return {"jobSummaryList": [{"jobId": job} for job in found]}


def invoker(service: Service) -> tuple[BatchInvoker, list[float]]:
    class Jobs(BatchJobs):
        batch = submitting = service

    waits: list[float] = []
    return BatchInvoker(Jobs("queue", "image", gather_s=0), S3Prefix("b"), sleep=waits.append), waits


def throttled() -> ClientError:
    told = {"Error": {"Code": "TooManyRequestsException"}, "ResponseMetadata": {"HTTPStatusCode": 429}}
    return ClientError(told, "SubmitJob")


LOST = ReadTimeoutError(endpoint_url="https://batch")


def test_a_job_that_appears_late_under_its_name_is_found() -> None:
    asked, waits = invoker(Service(LOST, listed=([], [], ["job-7"])))
    assert asked._submit("name", "s3://b/event") == "job-7"
    assert len(waits) == 2


def test_where_no_job_of_its_name_is_there_it_may_have_been_submitted() -> None:
    service = Service(LOST)
    asked, waits = invoker(service)
    with pytest.raises(Failed, match="none of its name is there") as failed:
        asked._submit("name", "s3://b/event")
    assert (failed.value.why, service.asked, len(waits)) == ("unknown", 1, SUBMIT_TRIES - 1)


def test_a_throttled_submission_waits_and_gives_up_in_the_end() -> None:
    service = Service(throttled())
    asked, waits = invoker(service)
    with pytest.raises(Failed, match="throttled") as failed:
        asked._submit("name", "s3://b/event")
    assert (failed.value.why, service.asked, len(waits)) == ("throttled", SUBMIT_TRIES, SUBMIT_TRIES - 1)


def refused(code: str, message: str, status: int = 400) -> ClientError:
    told = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(told, "SubmitJob")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "then"),
    [
        (refused("ClientException", "JobQueue jobs not found."), QUEUE),
        (refused("AccessDeniedException", "not authorized to perform batch:SubmitJob", 403), PERMIT),
        (EndpointConnectionError(endpoint_url="https://batch"), "endpoint=."),
    ],
)
def test_a_submission_that_is_refused_says_what_to_do_next(error: Exception, then: str) -> None:
    asked, _ = invoker(Service(error))
    with pytest.raises(Failed, match="no job could be submitted") as failed:
        asked._submit("name", "s3://b/event")
    assert failed.value.detail.endswith(then)


def test_names_of_jobs_are_never_cut_where_they_differ() -> None:
    made, _ = invoker(Service(LOST))
    long = "-".join(["run"] * 20)
    names = {made._name(f"prefix/ab/runs/{long}/{n}/1/batch") for n in (11, 12)}
    assert len(names) == 2
    assert all(len(name) <= 128 for name in names)


def test_a_claimed_reply_in_base64_is_the_result(here: S3Prefix, tmp_path: Path) -> None:
    reply = handled(here, note, str(tmp_path / "effects"), key="content")
    outcomes, chatter = pickle.loads(base64.b64decode(reply["result"]["b64"]))
    assert (len(outcomes), chatter) == (1, [])
