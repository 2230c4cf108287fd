"""Results that stay on a Dask or Ray cluster, and go from stage to stage there."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from dask import config
from distributed import Client, LocalCluster
from prefect import allow_failure, flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.context import FlowRunContext
from prefect.futures import wait
from prefect.states import Failed, State

from prefect_slo import DaskPool, RayPool, SLOTaskRunner, slo_task
from prefect_slo.errors import ResultLost, Unpicklable

N, MB = 3, 2
PATIENCE_S = 60.0


class Traced:
    """Bytes that write down each process that unpickles them."""

    def __init__(self, seen: Path, number: int) -> None:
        self.seen, self.number, self.data = seen, number, bytes([number]) * (MB << 20)

    def __reduce__(self) -> Any:
        return _traced, (self.seen, self.number, self.data)


def _traced(seen: Path, number: int, data: bytes) -> Traced:
    (seen / f"{number}-{os.getpid()}").touch()
    made = Traced(seen, number)
    made.data = data
    return made


def unpickled_here(seen: Path) -> set[int]:
    """Numbers of what this process has unpickled."""
    return {int(mark.name.split("-")[0]) for mark in seen.glob(f"*-{os.getpid()}")}


@task
def make(seen: Path, number: int) -> Traced:
    return Traced(seen, number)


@task
def take(traced: Traced) -> tuple[int, int]:
    return traced.data[-1], len(traced.data)


@task
def take_all(traced: list[Traced], more: Traced | None = None) -> list[int]:
    return [one.data[-1] for one in traced]


@pytest.fixture(scope="module")
def dask() -> Iterator[DaskPool]:
    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": None}
    # A cluster gives up a worker that is away when 15 s are over since it was away for the first time.
    with (
        config.set({"distributed.deploy.lost-worker-timeout": "1h"}),
        LocalCluster(n_workers=2, **options) as cluster,
    ):
        yield DaskPool(cluster.scheduler_address, concurrency=2)


@pytest.fixture(scope="module")
def ray() -> Iterator[RayPool]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield RayPool(concurrency=2)
    finally:
        ray.shutdown()


def runner(pool: Any, **options: Any) -> SLOTaskRunner:
    return SLOTaskRunner(pools=[pool], pool=pool.name, **options)


@pytest.mark.parametrize("cluster", ["dask", "ray"])
@pytest.mark.parametrize("record", ["full", "summary"])
def test_results_go_from_stage_to_stage_past_the_flows_process(prefect_server, tmp_path, request, cluster, record):
    pool = request.getfixturevalue(cluster)

    @flow(task_runner=runner(pool, record=record))
    def two_stages() -> tuple[list[tuple[int, int]], list[int]]:
        made = [make.submit(tmp_path, number) for number in range(N)]
        return take.map(made).result(), take_all.submit(made, allow_failure(made[0])).result()

    assert two_stages() == ([(number, MB << 20) for number in range(N)], list(range(N)))
    assert {mark.name.split("-")[0] for mark in tmp_path.iterdir()} == {"0", "1", "2"}, "somebody has unpickled them"
    assert not unpickled_here(tmp_path)


def test_a_pool_that_keeps_nothing_brings_every_result(prefect_server, tmp_path, dask):
    @flow(task_runner=runner(replace(dask, keep_mb=None)))
    def two_stages() -> list[tuple[int, int]]:
        return take.map([make.submit(tmp_path, number) for number in range(N)]).result()

    assert two_stages() == [(number, MB << 20) for number in range(N)]
    assert unpickled_here(tmp_path) == set(range(N))


@pytest.mark.parametrize("cluster", ["dask", "ray"])
def test_what_the_flow_reads_is_brought_then_and_known_to_prefect(prefect_server, tmp_path, request, cluster):
    pool = request.getfixturevalue(cluster)
    ids: dict[str, Any] = {}

    @flow(task_runner=runner(pool))
    def reads() -> Any:
        run = FlowRunContext.get()
        ids["flow"] = run.flow_run.id
        made = [make.submit(tmp_path, number) for number in range(N)]
        for future in made:
            future.wait()
        assert not unpickled_here(tmp_path)
        value = made[1].result()
        assert unpickled_here(tmp_path) == {1}
        assert made[1].state.result() is value
        ids["task"] = made[1].task_run_id
        later = take.submit(value)
        state = make.submit(tmp_path, 7, return_state=True) if cluster == "dask" else None
        return later.result(), take.submit(state).result() if state is not None else None

    found, from_state = reads()
    assert found == (1, MB << 20)
    assert from_state in (None, (7, MB << 20))
    runs = _task_runs(ids["flow"])
    assert {source.id for source in runs[("take", 0)].task_inputs["traced"]} == {ids["task"]}, "its edge is drawn"


def _task_runs(flow_run: Any) -> dict[tuple[str, int], Any]:
    """Task runs by name of task and order of their making, once the server has heard of them all."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])))
        takes = sorted((run for run in runs if run.name.startswith("take")), key=lambda run: run.id)
        if takes and all(run.state is not None and run.state.is_final() for run in takes):
            return {("take", at): run for at, run in enumerate(takes)}
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_what_outlives_the_run_can_be_read_after_it(prefect_server, tmp_path, dask):
    held: list[Any] = []

    @flow(task_runner=runner(dask))
    def leaves() -> list[State[Any]]:
        made = [make.submit(tmp_path, number) for number in range(N)]
        held.append(made[0])
        return made[:2]

    states = leaves(return_state=True).result()
    assert unpickled_here(tmp_path) == {0, 1}, "the third is nobody's"
    assert [state.result().number for state in states] == [0, 1]
    assert held[0].result().number == 0
    assert cloudpickle.loads(cloudpickle.dumps(states[1])).result().number == 1
    with Client(dask.address, set_as_default=False) as client:
        assert not client.run_on_scheduler(lambda dask_scheduler: dict(dask_scheduler.tasks)), "nothing is left there"


