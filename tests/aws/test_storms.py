"""What goes wrong in numbers: right results all the same, and nothing done more often than it had to be."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task

from prefect_slo import LambdaPool, SLOTaskRunner, slo_task
from prefect_slo.aws.clients import client as aws_client
from prefect_slo.aws.exchange import Exchange
from prefect_slo.aws.invoke import Invoker
from prefect_slo.aws.report import bill
from prefect_slo.charges import charge
from prefect_slo.pricing import price_list
from prefect_slo.testing.aws import Fault, Faults, LocalAws

PRICES = price_list("aws-lambda-x86")


@dataclass
class Clock:
    """Time that passes by waiting, and by a second for each answer."""

    now: float = 0.0
    waited: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sleep(self, cancelled: threading.Event, seconds: float) -> bool:
        with self._lock:
            self.now += seconds
            self.waited.append(seconds)
        return cancelled.is_set()

    def answered(self, client: Any) -> Any:
        """A client that takes a second for each answer."""
        clock = self

        class Answered:
            def invoke(self, **asked: Any) -> Any:
                answer = client.invoke(**asked)
                with clock._lock:
                    clock.now += 1.0
                return answer

        return Answered()


class OnClock(LambdaPool):
    """A pool whose throttled calls wait on another clock."""

    clock = Clock()

    def exchange(self) -> Exchange:
        lambdas = aws_client("lambda", region=self.region, endpoint=None, read_s=60, connections=self.concurrency)
        invoker = Invoker(self.clock.answered(lambdas), PRICES, self.patience_s, seed=0, sleep=self.clock.sleep)
        return Exchange(invoker, self._store, self.once)


@pytest.fixture
def run(prefect_server: str) -> Callable[..., Any]:
    def on(pool: LambdaPool, body: Callable[[], Any], **settings: Any) -> Any:
        return flow(task_runner=SLOTaskRunner(pools=[pool], **settings))(body)()

    return on


def effects(folder: Path) -> Counter[int]:
    """How often each item has had its effect."""
    path = folder / "effects"
    return Counter(map(int, path.read_text().split())) if path.exists() else Counter()


def test_a_minute_in_which_every_third_call_is_throttled_costs_waiting_alone(
    run: Callable[..., Any], account: LocalAws, tmp_path: Path
) -> None:
    @slo_task(pool="lambda")
    @task
    def note(x: int) -> int:
        with open(tmp_path / "effects", "a") as file:
            file.write(f"{x}\n")
        return x * x

    clock = OnClock.clock = Clock()
    account.pool(memory_mb=(256,), concurrency=4)
    pool = OnClock(
        memory_mb=(256,), concurrency=4, role=account.role, bucket=account.bucket, timeout_s=30, region="us-east-1"
    )
    storm = Fault("lambda.Invoke", "throttle", probability=0.3, lasts=lambda: clock.now < 60)
    before = len(account.lambdas.invocations)
    with Faults(storm, seed=5) as faults:
        assert run(pool, lambda: note.map(range(100)).result(), max_workers=4) == [x * x for x in range(100)]
    assert effects(tmp_path) == dict.fromkeys(range(100), 1)
    assert len(account.lambdas.invocations) - before == 100
    struck = faults.struck["lambda.Invoke", "throttle"]
    assert 10 < struck < 50
    assert len(clock.waited) == struck, "each throttled call waited once, and was made again"
    assert clock.now > 60, "the storm was over before the flow was"


def test_of_a_hundred_items_with_seven_bad_ones_only_these_run_again(
    run: Callable[..., Any], account: LocalAws, tmp_path: Path
) -> None:
    bad = {3, 14, 15, 62, 65, 79, 97}

    @slo_task(pool="lambda")
    @task(retries=1)
    def note(x: int) -> int:
        with open(tmp_path / "effects", "a") as file:
            file.write(f"{x}\n")
        mark = tmp_path / f"bad-{x}"
        if x in bad and not mark.exists():
            mark.touch()
            raise ValueError(x)
        return x * x

    before = len(account.lambdas.invocations)
    pool = account.pool(memory_mb=(256,), concurrency=4)
    assert run(pool, lambda: note.map(range(100)).result(), max_workers=4) == [x * x for x in range(100)]
    assert {x for x, times in effects(tmp_path).items() if times == 2} == bad
    assert sum(effects(tmp_path).values()) == len(account.lambdas.invocations) - before == 107


def test_sandboxes_that_are_killed_take_only_their_own_items_with_them(
    run: Callable[..., Any], account: LocalAws, tmp_path: Path
) -> None:
    @slo_task(pool="lambda", idempotent=True)
    @task
    def note(x: int) -> int:
        with open(tmp_path / "effects", "a") as file:
            file.write(f"{x}\n")
        if x < 3 and effects_there(tmp_path / "effects", x) == 1:
            time.sleep(60)  # until it is killed
        return x * x

    pool = account.pool(memory_mb=(384,), concurrency=3)
    begun, name = threading.Event(), pool.functions.name(384)

    def outage() -> None:
        while len(effects(tmp_path)) < 3:
            if begun.wait(0.01):
                return
        account.lambdas.kill(name)

    killer = threading.Thread(target=outage)
    killer.start()
    try:
        assert run(pool, lambda: note.map(range(20)).result(), max_workers=3) == [x * x for x in range(20)]
    finally:
        begun.set()
        killer.join()
    assert effects(tmp_path) == {x: 2 if x < 3 else 1 for x in range(20)}


def effects_there(path: Path, item: int) -> int:
    return path.read_text().split().count(str(item))


def test_keys_keep_effects_single_through_lost_replies_throttling_and_s3(
    run: Callable[..., Any], account: LocalAws, tmp_path: Path
) -> None:
    @slo_task(pool="lambda")
    @task
    def note(x: int) -> int:
        with open(tmp_path / "effects", "a") as file:
            file.write(f"{x}\n")
        return x * x

    pool = account.pool(memory_mb=(256,), concurrency=4, once=True)
    rules = (
        Fault("lambda.Invoke", "lost-reply", when="after", times=4),  # once for each worker; three in a row give up
        Fault("lambda.Invoke", "throttle", probability=0.2),
        Fault("s3.*", "slow-down", times=2),
    )
    with Faults(*rules, seed=4) as faults:
        assert run(pool, lambda: note.map(range(40)).result(), max_workers=4) == [x * x for x in range(40)]
    assert effects(tmp_path) == dict.fromkeys(range(40), 1)
    assert faults.struck["lambda.Invoke", "lost-reply"] == 4
    assert faults.struck["lambda.Invoke", "throttle"] > 3


def test_a_cap_counts_objects_too_and_is_passed_by_one_invocation_at_most(
    run: Callable[..., Any], account: LocalAws
) -> None:
    @slo_task(pool="lambda")
    @task
    def square(x: int) -> int:
        return x * x

    most, before = 2.5e-4, len(account.lambdas.invocations)
    pool = account.pool(memory_mb=(256,), concurrency=4, once=True, max_spend_usd=most)

    def body() -> list[str]:
        return [future.state.name for future in square.map(range(60)) if future.wait() is None]

    with Faults(Fault("lambda.Invoke", "throttle", probability=0.3), seed=2):
        names = run(pool, body, max_workers=4, record="full")
    objects = 2 * Decimal(repr(charge("s3.put").value))  # a claim and a result
    costs = [bill(PRICES, one.memory_mb, one.billed_ms) + objects for one in account.lambdas.invocations[before:]]
    assert set(names) == {"Completed", "Failed"}
    assert names.count("Completed") == len(costs)
    assert most <= sum(costs) < Decimal(repr(most)) + max(costs)
