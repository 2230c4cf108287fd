"""Results that stay on S3 and go from stage to stage there; values that many calls take are stored once."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import pytest
from prefect import allow_failure, flow, task, unmapped
from prefect.futures import wait

from prefect_slo import BatchJobs, BatchPool, LambdaPool, SLOTaskRunner, slo, slo_task
from prefect_slo.aws.kept import Shared, Value, place_of
from prefect_slo.aws.s3 import KNOWN_S, S3Prefix
from prefect_slo.aws.storage import Requests
from prefect_slo.errors import ResultLost
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.testing.aws import LocalAws

LARGE, SMALL = 5_000_000, 3_000_000
N = 4


@slo_task(pool="lambda")
@task
def make(byte: int, size: int = LARGE) -> bytes:
    return bytes([byte]) * size


@slo_task(pool="lambda")
@task
async def make_later(byte: int) -> bytes:
    return bytes([byte]) * LARGE


@slo_task(pool="lambda")
@task
def change(data: bytes) -> bytes:
    return bytes([data[0] + 1]) * len(data)


@slo_task(pool="lambda")
@task
def take(x: int, data: bytes) -> tuple[int, int, int]:
    return x, data[-1], len(data)


@slo_task(pool="lambda")
@task
def where(x: int, data: bytes) -> tuple[int, bool]:
    return x, "AWS_LAMBDA_FUNCTION_NAME" in os.environ


@slo_task(pool="lambda")
@task
def name(value: Any) -> str:
    return type(value).__name__


@slo_task(pool="lambda")
@task
def take_all(datas: list[bytes], named: dict[str, bytes] | None = None) -> list[int]:
    return [data[0] for data in (*datas, *(named or {}).values())]


class Told:
    """A director that keeps what runs have shown."""

    def __init__(self, record: Any = "full") -> None:
        self.record, self.runs = record, list[ObservedRun]()

    def recipe(self, *_: Any) -> Recipe:
        return Recipe(record=self.record, bundle=2)

    def heard(self, *_: Any) -> None: ...

    def observed(self, run: ObservedRun) -> None:
        self.runs.append(run)

    def storage_usd(self) -> dict[str, Decimal]:
        return {row.stage: Decimal(repr(row.storage_usd)) for row in self.runs[-1].stage_runs}


class Traffic:
    """What this process writes to S3 and reads from there."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def large(self, operation: str) -> int:
        """Requests of an operation that moved a megabyte and more."""
        return self.requests[f"{operation} large"]

    def heard(self, operation: str, size: int) -> None:
        self.requests[operation] += 1
        self.bytes[operation] += size
        self.requests[f"{operation} large"] += size >= 2**20


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    seen, original = Traffic(), botocore.client.BaseClient._make_api_call

    def call(self: Any, operation: str, wanted: dict[str, Any]) -> Any:
        sent = wanted.get("Body", wanted.get("Payload", b""))  # botocore puts a file in its place
        size = len(sent) if isinstance(sent, bytes | str) else 0
        answer = original(self, operation, wanted)
        if operation in ("PutObject", "UploadPart", "Invoke"):
            seen.heard(operation, size)
        if operation == "GetObject":
            seen.heard(operation, int(answer["ContentLength"]))
        return answer

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", call)
    return seen


@pytest.fixture(scope="module")
def pool(account: LocalAws) -> LambdaPool:
    return account.pool(memory_mb=(512,), concurrency=4)


@pytest.fixture(scope="module")
def jobs(account: LocalAws) -> BatchJobs:
    quick: dict[str, Any] = {"poll_s": (0.02, 0.1), "gather_s": 0.02}
    return BatchJobs(account.batch.queue(), "image", memory_mb=2048, region="us-east-1", **quick)


@pytest.fixture
def run(prefect_server: str, pool: LambdaPool) -> Callable[..., Any]:
    """Runs a function as a flow on the pool."""

    def on_lambda(body: Callable[[], Any], *, pools: tuple[Any, ...] = (), **settings: Any) -> Any:
        return flow(task_runner=SLOTaskRunner(pools=list(pools or (pool,)), **settings))(body)()

    return on_lambda


@pytest.fixture
def left(account: LocalAws) -> Iterator[Callable[[], list[str]]]:
    """Keys of what runs have left in the bucket, but for functions."""

    def keys() -> list[str]:
        found = boto3.client("s3").list_objects_v2(Bucket=S3Prefix.of(account.bucket).bucket).get("Contents", ())
        return [one["Key"] for one in found if "/code/" not in one["Key"]]

    yield keys
    assert not keys(), "a run has left something"


