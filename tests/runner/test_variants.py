"""Task objects with the same code: which are one, and that a run remembers a bounded number of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from datetime import timedelta

import pytest
from prefect import Task, flow, task
from prefect.cache_policies import INPUTS

from prefect_slo.runner import variants
from prefect_slo.runner.task_runner import SLOTaskRunner
from prefect_slo.runner.variants import Variants


@task
def plain(x: int) -> int:
    return x


def key_of(context: object, parameters: dict[str, object]) -> str:
    return str(parameters)


keyed = task(cache_key_fn=key_of)(plain.fn)


def adder(n: int) -> Task:
    @task
    def add(x: int) -> int:
        return x + n

    return add


@pytest.mark.parametrize(
    "again",
    [
        lambda: plain,
        lambda: plain.with_options(),
        lambda: plain.with_options(retries=0, tags=set()),
    ],
)
def test_a_task_and_its_equals_are_one(again: Callable[[], Task]) -> None:
    known = Variants()
    assert known.of(plain) is known.of(again())


@pytest.mark.parametrize(
    "options",
    [
        {"name": "other"},
        {"retries": 2},
        {"tags": {"a"}},
        {"timeout_seconds": 3},
        {"task_run_name": "x"},
        {"cache_policy": INPUTS},
        {"cache_expiration": timedelta(1)},
        {"on_completion": [lambda *_: None]},
        {"log_prints": True},
        {"persist_result": True},
    ],
)
def test_another_option_makes_another(options: dict[str, object]) -> None:
    known = Variants()
    first = known.of(plain)
    assert known.of(plain.with_options(**options)) is not first
    assert known.of(plain) is first
    assert known.of(plain.with_options(**options)) is known.of(plain.with_options(**options))


def test_options_that_prefect_makes_anew_each_time_are_recognised() -> None:
    known = Variants()
    assert known.of(keyed) is known.of(keyed.with_options())


def test_closures_of_one_function_are_apart() -> None:
    known = Variants()
    one, two = adder(1), adder(2)
    assert one.task_key == two.task_key
    assert known.of(one) is not known.of(two)
    assert known.of(one) is known.of(one)


def test_a_loop_over_equal_tasks_keeps_one_of_them() -> None:
    known = Variants()
    seen = []
    for _ in range(1000):
        made = plain.with_options(retries=1)
        known.of(made)
        seen.append(weakref.ref(made))
    del made
    gc.collect()
    assert len(known) == 1
    assert sum(ref() is not None for ref in seen) <= 2


def test_a_loop_over_different_tasks_keeps_the_last_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "KEPT", 10)
    known = Variants()
    ordinals = [known.of(plain.with_options(name=f"task-{n}")).ordinal for n in range(100)]
    assert len(set(ordinals)) == 100
    assert len(known) == 10


@flow
def many_objects(n: int) -> tuple[int, list[int]]:
    same = [plain.with_options(retries=1).submit(x) for x in range(n)]
    different = [plain.with_options(name=f"plain-{x}").submit(x) for x in range(n)]
    return sum(future.result() for future in same), [future.result() for future in different]


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_flow_that_makes_a_task_for_every_call_gets_its_results(prefect_server: str, isolation: str) -> None:
    runner = SLOTaskRunner(isolation=isolation, record="bare", max_workers=2)  # type: ignore[arg-type]
    n = 100  # more than a run remembers, and than a worker keeps
    assert many_objects.with_options(task_runner=runner)(n) == (sum(range(n)), list(range(n)))