@pytest.mark.parametrize("retries", [0, 1])
def test_a_flow_that_raises_brings_nothing_home(prefect_server, tmp_path, dask, retries):
    held = []

    @flow(task_runner=runner(dask), retries=retries)
    def raises() -> None:
        held.append(make.submit(tmp_path, len(held)))
        held[-1].wait()
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        raises()
    assert len(held) == retries + 1
    for future in held:
        with pytest.raises(ResultLost, match="its flow run failed"):
            future.result()
    assert not unpickled_here(tmp_path)


def test_a_flow_that_returns_a_failed_state_brings_home_what_it_returns_beside_in_the_end(
    prefect_server, tmp_path, dask
):
    held = []

    @flow(task_runner=runner(dask), retries=1)
    def half() -> list[State[Any]]:
        held.append(make.submit(tmp_path, len(held)))
        held[-1].wait()
        return [held[-1].state, Failed(message="on purpose")]

    made, failed = half(return_state=True).result(raise_on_failure=False)
    assert failed.is_failed()
    assert made.result().data[0] == 1
    with pytest.raises(ResultLost, match="its flow run failed"):
        held[0].result()  # nobody reads what the first attempt has returned


def test_the_cluster_lets_go_of_what_the_flow_lets_go_of(prefect_server, tmp_path, dask):
    @flow(task_runner=runner(dask))
    def drops() -> int:
        with Client(dask.address, set_as_default=False) as client:
            made = make.submit(tmp_path, 1)
            made.wait()
            before = client.run_on_scheduler(_parts)
            gc.disable()  # it is not for the garbage collector to find
            try:
                del made
                _wait_for(lambda: client.run_on_scheduler(_parts) == 0)
            finally:
                gc.enable()
        return before

    assert drops() == 1


def _parts(dask_scheduler: Any) -> int:
    return sum("-part-" in key for key in dask_scheduler.tasks)


def test_a_stage_elsewhere_gets_the_value(prefect_server, tmp_path, dask):
    stages = {"take": {"isolation": "thread"}, "take_all": {"pool": "process"}}

    @flow(task_runner=runner(dask, stages=stages))
    def mixed() -> tuple[tuple[int, int], list[int]]:
        made = make.submit(tmp_path, 5)
        return take.submit(made).result(), take_all.submit([made]).result()

    assert mixed() == ((5, MB << 20), [5])
    assert unpickled_here(tmp_path) == {5}


@task
def nap(until: Path) -> None:
    (until.parent / f"nap-{os.getpid()}").touch()
    while not until.exists():
        time.sleep(0.01)


