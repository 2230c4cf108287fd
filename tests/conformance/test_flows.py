"""Flows in the style of Prefect's documentation behave with ``SLOTaskRunner`` as they do with stock threads.

Compared: the result or exception, final states of the flow and of every task run, how many task runs there are, edges,
tags, run counts and logs, as the API has them afterwards.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from contextvars import copy_context
from typing import Any

import pytest
from prefect import Flow, allow_failure, flow, get_run_logger, tags, task, unmapped
from prefect.cache_policies import INPUTS
from prefect.client.orchestration import get_client
from prefect.context import get_run_context
from prefect.futures import as_completed, wait
from prefect.states import Completed, Failed
from prefect.transactions import transaction

FLOWS: dict[str, Flow[..., Any]] = {}


def documented(fn: Any) -> Any:
    """Makes a flow of a function and has it compared."""
    made = flow(fn)
    FLOWS[fn.__name__] = made
    return made


@task
def double(x: int) -> int:
    return 2 * x


@task
def add(x: int, y: int) -> int:
    return x + y


@task
def total(xs: list[int]) -> int:
    return sum(xs)


@task
def fail(message: str = "no") -> None:
    raise ValueError(message)


# ---- flows ----------------------------------------------------------------------------------------------------------


@task
def extract(n: int) -> list[dict[str, int]]:
    get_run_logger().info("extracting %s rows", n)
    return [{"id": i, "value": i * i} for i in range(n)]


@task
def transform(rows: list[dict[str, int]]) -> list[dict[str, int]]:
    return [row for row in rows if row["value"] % 2 == 0]


@task
def load(rows: list[dict[str, int]]) -> int:
    get_run_logger().info("loaded %s rows", len(rows))
    return len(rows)


@documented
def etl():
    return load.submit(transform.submit(extract.submit(10))).result()


@documented
def mapped_and_unmapped():
    return total.submit(add.map(double.map(range(4)), unmapped(10))).result()


@task
async def fetch(x: int) -> int:
    await asyncio.sleep(0.01)
    return x + 1


@documented
async def asynchronous():
    futures = [fetch.submit(i) for i in range(3)]
    direct = await fetch(10)
    return [future.result() for future in futures] + [direct] + fetch.map([5, 6]).result()


@documented
def synchronous_with_async_tasks():
    return fetch.map([1, 2, 3]).result()


@flow
def inner(n: int) -> int:
    return total.submit(double.map(range(n))).result()


@documented
def parent_of_subflow():
    n = double.submit(2).result()
    return inner(n) + inner(2)


@documented
def failing_task():
    add.submit(1, 2)
    return fail.submit("as expected").result()


@documented
def downstream_of_a_failure():
    bad = fail.submit()
    never = double.submit(bad)
    wait([never])
    return never.state.name


@task(retries=2, retry_delay_seconds=0)
def flaky(x: int, path: str) -> int:
    with open(path, "a") as file:
        file.write("x")
    with open(path) as file:
        attempts = len(file.read())
    if attempts < 3:
        raise RuntimeError(f"attempt {attempts}")
    return x


@task
def scratch_file() -> str:
    return tempfile.mkstemp()[1]


@documented
def retried():
    path = tempfile.mkstemp()[1]  # not made by a task: temporary files of functions are their own sandbox's
    return flaky.submit(double.submit(1), path).result()


@task(retries=1, retry_delay_seconds=0)
def always_fails(x: int) -> None:
    raise KeyError(x)


@documented
def retried_in_vain():
    states = [future.wait() or future.state for future in always_fails.map([1, 2])]
    return [state.name for state in states]


@task(cache_policy=INPUTS, persist_result=True)
def costly(x: int, salt: str) -> int:
    return x + 1


@documented
def cached():
    salt = scratch_file.submit().result()
    first = costly.submit(1, salt).result()
    return first + costly.submit(1, salt).result()


@task
def step(name: str) -> str:
    get_run_logger().warning("step %s", name)
    return name


@documented
def waits():
    a = step.submit("a")
    b = step.submit("b", wait_for=[a])
    c = step.submit("c", wait_for=[a, b])
    return c.result()


@task
def counted(n: int):
    yield from range(n)


@documented
def generator():
    return counted.submit(3).result(), list(counted(2))


@documented
def conditional():
    return double.submit(1).result() if double.submit(3).result() > 5 else add.submit(1, 1).result()


@task
def describe(value: Any) -> str:
    return type(value).__name__


@documented
def allowed_failure():
    bad, good = fail.submit(), double.submit(1)
    return describe.submit(allow_failure(bad)).result(), describe.submit(good, wait_for=[allow_failure(bad)]).result()


@task
def outer_task(n: int) -> int:
    return sum(future.result() for future in double.map(range(n)))


@documented
def nested_submits():
    return outer_task.submit(3).result()


@task
def calls_a_task(n: int) -> int:
    return double(n) + 1


@documented
def nested_calls():
    return calls_a_task.submit(3).result()


@task(tags={"declared"})
def labelled(x: int) -> int:
    return x


@documented
def tagged():
    with tags("outer"):
        a = labelled.submit(1)
        with tags("inner"):
            b = double.map([1, 2])
    return a.result(), b.result(), double.submit(9).result()


@task
def write(items: list[str]) -> list[str]:
    return [*items, "written"]


@write.on_rollback
def undo(txn: Any) -> None:
    print("rolled back")


@documented
def rolled_back():
    with transaction():
        write([])
        fail("inside")


@documented
def submitted_inside_a_transaction():
    with transaction():
        return double.submit(4).result()


@documented
def direct_calls():
    return add(double(1), double(2))


@documented
def results_as_objects():
    rows = extract.submit(4).result()
    kept = transform.submit(rows).result()
    return load.submit(kept).result()


@task(timeout_seconds=0.2)
def slow() -> None:
    for _ in range(100):
        time.sleep(0.02)


@documented
def timed_out():
    future = slow.submit()
    future.wait()
    return future.state.name, future.state.type.value


@task(timeout_seconds=0.2)
async def slow_async() -> None:
    await asyncio.sleep(5)


@documented
def timed_out_async():
    future = slow_async.submit()
    future.wait()
    return future.state.name


@documented
def states_returned():
    good = double(1, return_state=True)
    bad = fail("kept", return_state=True)
    later = double.submit(2, return_state=True)
    return good.name, bad.name, bad.message, later.name


@documented
def fails_while_futures_are_pending():
    done = double.submit(1)
    done.wait()
    raise RuntimeError("the flow itself")


@documented
def state_as_result():
    double.submit(1).wait()
    return Completed(name="Enough", message="it is enough")


@task
def returns_a_state(kind: str) -> Any:
    return Failed(message="by its own word") if kind == "failed" else Completed(name="Skipped", message="not needed")


@documented
def tasks_that_return_states():
    futures = returns_a_state.map(["failed", "skipped"])
    wait(futures)
    return [future.state.name for future in futures]


@task(log_prints=True)
def prints(x: int) -> int:
    print(f"printed {x}")
    return x


@documented
def printed():
    return prints.map([1, 2]).result()


@documented
def in_order_of_completion():
    return sorted(future.result() for future in as_completed(double.map([3, 1, 2])))


@documented
def part_of_a_map_fails():
    futures = always_or_never.map([1, 2, 3])
    return [str(result) for result in futures.result(raise_on_failure=False)]


@task
def always_or_never(x: int) -> int:
    if x == 2:
        raise ValueError("two")
    return x


@task(task_run_name="named-{x}")
def named(x: int) -> int:
    return x


@documented
def run_names():
    return named.map([1, 2]).result()


@task
def many(a: int, *rest: int, scale: int = 1, **options: int) -> int:
    return (a + sum(rest) + sum(options.values())) * scale


@documented
def all_kinds_of_parameters():
    return many.submit(1, 2, double.submit(1), scale=2, extra=3).result()


@documented
def futures_in_collections():
    parts = {"a": double.submit(1), "b": [double.submit(2), 3]}
    return flatten.submit(parts).result()


@task
def flatten(parts: dict[str, Any]) -> int:
    return parts["a"] + sum(parts["b"])


@documented
def several_failures():
    return [fail.submit("one"), double.submit(1)]


def adder(n: int) -> Any:
    @task
    def add_it(x: int) -> int:
        return x + n

    return add_it


@documented
def closures_of_one_function():
    one, two = adder(1), adder(2)
    return one.submit(1).result(), two.submit(1).result(), [f.result() for f in (one.submit(5), two.submit(5))]


@task
def fails_once(path: str) -> str:
    with open(path, "a") as file:
        file.write("x")
    with open(path) as file:
        if len(file.read()) < 2:
            raise RuntimeError("once")
    return "at last"


@documented
def options_of_their_own():
    bad = fails_once.submit(scratch_file())
    good = fails_once.with_options(name="patient", retries=1, retry_delay_seconds=0, tags={"own"})
    wait([bad, later := good.submit(scratch_file())])
    return bad.state.name, later.result()


@task
def nap(x: int) -> int:
    time.sleep(0.1)
    return x


@documented
def nobody_waits_for_many():
    nap.map(range(20))
    for x in range(20, 25):
        nap.submit(x)


@task
def outlast(x: int) -> int:
    """Ends a while after the flow has returned."""
    flow_run_id = get_run_context().task_run.flow_run_id
    with get_client(sync_client=True) as client:
        while not client.read_flow_run(flow_run_id).state.is_final():
            time.sleep(0.1)
    time.sleep(1.0)
    return x


@documented
def nobody_waits_for_a_chain():
    last = outlast.submit(1)
    for _ in range(3):
        last = double.submit(last)
    double.submit(2, wait_for=[last])


@documented
def nobody_waits_for_a_failure():
    double.submit(double.submit(fail.submit())).wait()
    double.submit(outlast.submit(1), wait_for=[allow_failure(fail.submit())])


@documented
def fails_before_anything_has_run():
    double.submit(outlast.submit(1))
    raise RuntimeError("the flow itself")


@task
def quits() -> None:
    raise SystemExit(3)


def how_it_ends(future: Any) -> str:
    try:
        future.wait()
    except BaseException as error:
        return repr(error)
    return str(future.state.name)


@documented
def upstream_that_quits():
    gone = quits.submit()
    futures = [
        gone,
        double.submit(gone),
        double.submit(1, wait_for=[gone]),
        describe.submit([allow_failure(gone)]),
        nap.submit(1),
    ]
    return [how_it_ends(future) for future in futures]


@documented
def callbacks_that_submit_and_wait():
    context, found, over = copy_context(), [], threading.Event()

    def follow(future: Any) -> None:
        future.wait()
        found.append(double.submit(future).result())
        if len(found) == 3:
            over.set()

    for x in (1, 1, 1):
        nap.submit(x).add_done_callback(lambda future: context.copy().run(follow, future))
    over.wait(60)
    return found


# ---- the comparison -------------------------------------------------------------------------------------------------


REFUSED_WHEN_PINNED = ("submitted_inside_a_transaction",)


KINDS = (
    "etl", "mapped_and_unmapped", "asynchronous", "parent_of_subflow", "failing_task", "retried", "cached", "waits",
    "generator", "conditional", "tagged",
)  # fmt: skip
ELSEWHERE = ("dask", "ray", "lambda", "batch", "work pool")
KINDS_ELSEWHERE = ("mapped_and_unmapped", "asynchronous", "retried")
KINDS_ON_DASK = ("failing_task", "waits", "tagged")  # others take seconds a flow


@pytest.fixture(scope="module")
def seen(run_all):
    """Every flow, run everywhere; pinned to processes except where that is refused."""
    pairs = [(name, way) for way in ("stock", "thread", "process") for name in FLOWS]
    pairs = [(name, "auto" if way == "process" and name in REFUSED_WHEN_PINNED else way) for name, way in pairs]
    pairs += [(name, way) for way in ("decorated", "planned") for name in KINDS]
    # one pool after another: flows find its workers warm, and its pilots hold vCPUs of this machine as long as they are
    elsewhere = dict.fromkeys(ELSEWHERE, KINDS_ELSEWHERE) | {"dask": (*KINDS_ELSEWHERE, *KINDS_ON_DASK)}
    pairs += [(name, pool) for pool, names in elsewhere.items() for name in names]
    runs = run_all((FLOWS[name], way) for name, way in pairs)
    return runs | {(name, "process"): runs[name, "auto"] for name in REFUSED_WHEN_PINNED}


@pytest.mark.parametrize("runner", ["thread", "process"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_ends_as_with_the_stock_runner(seen, name, runner):
    stock, ours = seen[name, "stock"], seen[name, runner]
    assert ours.outcome == stock.outcome
    assert ours.flow_state == stock.flow_state
    assert len(ours.tasks) == len(stock.tasks)
    assert ours.tasks == stock.tasks


@pytest.mark.parametrize("runner", ["thread", "process"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_logs_what_it_logs_with_the_stock_runner(seen, run_all, name, runner):
    """A server that is busy drops logs, the stock runner's as well as ours: a pair that differs is run once more."""
    pair = (seen[name, runner].logs, seen[name, "stock"].logs)
    if pair[0] != pair[1]:
        ours = "auto" if runner == "process" and name in REFUSED_WHEN_PINNED else runner
        again = run_all([(FLOWS[name], "stock"), (FLOWS[name], ours)])
        pair = (again[name, ours].logs, again[name, "stock"].logs)
    assert pair[0] == pair[1]