@pytest.mark.parametrize("record", ["full", "bare"])
def test_a_large_result_goes_to_the_calls_that_take_it_past_the_flows_process(
    run: Callable[..., Any], traffic: Traffic, left: Any, record: Any
) -> None:
    """Stored once by its worker, and read once by each invocation of those that take it; every request is paid for."""
    told = Told(record)

    def body() -> Any:
        return take.map(range(8), unmapped(make.submit(7))).result()

    assert run(body, director=told) == [(x, 7, LARGE) for x in range(8)]
    assert (traffic.large("PutObject"), traffic.large("GetObject"), traffic.large("Invoke")) == (0, 0, 0)
    reads = 4 if record != "full" else 8
    assert told.storage_usd() == {"make": Requests(puts=1).usd, "take": Requests(gets=reads).usd}


@pytest.mark.parametrize(("size", "stored"), [(LARGE, 1), (SMALL, 1), (100_000, 0)])
def test_what_the_flow_hands_to_many_calls_is_stored_once(
    run: Callable[..., Any], traffic: Traffic, left: Any, size: int, stored: int
) -> None:
    data = bytes([5]) * size
    assert run(lambda: take.map(range(6), unmapped(data)).result()) == [(x, 5, size) for x in range(6)]
    assert traffic.requests["PutObject"] == stored
    assert traffic.bytes["PutObject"] <= stored * (size + 1000)
    assert traffic.large("Invoke") == (size == SMALL), "with its first call, where it fits"


def test_values_pass_along_item_edges_and_all_together_and_in_async_tasks(
    run: Callable[..., Any], traffic: Traffic, left: Any
) -> None:
    def body() -> Any:
        made = make.map(range(N))
        changed = change.map(change.map(made))
        later, failed = make_later.submit(50), change.submit(b"")
        assert take.submit(1, allow_failure(made[2])).result() == (1, 2, LARGE)
        assert name.submit(allow_failure(failed)).result() == "IndexError"
        return take_all.submit(changed, {"later": later}).result(), take_all.submit([later, made[1]]).result()

    assert run(body) == ([2, 3, 4, 5, 50], [50, 1])
    assert (traffic.large("PutObject"), traffic.large("GetObject")) == (0, 0)


def test_what_the_flow_reads_comes_then_and_is_paid_for_and_outlives_the_run(
    run: Callable[..., Any], traffic: Traffic, left: Any
) -> None:
    told, held = Told(), list[Any]()

    def body() -> Any:
        made, more, unread, unwanted = (make.submit(n) for n in (1, 2, 3, 4))
        for future in (made, more, unread, unwanted):
            future.wait()
        assert traffic.large("GetObject") == 0
        data = made.result()
        assert made.result() is data
        assert traffic.large("GetObject") == 1
        held.append(more)
        assert take.submit(1, data).result() == (1, 1, LARGE)
        assert look.submit(unread).result() == (os.getpid(), LARGE)
        assert traffic.large("GetObject") == 2
        del unread, unwanted, future
        return len(data)

    assert run(body, director=told) == LARGE
    assert held[0].result() == bytes([2]) * LARGE
    assert traffic.large("GetObject") == 3, "nobody asks for the fourth"
    assert told.storage_usd()["make"] == Requests(puts=4, gets=3).usd


def test_tasks_whose_values_prefect_needs_get_them(run: Callable[..., Any], tmp_path: Path, left: Any) -> None:
    """Persisted results, names made of arguments, hooks that read results."""
    seen: list[int] = []

    def body() -> Any:
        made = make.with_options(on_completion=[lambda task, run, state: seen.append(len(state.result()))]).submit(1)
        named = take.with_options(task_run_name="take-{data[0]}").submit(1, made)
        stored = change.with_options(persist_result=True).submit(made)
        return named.result(), take.submit(2, stored).result(), stored.result()[:2]

    assert run(body) == ((1, 1, LARGE), (2, 2, LARGE), b"\x02\x02")
    assert seen == [LARGE]


@slo_task(pool="lambda")
@task
def note(folder: str) -> bytes:
    with open(f"{folder}/runs", "a") as file:
        file.write("x")
    return bytes(LARGE)


