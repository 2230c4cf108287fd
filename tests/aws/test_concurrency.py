"""What an account lets run at once is read from it, and kept."""

from __future__ import annotations

from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from prefect import flow, task

from prefect_slo import LambdaPool, SLOTaskRunner, slo_task
from prefect_slo.aws.concurrency import Allowed, allowed, forget_allowed
from prefect_slo.aws.invoke import Failed
from prefect_slo.resources import Size
from prefect_slo.runner.backends.aws_lambda import LambdaBackend
from prefect_slo.runner.backends.protocol import Bundle, Lost, Opened
from prefect_slo.testing.aws import LocalAws


@pytest.fixture(autouse=True)
def anew(account: LocalAws):
    forget_allowed()
    yield
    account.lambdas.concurrency = 1000
    forget_allowed()


@slo_task(pool="lambda")
@task
def one_more(x: int) -> int:
    return x + 1


def test_the_account_says_what_it_has_and_what_functions_have_reserved(account: LocalAws) -> None:
    pool = account.pool(memory_mb=(128, 256), concurrency=4, prefix="asked")
    account.lambdas.concurrency = 300
    small, large = (pool.functions.name(memory) for memory in (128, 256))
    boto3.client("lambda").put_function_concurrency(FunctionName=large, ReservedConcurrentExecutions=120)
    found = pool.functions.allowed((128, 256))
    assert found == Allowed(300, 180, {large: 120})
    assert (found.of(small, 500), found.of(large, 500), found.of(large, 7)) == (180, 120, 7)
    assert (found.of_all([small, large], 500), found.of_all([large], 500), found.of_all([small], 9)) == (300, 120, 9)
    assert pool.destroy() == sorted([small, large])


def test_a_run_stays_within_what_the_account_has_and_says_so(
    account: LocalAws, prefect_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    account.lambdas.concurrency = 2
    account.lambdas.throttled.clear()
    pool = account.pool(memory_mb=(256,), concurrency=8)
    assert pool.capacity.workers == 8, "nobody has asked yet"
    body = flow(task_runner=SLOTaskRunner(pools=[pool], max_workers=8))(lambda: one_more.map(range(12)).result())
    assert body() == list(range(1, 13))
    assert not account.lambdas.throttled
    assert "asks for 8 invocations at once; its account has 2" in caplog.text
    assert pool.capacity.workers == 2, "plans count on it from now on"


def test_a_function_is_held_to_what_is_reserved_for_it_and_others_go_on() -> None:
    opened: list[int] = []

    def sink(report: Any) -> None:
        opened.append(report.lease)

    exchange: Any = SimpleNamespace(store=None)
    backend = LambdaBackend(exchange, str, concurrency=10, memory_mb=512, run_key="r", of_size={256: 2})
    for lease in range(4):
        backend.open(lease, Size(1, 256), sink)
    backend.open(9, Size(1, 512), sink)
    assert opened == [0, 1, 9], "the other size does not wait behind the one that is full"
    backend.close(0)
    assert opened == [0, 1, 9, 2]
    assert backend.capabilities().hardware == ("lambda",)
    backend.shutdown()


def test_a_lost_worker_makes_room_for_the_next() -> None:
    class Losing:
        store = None

        def run(self, *_: Any, **__: Any) -> Any:
            raise Failed("died", "killed")

    reports: SimpleQueue[Any] = SimpleQueue()
    exchange: Any = Losing()
    backend = LambdaBackend(exchange, str, concurrency=1, memory_mb=512, run_key="r")
    for lease in (1, 2, 3):
        backend.open(lease, Size(1, 256), reports.put)
    for lease in (1, 2, 3):
        opened = reports.get(timeout=30)
        assert isinstance(opened, Opened)
        assert opened.lease == lease
        backend.submit(lease, Bundle(lease, "p", b"program", ((lease, b""),)))
        # the next lease may be up before the loss of this one is told
        kinds = {type(report := reports.get(timeout=30)): report for _ in range(1 if lease == 3 else 2)}
        assert kinds[Lost].lease == lease
        if Opened in kinds:
            reports.put(kinds[Opened])
    backend.shutdown()


class Client:
    """Answers as an account does, or refuses."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses, self.asked = refuses, 0

    def get_account_settings(self) -> dict[str, Any]:
        self.asked += 1
        if self.refuses:
            raise ClientError({"Error": {"Code": self.refuses, "Message": "no"}}, "GetAccountSettings")
        return {"AccountLimit": {"ConcurrentExecutions": 50, "UnreservedConcurrentExecutions": 40}}

    def get_function_concurrency(self, FunctionName: str) -> dict[str, Any]:
        if FunctionName == "missing":
            raise ClientError({"Error": {"Code": "ResourceNotFoundException"}}, "GetFunctionConcurrency")
        return {"ReservedConcurrentExecutions": 10} if FunctionName == "held" else {}


def test_an_answer_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect_slo.aws import concurrency

    now = [1000.0]
    monkeypatch.setattr(concurrency, "time", SimpleNamespace(monotonic=lambda: now[0]))
    client = Client()
    for passed, asked in ((0, 1), (concurrency.KEPT_S - 1, 1), (2, 2)):
        now[0] += passed
        assert allowed(client, None, None, ["held", "missing", "free"]) == Allowed(50, 40, {"held": 10})
        assert client.asked == asked
    allowed(client, None, None, ["held", "missing", "free"], fresh=True)
    assert client.asked == 3


def test_who_may_not_ask_goes_by_what_was_set() -> None:
    found = allowed(Client("AccessDeniedException"), "eu-west-1", None, ["f"])
    assert "AccessDenied" in found.refused
    assert (found.of("f", 64), found.of_all(["f"], 64)) == (64, 64)


def test_the_permissions_to_ask_are_part_of_the_callers_policy() -> None:
    statements = LambdaPool(memory_mb=(128,)).policy()["caller"]["Statement"]
    assert {"lambda:GetAccountSettings", "lambda:GetFunctionConcurrency"} <= {
        a for s in statements for a in s["Action"]
    }