@pytest.mark.parametrize("way", ["decorated", "planned"])
@pytest.mark.parametrize("name", KINDS)
def test_a_decorated_flow_ends_as_before(seen, name, way):
    stock, ours = seen[name, "stock"], seen[name, way]
    assert ours.outcome == stock.outcome
    assert ours.flow_state == stock.flow_state
    assert ours.tasks == stock.tasks
    assert [log for log in stock.logs if log not in ours.logs] == [], "what tasks and flow say is still said"


@pytest.mark.parametrize(
    ("name", "pool"),
    [*((name, pool) for pool in ELSEWHERE for name in KINDS_ELSEWHERE), *((name, "dask") for name in KINDS_ON_DASK)],
)
def test_a_flow_elsewhere_ends_as_with_the_stock_runner(seen, name, pool):
    stock, ours = seen[name, "stock"], seen[name, pool]
    assert ours.outcome == stock.outcome
    assert ours.flow_state == stock.flow_state
    assert ours.tasks == stock.tasks
    assert ours.logs == stock.logs


def test_the_comparison_sees_task_runs_edges_tags_and_logs(seen):
    """Two empty answers would be equal too."""
    assert {task["name"] for task in seen["etl", "stock"].tasks} == {"extract", "transform", "load"}
    assert any(task["edges"].get("rows") == ["extract"] for task in seen["etl", "stock"].tasks)
    assert any("wait_for" in task["edges"] for task in seen["waits", "stock"].tasks)
    assert any("__parents__" in task["edges"] for task in seen["nested_submits", "stock"].tasks)
    assert any(task["tags"] == ["declared", "outer"] for task in seen["tagged", "stock"].tasks)
    assert any(task["runs"] == 3 for task in seen["retried", "stock"].tasks)
    assert any(log[1] == "loaded 5 rows" for log in seen["etl", "stock"].logs)
    assert any(log[1].startswith("printed") for log in seen["printed", "stock"].logs)