@slo_task(pool="lambda", idempotent=True)
@task
def note_again(folder: str) -> bytes:
    with open(f"{folder}/runs", "a") as file:
        file.write("x")
    return bytes(LARGE)


@slo_task(pool="batch")
@task
def change_on_batch(data: bytes) -> bytes:
    return bytes([data[0] + 1]) * len(data)


@slo_task(isolation="thread")
@task
def look(data: bytes) -> tuple[int, int]:
    return os.getpid(), len(data)


def empty(account: LocalAws) -> None:
    """Delete every result, as a rule of the bucket would."""
    client = boto3.client("s3")
    for found in client.list_objects_v2(Bucket=S3Prefix.of(account.bucket).bucket).get("Contents", ()):
        if found["Key"].endswith("/result"):
            client.delete_object(Bucket=S3Prefix.of(account.bucket).bucket, Key=found["Key"])


def test_a_result_that_is_gone_is_said_to_be_so_to_a_worker_and_to_the_flow(
    run: Callable[..., Any], account: LocalAws, tmp_path: Path, left: Any
) -> None:
    def body() -> list[ResultLost]:
        made = [note.submit(str(tmp_path)) for _ in range(2)]
        wait(made)
        empty(account)
        lost = []
        for future in (*(take.submit(x, made[0]) for x in range(5)), made[1]):
            with pytest.raises(ResultLost, match="is not there any more") as found:
                future.result()
            lost.append(found.value)
        return lost

    assert {lost.stage for lost in run(body)} == {"note"}
    assert (tmp_path / "runs").read_text() == "xx"


def test_a_result_that_is_gone_is_made_again_by_a_task_that_may_run_again(
    run: Callable[..., Any], account: LocalAws, tmp_path: Path, left: Any
) -> None:
    def body() -> Any:
        made = note_again.submit(str(tmp_path))
        made.wait()
        empty(account)
        return take.map(range(2), unmapped(made)).result()

    assert run(body, record="bare") == [(x, 0, LARGE) for x in range(2)]
    assert (tmp_path / "runs").read_text() == "xx"


def test_a_flow_that_fails_fetches_nothing_of_what_it_holds_and_makes_nothing_again(
    prefect_server: str, account: LocalAws, pool: LambdaPool, traffic: Traffic, tmp_path: Path, left: Any
) -> None:
    held = list[Any]()

    @slo(latency="60s", mode="observe")
    @flow(task_runner=SLOTaskRunner(pools=[pool]))
    def fails() -> None:
        held.append(note_again.submit(str(tmp_path)))
        held[0].wait()
        empty(account)
        held.append(make.submit(1))
        held[1].wait()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    assert traffic.large("GetObject") == 0
    assert (tmp_path / "runs").read_text() == "x"
    with pytest.raises(ResultLost, match="its flow run failed"):
        held[1].result()


def test_a_value_that_many_take_is_stored_again_where_it_is_gone(
    run: Callable[..., Any], account: LocalAws, traffic: Traffic, left: Any
) -> None:
    data = bytes(LARGE)

    def body() -> Any:
        first = take.submit(1, data).result()
        client = boto3.client("s3")
        for found in client.list_objects_v2(Bucket=S3Prefix.of(account.bucket).bucket).get("Contents", ()):
            if "/shared/" in found["Key"]:
                client.delete_object(Bucket=S3Prefix.of(account.bucket).bucket, Key=found["Key"])
        return first, where.map(range(8), unmapped(data)).result()

    assert run(body) == ((1, 0, LARGE), [(x, True) for x in range(8)]), "however many found it gone at once"
    assert traffic.large("PutObject") == 2


def test_results_go_from_lambda_to_batch_and_back_in_one_bucket(
    run: Callable[..., Any], account: LocalAws, pool: LambdaPool, jobs: BatchJobs, traffic: Traffic, left: Any
) -> None:
    batch = BatchPool(jobs, account.bucket, concurrency=2)
    batch.deploy()

    def body() -> Any:
        return take.submit(1, change_on_batch.submit(make.submit(3))).result()

    assert run(body, pools=(pool, batch)) == (1, 4, LARGE)
    assert (traffic.large("PutObject"), traffic.large("GetObject")) == (0, 0)


@slo_task(pool="lambda")
@task
def change_where_there_is_room(data: bytes) -> bytes:
    if "AWS_LAMBDA_FUNCTION_NAME" in os.environ:
        raise OSError(errno.ENOSPC, "full")
    return bytes([data[0] + 1]) * len(data)