@pytest.mark.parametrize("queued", [False, True], ids=["before it is sent for", "while its taker waits"])
def test_a_result_that_is_lost_with_its_worker_is_said_to_be_so(prefect_server, tmp_path, dask, queued):
    with Client(dask.address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=PATIENCE_S)

    @flow(task_runner=runner(replace(dask, concurrency=4)))
    def loses() -> list[State[Any]]:
        made = make.submit(tmp_path, 1)
        made.wait()
        if queued:
            naps = [nap.submit(tmp_path / "wake") for _ in range(2)]
            _wait_for(lambda: len(list(tmp_path.glob("nap-*"))) == 2)
            taken = take.submit(made)
            with Client(dask.address, set_as_default=False) as client:
                _wait_for(lambda: client.run_on_scheduler(_awaited))
        stored = make.with_options(persist_result=True).submit(tmp_path, 2) if not queued else None
        wait([stored] if stored is not None else [])
        _kill_keepers(dask.address)
        if stored is not None:
            taken = take.with_options(retries=1).submit(made)
            assert take.submit(stored).result() == (2, MB << 20), "it lies in result storage, too"
        taken.wait()
        (tmp_path / "wake").touch()
        if queued:
            wait(naps)
        return [taken.state, made]

    states = loses(return_state=True).result(raise_on_failure=False)
    lost = states[0].result(raise_on_failure=False)
    assert isinstance(lost, ResultLost)
    assert states[0].is_crashed()
    assert "stage 'make' (2.0 MB)" in str(lost)
    with pytest.raises(ResultLost, match="the Dask worker that kept it is gone"):
        states[1].result()


def _kill_keepers(address: str) -> None:
    """Kill the workers that hold parts, and wait until the scheduler knows."""
    with Client(address, set_as_default=False) as client:
        keepers = [worker for worker, keys in client.has_what().items() if any("-part-" in str(key) for key in keys)]
        for pid in client.run(os.getpid, workers=keepers).values():
            os.kill(pid, signal.SIGKILL)
        _wait_for(lambda: not client.run_on_scheduler(_parts))


def _awaited(dask_scheduler: Any) -> int:
    """How many tasks wait for a part."""
    return sum(len(task.dependents) for key, task in dask_scheduler.tasks.items() if "-part-" in key)


def _wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@slo_task(idempotent=True)
@task
def make_again(seen: Path, number: int) -> Traced:
    (seen / "runs" / f"{number} {time.monotonic_ns()}").touch()
    return Traced(seen, number)


@task(retries=1)
def change(traced: Traced, number: int) -> Traced:
    (traced.seen / "runs" / f"{number} {time.monotonic_ns()}").touch()
    return Traced(traced.seen, number)


class Box:
    """Something that Prefect doesn't look into."""

    def __init__(self, state: State[Any]) -> None:
        self.state = state


@task
def unpack(box: Box) -> int:
    return box.state.result().number


def runs(seen: Path) -> Counter[int]:
    """How often each number was made."""
    return Counter(int(mark.name.split()[0]) for mark in (seen / "runs").iterdir())


def test_what_is_lost_is_made_again_by_tasks_that_may_run_again_and_once(prefect_server, tmp_path, dask):
    """With all that they take which is lost, too."""
    (tmp_path / "runs").mkdir()

    @flow(task_runner=runner(dask, stages={"take_all": {"isolation": "thread"}}))
    def goes_on() -> dict[str, list[Any]]:
        made = make_again.submit(tmp_path, 1)
        changed = change.submit(made, 2)
        changed.wait()
        _kill_keepers(dask.address)
        found = [take.submit(changed).result()]
        assert runs(tmp_path) == {1: 2, 2: 2}
        read = make_again.submit(tmp_path, 3)
        elsewhere = make_again.submit(tmp_path, 4)
        left = make_again.submit(tmp_path, 5)
        wait([read, elsewhere, left])
        _kill_keepers(dask.address)
        found += [read.result().number, take_all.submit([elsewhere]).result()]
        lost, hidden = take.submit(changed), unpack.submit(Box(changed.state))
        wait([lost, hidden])
        return {"found": found, "states": [lost.state, hidden.state, left.state]}

    told = goes_on()
    found, (lost, hidden, left) = told["found"], told["states"]
    assert found == [(2, MB << 20), 3, [4]]
    for state in (lost, hidden):
        assert isinstance(state.result(raise_on_failure=False), ResultLost), "once, and no more"
    assert left.result().number == 5, "what outlives the run is made again before its end"
    assert runs(tmp_path) == {1: 2, 2: 2, 3: 2, 4: 2, 5: 2}


