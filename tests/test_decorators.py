"""``@slo`` above a flow: what it keeps, what it changes, what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import cloudpickle
import pytest
from prefect import flow, get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ParameterTypeError
from prefect.futures import PrefectConcurrentFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.transactions import transaction

from prefect_slo import SLOTaskRunner, slo, slo_task
from prefect_slo.decorators import director_of
from prefect_slo.errors import InvalidValue, SloError, UnknownPrices, UnsupportedTaskRunner
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.runner import flow_run
from prefect_slo.runner.recipe import ObservedRun


@pytest.fixture(autouse=True)
def place(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ObservedRun]:
    """What directors observe, in place of keeping it."""
    from prefect_slo.loop.director import LoopDirector

    found: list[ObservedRun] = []
    monkeypatch.setattr(LoopDirector, "observed", lambda self, run: found.append(run))
    return found


@task
def square(x: int) -> int:
    return x * x


def hook(flow: Any, flow_run: Any, state: Any) -> None:
    CALLED.append(("hook", state.type.value))


def later_hook(flow: Any, flow_run: Any, state: Any) -> None:
    CALLED.append(("later", state.type.value))


CALLED: list[tuple[str, str]] = []


@flow(
    name="plain", version="v7", description="Adds squares.", retries=2, retry_delay_seconds=3, timeout_seconds=99,
    flow_run_name="run-{n}", log_prints=True, persist_result=False, on_completion=[hook], on_failure=[hook],
    on_crashed=[hook], on_cancellation=[hook], on_running=[hook],
)  # fmt: skip
def plain(n: int = 4) -> int:
    """Adds squares."""
    return sum(square.map(range(n)).result())


decorated = slo(latency="30s")(plain)

KEPT = (
    "name", "version", "description", "retries", "retry_delay_seconds", "timeout_seconds", "flow_run_name",
    "log_prints", "persist_result", "result_storage", "result_serializer", "cache_result_in_memory", "parameters",
    "should_validate_parameters", "isasync", "isgenerator", "on_completion_hooks", "on_failure_hooks",
    "on_crashed_hooks", "on_cancellation_hooks", "on_running_hooks", "_entrypoint", "__doc__", "__name__", "__module__",
)  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_the_flow_keeps(name: str) -> None:
    assert getattr(decorated, name) == getattr(plain, name)


def test_every_attribute_of_the_flow_is_kept_but_its_runner_and_the_clock_around_its_function() -> None:
    mine, theirs = vars(decorated), vars(plain)
    changed = {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}
    assert changed <= {"task_runner", "fn", "__wrapped__"}
    assert decorated.fn.__wrapped__ is plain.fn


def test_the_stock_flow_is_left_alone() -> None:
    assert type(plain.task_runner) is ThreadPoolTaskRunner
    assert not hasattr(plain.fn, "__wrapped__")


def test_hooks_are_called_and_later_ones_are_appended(prefect_server: str, seen: list[ObservedRun]) -> None:
    @flow(on_completion=[hook])
    def hooked() -> int:
        return square.submit(2).result()

    sized = slo(latency=30)(hooked)
    sized.on_completion(later_hook)
    CALLED.clear()
    assert sized() == 4
    assert CALLED == [("hook", "COMPLETED"), ("later", "COMPLETED")]


def test_parameters_are_validated_and_coerced(prefect_server: str, seen: list[ObservedRun]) -> None:
    assert decorated.with_options(retries=0)(n="3") == 5
    with pytest.raises(ParameterTypeError):
        decorated.with_options(retries=0)(n="many")


def test_sync_async_and_generator_flows_stay_what_they_are(prefect_server: str, seen: list[ObservedRun]) -> None:
    @slo(latency=30)
    @flow
    async def coroutine(n: int) -> int:
        futures = square.map(range(n))
        await asyncio.sleep(0)
        return sum(futures.result())

    @slo(latency=30)
    @flow
    def generator(n: int) -> Iterator[int]:
        for i in range(n):
            yield square.submit(i).result()

    @slo(latency=30)
    @flow
    async def async_generator(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield square.submit(i).result()

    async def collected() -> list[int]:
        return [value async for value in async_generator(3)]

    assert asyncio.run(coroutine(3)) == 5
    assert list(generator(3)) == [0, 1, 4]
    assert asyncio.run(collected()) == [0, 1, 4]
    assert [run.latency_s > 0 for run in seen] == [True] * 3
    assert [run.workflow is not None and run.workflow.order for run in seen] == [("square",)] * 3


def test_a_method_stays_a_method(prefect_server: str, seen: list[ObservedRun]) -> None:
    class Shop:
        rate = 3

        @slo(latency=30)
        @flow
        def price(self, n: int) -> int:
            return self.rate * square.submit(n).result()

    assert Shop().price(2) == 12


def test_latency_is_that_of_the_flow_function(prefect_server: str, seen: list[ObservedRun]) -> None:
    assert decorated(2) == 1
    run = seen[-1]
    assert 0 < run.latency_s < 30
    assert run.status == "completed"
    assert run.recipe.isolation == "thread", "an unknown flow runs as its own task runner would"


def test_options_can_be_changed_afterwards(prefect_server: str, seen: list[ObservedRun]) -> None:
    renamed = decorated.with_options(name="renamed", retries=0)
    assert (renamed.name, renamed.retries) == ("renamed", 0)
    assert director_of(renamed) is director_of(decorated)
    assert renamed(3) == 5
    assert seen[-1].flow_name == "renamed"


def test_the_runner_alone_can_be_set_too(prefect_server: str) -> None:
    sized = plain.with_options(task_runner=SLOTaskRunner(max_workers=2, isolation="thread"), name="by-options")
    assert sized(3) == 5
    with pytest.raises(InvalidValue, match="decorated with @slo"):
        director_of(sized)


def test_a_decorated_flow_travels(prefect_server: str, seen: list[ObservedRun]) -> None:
    @slo(latency="30s", features=lambda given: {"n": given["n"]}, menu={"workers": 2})
    @flow(name="traveller", on_completion=[hook])
    def traveller(n: int = 3) -> int:
        return sum(square.map(range(n)).result())

    back = cloudpickle.loads(cloudpickle.dumps(traveller))
    assert (back.name, back.parameters) == (traveller.name, traveller.parameters)
    assert director_of(back).slo == director_of(traveller).slo
    assert director_of(back).menu == director_of(traveller).menu
    assert director_of(back).features({"n": 9}) == {"n": 9}
    assert len(back.on_completion_hooks) == 1
    assert back(4) == 14


def test_it_can_be_deployed_and_served(prefect_server: str) -> None:
    deployment = decorated.to_deployment(name="nightly", interval=timedelta(hours=1), parameters={"n": 2})
    assert deployment.flow_name == "plain"
    assert deployment.entrypoint == plain.to_deployment(name="nightly").entrypoint
    assert deployment.description == "Adds squares."
    assert "n" in deployment._parameter_openapi_schema.properties
    deployment_id = deployment.apply()
    with get_client(sync_client=True) as client:
        assert client.read_deployment(deployment_id).parameters == {"n": 2}


# ---- switched off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [ThreadPoolTaskRunner(max_workers=3), SLOTaskRunner(isolation="thread")])
def test_switched_off_a_flow_runs_on_its_own_runner(
    own: TaskRunner[Any], prefect_server: str, seen: list[ObservedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    runners: list[TaskRunner[Any]] = []

    @slo(latency=30)
    @flow(task_runner=own)
    def shows() -> int:
        runners.append(FlowRunContext.get().task_runner)
        return square.submit(3).result()

    assert shows() == 9
    assert isinstance(runners[-1], SLOTaskRunner)
    assert len(seen) == 1
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_ENABLED", "false")
    assert shows() == 9
    assert type(runners[-1]) is type(own)
    assert getattr(runners[-1], "director", None) is None
    assert getattr(runners[-1], "_max_workers", 3) == 3
    assert len(seen) == 1, "nothing is observed"


def test_with_a_setting_that_is_not_valid_a_flow_runs_on_its_own_runner_and_the_setting_is_named(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runners: list[TaskRunner[Any]] = []

    @slo(latency=30)
    @flow
    def shows() -> int:
        runners.append(FlowRunContext.get().task_runner)
        return square.submit(3).result()

    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_MODE", "enfroce")
    assert [shows(), shows()] == [9, 9]
    assert [type(runner) for runner in runners] == [ThreadPoolTaskRunner] * 2
    said = [record.message for record in caplog.records if "enfroce" in record.message]
    assert len(said) == 1
    assert shows.with_options(task_runner=SLOTaskRunner(isolation="thread"))() == 9


def test_a_stand_in_for_stock_processes_runs_calls_inside_a_transaction_on_threads(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch, seen: list[ObservedRun]
) -> None:
    said: list[str] = []
    monkeypatch.setattr(flow_run, "_log", said.append)

    @slo(latency=30)
    @flow(task_runner=ProcessPoolTaskRunner(max_workers=1))
    def spans() -> list[int]:
        with transaction():
            return square.map([2, 3]).result()

    assert spans() == [4, 9]
    assert [message for message in said if "transaction" in message] == [
        "Stage 'square' runs on threads: it is submitted inside a transaction."
    ]
    [run] = seen
    assert run.stages["square"].pool == "thread"


# ---- task runners of the user's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "isolation", "workers"),
    [
        (ThreadPoolTaskRunner(), "thread", None),
        (ThreadPoolTaskRunner(max_workers=5), "thread", 5),
        (ProcessPoolTaskRunner(max_workers=2), "auto", 2),
        (SLOTaskRunner(isolation="auto", max_workers=7), "auto", 7),
    ],
)
def test_the_own_task_runner_says_how_runs_are_run_that_change_nothing(
    own: TaskRunner[Any], isolation: str, workers: int | None
) -> None:
    decorated = slo(latency=30)(plain.with_options(task_runner=own))
    usual = director_of(decorated).usual
    assert decorated.task_runner.recipe == usual, "also where there is no word from the director"
    assert (usual.isolation, usual.workers) == (isolation, workers)


def test_a_task_runner_without_a_matching_backend_is_refused() -> None:
    class MyTaskRunner(TaskRunner[PrefectConcurrentFuture[Any]]):
        def duplicate(self): ...
        def submit(self, *args, **kwargs): ...
        def cancel_all(self): ...

    with pytest.raises(UnsupportedTaskRunner, match=r"cannot take over MyTaskRunner.*ThreadPoolTaskRunner"):
        slo(latency=30)(plain.with_options(task_runner=MyTaskRunner()))


def test_decorated_twice_the_outer_one_counts() -> None:
    twice = slo(budget_usd=0.02)(slo(latency=30)(plain.with_options(task_runner=ThreadPoolTaskRunner(4))))
    assert director_of(twice).slo == Slo(budget=Budget(0.02))
    assert director_of(twice).usual.workers == 4


# ---- what is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "objective"),
    [
        ({"latency": "30s"}, Slo(Latency(30.0))),
        ({"latency": timedelta(minutes=2)}, Slo(Latency(120.0))),
        ({"latency": 1.5, "percentile": 0.9, "confidence": 0.95}, Slo(Latency(1.5, 0.9, 0.95))),
        ({"budget_usd": "$0.02"}, Slo(budget=Budget(0.02))),
        ({"latency": 30, "budget_usd": 0.02}, Slo(Latency(30.0), Budget(0.02))),
    ],
)
def test_bounds_are_read(arguments: dict[str, Any], objective: Slo) -> None:
    assert director_of(slo(**arguments)(plain)).slo == objective


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, "slo"),
        ({"latency": "soon"}, "latency"),
        ({"latency": -1}, "latency"),
        ({"budget_usd": 0}, "budget_usd"),
        ({"latency": 30, "percentile": 95}, "0.95"),
        ({"latency": 30, "confidence": 1}, "confidence"),
        ({"latency": 30, "mode": "obey"}, "mode"),
        ({"latency": 30, "stages": {"square": {"speed": 9}}}, "speed"),
        ({"latency": 30, "stages": {"square": {"memory_mb": -3}}}, "memory_mb"),
        ({"latency": 30, "menu": {"workers": 0}}, "menu.workers"),
        ({"latency": 30, "menu": {"gpus": 1}}, "gpus"),
        ({"latency": 30, "explore": 2}, "explore"),
        ({"latency": 30, "seed": -1}, "seed"),
        ({"latency": 30, "features": 7}, "features"),
        ({"latency": 30, "features": "m"}, "features"),
    ],
)
def test_arguments_that_are_wrong_are_refused_by_name(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(InvalidValue, match=names):
        slo(**arguments)(plain)


def test_prices_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnknownPrices):
        slo(latency=30, menu={"prices": "free-lunch"})


@pytest.mark.parametrize("thing", [square, len, lambda: 3, 7])
def test_only_flows_are_decorated(thing: Any) -> None:
    with pytest.raises(InvalidValue, match="put @slo"):
        slo(latency=30)(thing)


def test_forgetting_the_parentheses_is_told() -> None:
    with pytest.raises(InvalidValue, match="called with a bound"):
        slo(plain)  # type: ignore[arg-type]


# ---- features, stages, modes ----------------------------------------------------------------------------------------


def test_features_come_by_name_or_by_function() -> None:
    given = {"n": 4, "name": "x"}
    assert director_of(slo(latency=30, features="n")(plain)).features(given) == {"n": 4.0}
    assert director_of(slo(latency=30, features=("n",))(plain)).features(given) == {"n": 4.0}
    assert director_of(slo(latency=30, features=lambda p: {"twice": 2 * p["n"]})(plain)).features(given) == {"twice": 8}


def test_declarations_reach_the_runner_and_the_decorator_goes_before_the_task(
    prefect_server: str, seen: list[ObservedRun]
) -> None:
    @slo_task(idempotent=True, concurrency=2)
    @task
    def declared(x: int) -> int:
        return x

    def body() -> list[int]:
        return declared.map(range(3)).result()

    slo(latency=30)(flow(name="by-task")(body))()
    slo(latency=30, stages={"declared": {"concurrency": 1}})(flow(name="by-decorator")(body))()
    assert [run.declarations["declared"].concurrency for run in seen] == [2, 1]


@pytest.mark.parametrize(("environment", "mode"), [(None, "advise"), ("observe", "observe")])
def test_the_environment_has_the_last_word_on_the_mode(
    environment: str | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect_slo.loop import knowledge, planning

    asked: list[str | None] = []

    def decide(known: Any, slo: Slo, *, mode: str | None, **_: Any) -> Any:
        asked.append(mode)
        raise SloError("enough")

    monkeypatch.setattr(planning, "decide", decide)
    monkeypatch.setattr(knowledge, "knowledge", knowledge.Knowledge)
    if environment:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_MODE", environment)
    recipe = director_of(slo(latency=30, mode="advise")(plain)).recipe("plain", "run", {})
    assert asked == [mode]
    assert recipe.plan is None, "what can't be decided runs as it is"


def test_a_flow_that_is_retried_is_observed_at_every_attempt(prefect_server: str, seen: list[ObservedRun]) -> None:
    attempts: list[int] = []

    @slo(latency=30)
    @flow(retries=2)
    def flaky() -> int:
        found = square.submit(len(attempts)).result()
        attempts.append(found)
        if len(attempts) < 3:
            get_run_logger().debug("once more")
            raise RuntimeError("not yet")
        return found

    assert flaky() == 4
    assert [run.status for run in seen] == ["failed", "failed", "completed"]
    ids = [run.run_id for run in seen]
    assert ids[1:] == [f"{ids[0]}#2", f"{ids[0]}#3"], "each attempt is a run of its own"


def test_results_from_a_cache_are_told(prefect_server: str, seen: list[ObservedRun]) -> None:
    from prefect.cache_policies import INPUTS

    @task(cache_policy=INPUTS, persist_result=True)
    def remembered(x: int) -> int:
        return x + 1

    @slo(latency=30)
    @flow
    def cached(x: int) -> int:
        return remembered.submit(x).result() + square.submit(2).result()

    fresh = uuid4().int  # results outlive the test session
    assert cached(fresh) == cached(fresh)
    assert [run.cached for run in seen] == [False, True]
    assert {name: stage.cached for name, stage in seen[1].stages.items()} == {"remembered": 1, "square": 0}