def test_what_lambda_leaves_to_batch_takes_and_leaves_values_there_too(
    run: Callable[..., Any], account: LocalAws, jobs: BatchJobs, traffic: Traffic, left: Any
) -> None:
    both = account.pool(memory_mb=(512,), concurrency=4, batch=jobs, prefix="both")

    def body() -> Any:
        return take.submit(1, change_where_there_is_room.submit(make.submit(3))).result()

    assert run(body, pools=(both,)) == (1, 4, LARGE)
    assert (traffic.large("PutObject"), traffic.large("GetObject")) == (0, 0)


def test_a_pool_of_another_folder_gets_values_by_way_of_the_flow(
    run: Callable[..., Any], account: LocalAws, pool: LambdaPool, traffic: Traffic, left: Any
) -> None:
    other = account.pool(memory_mb=(512,), concurrency=4, bucket=f"{account.bucket}-too", name="other")
    change_there = slo_task(pool="other")(change)

    def body() -> Any:
        made = make.submit(3)
        return take_all.submit([change_there.submit(made), change_there.submit(made), made]).result()

    assert run(body, pools=(pool, other)) == [4, 4, 3]
    assert (traffic.large("PutObject"), traffic.large("GetObject")) == (1, 3), "stored once for both calls there"


def test_a_claimed_invocation_leaves_its_values_beside_its_result(
    run: Callable[..., Any], account: LocalAws, traffic: Traffic, left: Any
) -> None:
    once = account.pool(memory_mb=(512,), concurrency=4, once=True, prefix="claims")

    def body() -> Any:
        return take.map(range(2), unmapped(make.submit(9))).result()

    assert run(body, pools=(once,)) == [(x, 9, LARGE) for x in range(2)]
    assert (traffic.large("PutObject"), traffic.large("GetObject")) == (0, 0)


def test_pools_that_are_given_the_same_folder_share_a_place() -> None:
    one, other = S3Prefix("b", "p"), S3Prefix("b", "p/", region="eu-west-1")
    assert place_of(one) is place_of(other)
    assert place_of(one) is not place_of(S3Prefix("b", "p", sse="aws:kms"))
    assert place_of(one) is not place_of(S3Prefix("b", "q"))


class Refusing:
    """A store that refuses its first write."""

    def __init__(self) -> None:
        self.puts = 0

    def put(self, key: str, body: bytes) -> None:
        self.puts += 1
        if self.puts == 1:
            raise OSError("no")


def test_a_value_whose_write_was_refused_is_written_when_it_is_next_taken() -> None:
    shared, store, value = Shared(), Refusing(), Value("sha", b"content")
    with pytest.raises(OSError, match="no"):
        shared.store(value, store, "key")  # type: ignore[arg-type]
    assert shared.store(value, store, "key") == Requests(puts=1)  # type: ignore[arg-type]
    assert shared.store(value, store, "key") == Requests()  # type: ignore[arg-type]
    assert store.puts == 2


class Kept:
    """A store that counts what is written."""

    def __init__(self) -> None:
        self.puts = 0

    def put(self, key: str, body: bytes) -> None:
        self.puts += 1


def test_a_value_is_stored_again_before_the_bucket_deletes_it() -> None:
    now, store, value = [0.0], Kept(), Value("sha", b"content")
    shared = Shared(lambda: now[0])
    for passed, puts in ((0.0, 1), (KNOWN_S - 1, 1), (KNOWN_S, 2), (KNOWN_S + 1, 2)):
        now[0] = passed
        shared.store(value, store, "key")  # type: ignore[arg-type]
        assert store.puts == puts


def test_one_loss_of_a_value_is_one_however_many_calls_tell_of_it() -> None:
    now, store, value = [0.0], Kept(), Value("sha", b"content")
    shared = Shared(lambda: now[0])
    shared.store(value, store, "key")  # type: ignore[arg-type]
    now[0] = 1.0
    assert shared.lose(value, sent=0.5)
    shared.store(value, store, "key")  # type: ignore[arg-type]
    assert shared.lose(value, sent=0.7), "sent before it was stored again"
    shared.store(value, store, "key")  # type: ignore[arg-type]
    assert store.puts == 2
    assert not shared.lose(value, sent=1.5)
    assert not shared.lose(value, sent=1.6)