def test_four_takers_of_one_lost_result_have_it_made_again_once_and_stay_where_they_are(prefect_server, tmp_path, dask):
    """They wait on the cluster while its keeper dies, which drops them all at once: no sign of workers that fail."""
    (tmp_path / "runs").mkdir()

    @flow(task_runner=runner(replace(dask, concurrency=6, workers=())))
    def goes_on() -> list[tuple[int, int]]:
        made = make_again.submit(tmp_path, 1)
        made.wait()
        naps = [nap.submit(tmp_path / "wake") for _ in range(2)]
        _wait_for(lambda: len(list(tmp_path.glob("nap-*"))) == 2)
        taken = [take.submit(made) for _ in range(4)]
        with Client(dask.address, set_as_default=False) as client:
            _wait_for(lambda: client.run_on_scheduler(_awaited) == 4)
        _kill_keepers(dask.address)
        (tmp_path / "wake").touch()
        wait(naps)
        return [taker.result() for taker in taken]

    assert goes_on() == [(1, MB << 20)] * 4
    assert runs(tmp_path) == {1: 2}
    assert not unpickled_here(tmp_path), "no taker has moved to threads"


class Slow:
    """A value that the flow's process can't read before a file is there, or never."""

    def __init__(self, reader: int, folder: Path, *, ever: bool = True) -> None:
        self.reader, self.folder, self.ever, self.data = reader, folder, ever, b"1" * (MB << 20)

    def __reduce__(self) -> Any:
        return _slow, (self.reader, self.folder, self.ever, self.data)


def _slow(reader: int, folder: Path, ever: bool, data: bytes) -> Slow:
    if os.getpid() == reader:
        assert ever, "it can't be read here"
        (folder / "asked for").touch()
        _wait_for((folder / "there").exists)
    return Slow(reader, folder, ever=ever)


@task
def make_slow(reader: int, folder: Path, ever: bool) -> Slow:
    return Slow(reader, folder, ever=ever)


@task
def take_slow(slow: Slow) -> int:
    return len(slow.data)


def test_a_fetch_that_takes_its_time_keeps_nobody_else_waiting_and_one_that_fails_fails_those_that_need_it(
    prefect_server, tmp_path, dask
):
    stages = {"take_slow": {"pool": "process"}, "nap": {"isolation": "thread"}}

    @flow(task_runner=runner(dask, stages=stages))
    def goes_on() -> tuple[int, Any]:
        slow, never = (make_slow.submit(os.getpid(), tmp_path, ever) for ever in (True, False))
        first = take_slow.submit(slow)
        _wait_for((tmp_path / "asked for").exists)
        failed = take_slow.submit(never)
        nap.submit(tmp_path / "asked for").result(timeout=PATIENCE_S)
        failed.wait(timeout=PATIENCE_S)
        assert not first.state.is_final()
        (tmp_path / "there").touch()
        return first.result(), failed.state.result(raise_on_failure=False)

    size, error = goes_on()
    assert size == MB << 20
    assert isinstance(error, Unpicklable)
    assert "it can't be read here" in str(error)


def test_what_is_only_waited_for_stays_where_it_is(prefect_server, tmp_path, dask):
    @flow(task_runner=runner(dask, stages={"nap": {"pool": "process"}}))
    def waits() -> None:
        made = make.submit(tmp_path, 1)
        (tmp_path / "wake").touch()
        nap.submit(tmp_path / "wake", wait_for=[made]).result()
        assert not unpickled_here(tmp_path)

    waits()


@pytest.mark.slow
def test_a_result_that_is_lost_with_its_ray_node_is_said_to_be_so_or_made_again_once(prefect_server, tmp_path):
    """Ray says so only when the result is asked for, or waited for by a task: each of four takers hears of it."""
    ray, utils = pytest.importorskip("ray"), pytest.importorskip("ray.cluster_utils")
    ray.shutdown()  # the cluster of the other tests
    (tmp_path / "runs").mkdir()
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)

        @flow(task_runner=runner(RayPool(concurrency=6)))
        def loses() -> tuple[list[tuple[int, int]], list[State[Any]]]:
            made, again = make.submit(tmp_path, 1), make_again.submit(tmp_path, 2)
            wait([made, again])
            cluster.remove_node(node)
            cluster.add_node(num_cpus=1)
            lost, taken = take.submit(made), [take.submit(again) for _ in range(4)]
            lost.wait()
            return [taker.result() for taker in taken], [lost.state]

        found, [state] = loses()
        lost = state.result(raise_on_failure=False)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert isinstance(lost, ResultLost)
    assert "the Ray node that kept it is gone" in str(lost)
    assert found == [(2, MB << 20)] * 4
    assert runs(tmp_path) == {2: 2}
    assert not unpickled_here(tmp_path)
