"""Pools on Dask and Ray clusters, beyond what every backend does (``tests/conformance``)."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from http.client import HTTPConnection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import cloudpickle
import psutil
import pytest
from distributed import Client, LocalCluster
from prefect import flow, task, unmapped
from prefect_dask import DaskTaskRunner
from prefect_ray import RayTaskRunner

from prefect_slo import DaskPool, SLOTaskRunner, slo
from prefect_slo.errors import InvalidValue, SloError, UnknownPool
from prefect_slo.loop.director import Following, following
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.pricing import price_list
from prefect_slo.resources import Size
from prefect_slo.runner import cluster_pools
from prefect_slo.runner.backends import ray_cluster
from prefect_slo.runner.backends.cluster import ClusterBackend
from prefect_slo.runner.backends.protocol import Bundle, Finished, Lost, Opened, Outcome
from prefect_slo.runner.backends.ray_keeper import requested
from prefect_slo.runner.backends.remote import Clocks, Reply, machine, told
from prefect_slo.runner.cluster_pools import RayPool
from prefect_slo.runner.local.limits import machine_vcpus
from prefect_slo.runner.recipe import ObservedRun

PATIENCE_S = 60.0


class Calls:
    """A program that calls a function with each payload."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def open(self, emit: Any) -> Any:
        fn = self.fn

        def run(item: int, payload: bytes) -> Outcome:
            import cloudpickle

            return Outcome(cloudpickle.dumps(fn(cloudpickle.loads(payload))))

        return run


def bundle(id: int, fn: Any, *values: Any) -> Bundle:
    cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
    items = tuple((100 * id + n, cloudpickle.dumps(value)) for n, value in enumerate(values))
    return Bundle(id, "calls", cloudpickle.dumps(Calls(fn)), items)


def until(reports: SimpleQueue[Any], *kinds: type) -> Any:
    """The next report of some kind."""
    while not isinstance(report := reports.get(timeout=PATIENCE_S), kinds):
        pass
    return report


@contextmanager
def cluster(**options: Any) -> Iterator[LocalCluster]:
    made = LocalCluster(**{"n_workers": 1, "processes": False, "dashboard_address": None, **options})
    try:
        yield made
    finally:
        made.close()


def test_a_dask_cluster_of_this_process_is_heard_of_by_no_other_machine_and_says_little(caplog) -> None:
    def listening() -> set[str]:
        return {c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}

    before, log = listening(), logging.getLogger("distributed")
    level = log.level
    _, close, _ = DaskPool()._connect()
    try:
        assert listening() - before <= {"127.0.0.1"}
    finally:
        close()
    assert not [record for record in caplog.records if record.name.startswith("distributed")]
    assert log.level == level


@pytest.mark.parametrize(("options", "shown"), [({}, False), ({"dashboard_address": "127.0.0.1:0"}, True)])
def test_a_dask_cluster_of_this_process_has_the_dashboard_that_its_user_asks_for(options, shown) -> None:
    client, close, _ = DaskPool(cluster_options=options)._connect()
    try:
        with closing(HTTPConnection("127.0.0.1", client.scheduler_info()["services"]["dashboard"])) as web:
            web.request("GET", "/status")
            assert (web.getresponse().status == 200) is shown
    finally:
        close()


def test_a_size_that_no_dask_worker_can_take_is_refused_with_what_to_start():
    with cluster(resources={"CPU": 2}) as here:
        backend = DaskPool(here.scheduler_address, resources={"vcpus": "CPU"}).backend(None)
        reports: SimpleQueue[Any] = SimpleQueue()
        backend.open(1, Size(4, 512), reports.put)
        lost = until(reports, Lost, Opened)
        backend.shutdown()
    assert (lost.reason, lost.detail) == (
        "start", "no Dask worker has CPU=4 (the most: 2): start workers with --resources 'CPU=4'",
    )  # fmt: skip


def test_bundles_that_wait_for_a_cluster_without_workers_are_said_to_once_and_run_when_one_comes():
    said: SimpleQueue[str] = SimpleQueue()
    with cluster(n_workers=0) as here:
        pool = DaskPool(here.scheduler_address)
        backend = ClusterBackend(pool._cluster(said.put), {}, "run", notice=said.put, patience_s=0.1)
        reports: SimpleQueue[Any] = SimpleQueue()
        backend.open(1, Size(1, 512), reports.put)
        until(reports, Opened)
        backend.submit(1, bundle(1, abs, -3))
        words = said.get(timeout=PATIENCE_S)
        time.sleep(0.5)
        here.scale(1)
        assert until(reports, Finished).on_new, "it has waited for a worker to start"
        backend.shutdown()
        address = here.scheduler_address
    starting = DaskPool(cluster_options={"n_workers": 0})._cluster(pytest.fail)
    starting.connect()
    own = starting.vacant()
    starting.close("run")
    assert own.startswith("The Dask cluster at ")
    assert own.endswith(" is still starting workers: none has come yet")
    assert words.startswith(f"The Dask cluster at {address} has no workers. Where it adapts, its owner starts them")
    assert words.endswith(f"; else start one: dask worker {address}. Bundles that wait: 1.")
    assert said.empty()


def test_on_ray_shares_of_a_gpu_are_fractions_of_one_and_the_device_is_rays_and_what_no_node_has_is_refused():
    """A GPU by name alone: Ray counts it, and shows it to whoever has a part of it."""

    def look(item: int) -> tuple[Any, ...]:
        begun = time.monotonic()
        time.sleep(1.0)
        told = (os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "PREFECT_SLO_GPU_MEMORY_FRACTION"))
        return (*told, begun, time.monotonic())

    backend = RayPool(options={"num_cpus": 4, "num_gpus": 1}).backend(None)
    reports: SimpleQueue[Any] = SimpleQueue()
    for lease in (1, 2, 3):
        backend.open(lease, Size(0.5, 512, 0.5, "gpu"), reports.put)
    seen: list[Any] = []
    ended = 0
    while ended < 3:
        report = reports.get(timeout=4 * PATIENCE_S)
        assert not isinstance(report, Lost), report
        if isinstance(report, Opened):
            backend.submit(report.lease, bundle(report.lease, look, 0))
        assert not getattr(report, "on_new", False), "the node was there"
        seen += [cloudpickle.loads(item.outcome.payload) for item in getattr(report, "items", ())]
        ended += isinstance(report, Finished)
    refused = {}
    for lease, size in ((4, Size(0.5, 512, 2, "gpu")), (5, Size(99, 512))):
        backend.open(lease, size, reports.put)
        refused[lease] = until(reports, Lost, Opened)
    backend.shutdown()
    assert [lost.reason for lost in refused.values()] == ["start", "start"]
    assert "no Ray node has" in refused[4].detail
    assert "no Ray node has CPU=99 (the most: 4)" in refused[5].detail
    assert [told[:2] for told in seen] == [("0", "0.5000")] * 3
    assert max(sum(a <= at < b for _, _, a, b in seen) for _, _, at, _ in seen) <= 2


def test_a_cluster_that_cannot_be_reached_is_said_to_be_so():
    backend = DaskPool("tcp://127.0.0.1:9", options={"timeout": 1}).backend(None)
    reports: SimpleQueue[Any] = SimpleQueue()
    backend.open(1, Size(1, 512), reports.put)
    lost = until(reports, Lost, Opened)
    backend.shutdown()
    assert lost.reason == "start"
    assert "the cluster can't be used" in lost.detail
    assert "127.0.0.1:9" in lost.detail


def test_dask_never_runs_more_at_once_than_the_resources_allow(tmp_path: Path):
    def linger(folder: Path) -> None:
        mark = folder / str(os.getpid())
        mark.touch()
        time.sleep(0.3)
        mark.rename(folder / f"{mark.name}.{time.monotonic_ns()}")

    with cluster(resources={"CPU": 2}, threads_per_worker=8) as here, Client(here, set_as_default=False) as client:
        backend = DaskPool(here.scheduler_address, resources={"vcpus": "CPU"}).backend(None)
        reports: SimpleQueue[Any] = SimpleQueue()
        for lease in range(1, 7):
            backend.open(lease, Size(1, 512), reports.put)
            until(reports, Opened)
            backend.submit(lease, bundle(lease, linger, tmp_path))
        done, most, free = 0, 0, set()
        while done < 6:
            running = sum("." not in mark.name for mark in tmp_path.iterdir())
            most = max(most, running)
            free |= set(client.run(_free, "CPU").values())
            while not reports.empty():
                done += isinstance(reports.get(), Finished)
        backend.shutdown()
    assert most == 2, "as many as there is room for, and no more"
    assert min(free) == 0.0, "by the worker's own account"


def _free(resource: str, dask_worker: Any = None) -> float:
    return dask_worker.state.available_resources[resource]


def test_what_a_lost_dask_worker_had_begun_is_not_run_again_behind_the_flows_back(tmp_path: Path):
    """Dask would run the task on another worker; whether items may run twice is not for it to say."""

    def begin(folder: Path) -> None:
        (folder / f"{os.getppid()}").touch()  # whatever runs it, and began
        time.sleep(30)

    with cluster(n_workers=2, threads_per_worker=1, processes=True) as here:
        backend = DaskPool(here.scheduler_address).backend(None)
        reports: SimpleQueue[Any] = SimpleQueue()
        backend.open(1, Size(1, 512), reports.put)
        until(reports, Opened)
        backend.submit(1, bundle(1, begin, tmp_path))
        submitted, deadline = time.monotonic(), time.monotonic() + PATIENCE_S
        while not any(tmp_path.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ran = time.monotonic()
        with Client(here, set_as_default=False) as client:
            [address] = [worker for worker, tasks in client.processing().items() if tasks]
            [pid] = client.run(os.getpid, workers=[address]).values()
        os.kill(pid, signal.SIGKILL)
        lost = until(reports, Lost, Finished)
        backend.shutdown()
    assert (lost.reason, lost.running, lost.untouched) == ("died", None, ())
    assert lost.detail == "the Dask worker that ran it is gone"
    assert submitted < lost.held[0] <= ran < lost.held[1], "it costs from its turn, which its mark says"
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_of_a_run_is_left_on_the_scheduler():
    with cluster() as here, Client(here, set_as_default=False) as client:
        backend = DaskPool(here.scheduler_address).backend(None)
        reports: SimpleQueue[Any] = SimpleQueue()
        backend.open(1, Size(1, 512), reports.put)
        backend.submit(1, bundle(1, abs, -1))
        until(reports, Finished)
        assert len(client.run_on_scheduler(_metadata)) == 1
        backend.shutdown()
        assert not client.run_on_scheduler(_metadata)
        assert not client.run_on_scheduler(lambda dask_scheduler: dict(dask_scheduler.tasks))


def _metadata(dask_scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in dask_scheduler.task_metadata.items() if name != "cluster-manager-info"}


def test_instants_of_another_clock_are_moved_by_the_least_that_was_seen():
    clocks, there = Clocks(), "elsewhere/1"
    late, early = Reply((), there, 999.0, sent=1000.0), Reply((), there, 999.0, sent=1010.0)
    assert clocks.seen(late, received=20.5) == 20.5 - 1000.0
    assert clocks.seen(early, received=30.1) == 30.1 - 1010.0
    assert clocks.seen(Reply((), there, 999.0, sent=1020.0), received=41.0) == 30.1 - 1010.0
    done = Finished(7, 3, received=1001.0, ended=1009.0)
    [moved] = told(Reply((Opened(7, True, 1.5, 0.0, 1), done), there, 999.0, 1010.0), lease=2, ahead=-979.9)
    assert (moved.lease, moved.init_s) == (2, 1.5)
    assert (moved.received, moved.ended) == pytest.approx((21.1, 29.1))
    assert moved.held == pytest.approx((19.1, 30.1))


def test_this_machines_clock_is_not_moved():
    assert Clocks().seen(Reply((), machine(), 4.0, sent=5.0), received=9.0) == 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DaskPool(sizes=()), "dask.sizes"),
        (lambda: DaskPool(concurrency=0), "dask.concurrency"),
        (lambda: DaskPool(workers=(1, 9)), "dask.workers"),
        (lambda: DaskPool(resources={"cores": "CPU"}), "dask.resources"),
        (lambda: DaskPool("tcp://x:1", cluster=LocalCluster), "dask.cluster"),
        (lambda: DaskPool(prices="none"), "none"),
        (lambda: RayPool(concurrency=2.5), "ray.concurrency"),
        (lambda: SLOTaskRunner(pool="dask"), "dask"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(make, words):
    with pytest.raises((InvalidValue, UnknownPool), match=words):
        make()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(cluster_pools, "find_spec", lambda name: None)
    with pytest.raises(SloError, match=r"pip install 'prefect-slo\[ray\]'"):
        RayPool()


def test_what_takes_more_than_its_size_runs_where_memory_is_not_capped():
    def grow(mb: int) -> int:
        return len(b"1" * (mb << 20))

    for capped, kind in ((True, Lost), (False, Finished)):
        backend = DaskPool(concurrency=1, capped=capped).backend(None)
        reports: SimpleQueue[Any] = SimpleQueue()
        backend.open(1, Size(1, 128), reports.put)
        until(reports, Opened)
        backend.submit(1, bundle(1, lambda mb: time.sleep(0.5 * (grow(mb) > 0)), 600))
        assert isinstance(until(reports, Lost, Finished), kind)
        backend.shutdown()


def test_a_queued_bundle_that_is_cancelled_never_starts(tmp_path: Path):
    def touch(path: Path) -> None:
        path.touch()
        time.sleep(1.0)

    with cluster(threads_per_worker=1) as here:
        backend = DaskPool(here.scheduler_address).backend(None)
        reports: SimpleQueue[Any] = SimpleQueue()
        for lease in (1, 2):
            backend.open(lease, Size(1, 512), reports.put)
            until(reports, Opened)
            backend.submit(lease, bundle(lease, touch, tmp_path / str(lease)))
        deadline = time.monotonic() + PATIENCE_S
        while not (tmp_path / "1").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        backend.cancel(2)
        lost = until(reports, Lost)
        until(reports, Finished)
        backend.shutdown()
    assert (lost.lease, lost.reason, lost.running, lost.untouched) == (2, "cancelled", None, (200,))
    assert not (tmp_path / "2").exists()


def test_the_last_of_the_flow_runs_that_use_ray_disconnects(monkeypatch):
    ray, calls = pytest.importorskip("ray"), []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options["address"]))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    shared = cluster_pools._Ray()
    one, two = shared.join("local", {}), shared.join("local", {})
    one()
    assert calls == ["local"]
    with pytest.raises(SloError, match="can't be at 'ray://other'"):
        shared.join("ray://other", {})
    two()
    assert calls == ["local", "shutdown"]


def test_a_cluster_that_cannot_be_asked_loses_the_lease_all_the_same():
    class Deaf:
        own = False

        def connect(self) -> None: ...

        def vacant(self) -> str:
            return ""

        def workers(self) -> frozenset[str]:
            return frozenset()

        def lack(self, size: Size) -> str:
            return ""

        def start(self, work: Any, parts: Any, done: Any) -> str:
            return "handle"

        def end(self, handle: Any) -> Any:
            raise OSError("the scheduler is gone")

        def turns(self, token: str) -> None: ...

        def close(self, run_key: str) -> None: ...

    backend = ClusterBackend(Deaf(), {}, "run")
    reports: SimpleQueue[Any] = SimpleQueue()
    backend.open(1, Size(1, 512), reports.put)
    until(reports, Opened)
    backend.submit(1, bundle(1, abs, 1))
    backend.cancel(1)
    lost = until(reports, Lost)
    backend.shutdown()
    assert (lost.reason, lost.running, lost.untouched) == ("cancelled", None, ())
    assert "the scheduler is gone" in lost.detail


# ---- flows ----------------------------------------------------------------------------------------------------------


@task
def where(x: int) -> tuple[int, int]:
    return x, os.getppid()


def test_a_flow_with_a_dask_task_runner_keeps_its_cluster(prefect_server):
    with cluster(n_workers=1, processes=True, threads_per_worker=2) as here:

        @slo(latency="60s", mode="observe")
        @flow(task_runner=DaskTaskRunner(address=here.scheduler_address))
        def on_dask() -> list[tuple[int, int]]:
            return where.map(range(3)).result()

        found = on_dask()
        with Client(here, set_as_default=False) as client:
            [dask_worker] = client.run(_family).values()
    assert [x for x, _ in found] == [0, 1, 2]
    assert {parent for _, parent in found} <= dask_worker, "its worker processes are the Dask worker's children"


def _family() -> set[int]:
    return {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}


def test_task_runners_of_integrations_become_pools():
    dask = DaskPool.of(DaskTaskRunner(cluster_kwargs={"n_workers": 2}, adapt_kwargs={"maximum": 3}))
    assert (dask.cluster_options, dask.adapt) == ({"n_workers": 2}, {"maximum": 3})
    assert dask.concurrency == int(machine_vcpus()), "a cluster of this machine alone has no more room than that"
    assert not dask.capped
    assert not dask.backend(None).capabilities().memory_limits
    ray = RayPool.of(RayTaskRunner(address="ray://head:10001"))
    assert (ray.address, ray.concurrency, ray.capped) == ("ray://head:10001", 64, False)
    assert cloudpickle.loads(cloudpickle.dumps(ray)) == ray


def test_stages_without_a_plan_run_on_the_pool_that_the_runner_names(prefect_server):
    @flow(task_runner=SLOTaskRunner(pools=[DaskPool(concurrency=2)], pool="dask"))
    def twice() -> list[int]:
        first = where.map(range(2))
        return [x for x, _ in first.result()]

    assert twice() == [0, 1]


def test_time_in_the_clusters_queue_is_no_cost_and_told_apart_where_others_hold_the_room(prefect_server, tmp_path):
    """Two bundles queue behind somebody else's task, one of them then behind the other."""
    runs: list[ObservedRun] = []
    size = Size(1, 512, hardware="dask")
    plan = Plan("queues", None, {"first": StagePlan(2, size, "dask")})
    (tmp_path / "begin").touch()
    with cluster(threads_per_worker=1) as here, Client(here, set_as_default=False) as client:
        pool = DaskPool(here.scheduler_address, concurrency=2)

        @slo(latency="60s", pools=[pool])
        @flow(name="queues")
        def queues() -> list[int]:
            return first.map([tmp_path / "begin"] * 2).result()

        others = client.submit(_occupy, tmp_path / "go on")
        await_((tmp_path / "occupied").exists)
        with following(Following(plan=plan, heard=runs.append)), ThreadPoolExecutor(1) as threads:
            begun = time.monotonic()
            found = threads.submit(copy_context().run, queues)
            try:
                await_(lambda: sum(key.startswith("prefect-slo") for key in [*here.scheduler.tasks]) == 2)
                queued = time.monotonic()
                time.sleep(3.0)  # well beyond what the way of a bundle may take
                waited_s = time.monotonic() - queued
            finally:
                (tmp_path / "go on").touch()
            assert found.result() == [3, 3]
            took_s = time.monotonic() - begun
        others.result()
    [row] = runs[0].stage_runs
    assert row.queue_s >= waited_s
    assert row.wall_s <= took_s - waited_s
    assert 0 < row.billed_s <= took_s - waited_s, "they were held one after the other"
    assert row.cost_usd == pytest.approx(row.billed_s * price_list("local").rate(1, 512, 0, "dask"))
    assert all(invocation.waited_s >= waited_s for invocation in runs[0].invocations)


def _occupy(until: Path) -> None:
    (until.parent / "occupied").touch()
    while not until.exists():
        time.sleep(0.01)


# ---- growing --------------------------------------------------------------------------------------------------------


@task
def first(until: Path) -> int:
    while not until.exists():
        time.sleep(0.01)
    return 3


@task
def second(x: int, more: int) -> int:
    return x + more


def test_an_adaptive_cluster_grows_from_nothing_to_what_the_next_stage_will_need(prefect_server, tmp_path):
    """One task is queued: by its queue alone it would have one worker."""
    made: list[LocalCluster] = []

    def start(**options: Any) -> LocalCluster:
        made.append(LocalCluster(**options))
        return made[-1]

    options = {"n_workers": 0, "processes": False, "threads_per_worker": 1, "dashboard_address": None}
    adapt = {"minimum": 0, "maximum": 4, "interval": "50 ms"}
    pool = DaskPool(cluster=start, cluster_options=options, adapt=adapt, concurrency=4)
    size = Size(1, 512, hardware="dask")
    plan = Plan("grows", None, {"first": StagePlan(1, size, "dask"), "second": StagePlan(3, size, "dask")})

    @flow(name="grows", task_runner=SLOTaskRunner(plan, pools=[pool]))
    def grows() -> list[int]:
        begun = first.submit(tmp_path / "enough")
        rest = second.map(unmapped(begun), range(5))
        await_(lambda: made and len(made[0].scheduler.workers) == 3)
        (tmp_path / "enough").touch()
        found = rest.result()
        await_(lambda: made[0]._adaptive.minimum == 0)  # it may shrink again
        return found

    assert grows() == [3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """A Ray cluster on this machine, which this process is connected to."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def test_rays_autoscaler_is_told_what_the_next_stage_will_need_and_others_requests_are_left_alone(
    prefect_server, tmp_path, ray_here
):
    """By Ray's own record of what is asked of it."""
    size = Size(1, 512, hardware="ray")
    plan = Plan("grows", None, {"first": StagePlan(1, size, "ray"), "second": StagePlan(3, size, "ray")})

    @flow(name="grows", task_runner=SLOTaskRunner(plan, pools=[RayPool(concurrency=4)]))
    def grows(asked: list[dict[str, float]]) -> list[int]:
        begun = first.submit(tmp_path / "enough")
        rest = second.map(unmapped(begun), range(5))
        await_(lambda: requested() == asked)
        (tmp_path / "enough").touch()
        return rest.result()

    assert grows([{"CPU": 1.0, "memory": 512.0 * 2**20}] * 3) == [3, 4, 5, 6, 7]
    await_(lambda: requested() == [])  # it may shrink again
    ray_here.autoscaler.sdk.request_resources(bundles=[{"CPU": 7}])
    try:
        assert grows([{"CPU": 7}]) == [3, 4, 5, 6, 7]
        assert requested() == [{"CPU": 7}]
    finally:
        ray_here.autoscaler.sdk.request_resources(bundles=[])


def test_on_ray_a_bundle_costs_from_its_turn_whatever_becomes_of_it(tmp_path, ray_here):
    """Two take all of the cluster: one runs, and one queues. Their marks go with the run."""

    def linger(path: Path) -> None:
        path.touch()
        time.sleep(PATIENCE_S)

    backend = RayPool().backend(None)
    reports: SimpleQueue[Any] = SimpleQueue()
    for lease in (1, 2):
        backend.open(lease, Size(2, 512), reports.put)
        until(reports, Opened)
        backend.submit(lease, bundle(lease, linger, tmp_path / str(lease)))
        await_((tmp_path / "1").exists)
    ran = time.monotonic()
    kv = ray_here.experimental.internal_kv
    await_(lambda: kv._internal_kv_list("prefect-slo-", namespace="prefect_slo"))
    held = {}
    for lease in (2, 1):
        backend.cancel(lease)
        held[lease] = until(reports, Lost).held
    backend.shutdown()
    assert held[2][0] == held[2][1], "it was in the queue"
    assert held[1][0] <= ran < held[1][1]
    assert not kv._internal_kv_list("prefect-slo-", namespace="prefect_slo")


def test_a_ray_head_that_runs_nothing_is_no_worker(monkeypatch):
    ray = pytest.importorskip("ray")
    head = {"NodeID": "head", "Alive": True, "Resources": {"memory": 8e9, "node:__internal_head__": 1.0}}
    worker = {"NodeID": "worker", "Alive": True, "Resources": {"CPU": 4.0, "memory": 8e9}}
    here = RayPool("auto")._cluster(pytest.fail)
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    assert here.lack(Size(2, 512)) == "", "its autoscaler may bring one"
    assert "no node with a CPU or a GPU yet" in here.vacant()
    monkeypatch.setattr(ray, "nodes", lambda: [head, worker])
    assert (here.vacant(), here.workers()) == ("", {"worker"})
    assert "CPU=8 (the most: 4)" in here.lack(Size(8, 512))


def test_that_an_autoscaler_is_waited_for_is_said_once_a_size_whatever_nodes_come(monkeypatch):
    ray = pytest.importorskip("ray")
    said: list[str] = []
    here = RayPool("auto")._cluster(said.append)
    monkeypatch.setattr(ray_cluster, "autoscales", lambda: True)
    for cpus in (1.0, 2.0):
        node = {"NodeID": f"{cpus}", "Alive": True, "Resources": {"CPU": cpus, "memory": 8e9}}
        monkeypatch.setattr(ray, "nodes", lambda node=node: [node])
        assert [here.lack(Size(vcpus, 512)) for vcpus in (4, 8)] == ["", ""]
    assert [words.partition(". ")[0] for words in said] == [
        f"No Ray node has CPU={vcpus} (the most: 1), memory=5.36871e+08 (the most: 8e+09)" for vcpus in (4, 8)
    ]


def test_a_size_that_no_ray_node_has_is_refused_unless_ray_says_that_an_autoscaler_is_there(ray_here):
    said: list[str] = []
    kv, here, status = ray_here.experimental.internal_kv, RayPool()._cluster(said.append), b"__autoscaling_status"
    assert "CPU=4 (the most: 2)" in here.lack(Size(4, 512))
    assert not said

    def waits() -> bool:  # what watches this cluster writes meanwhile that it was put together by hand
        kv._internal_kv_put(status, b'{"autoscaler_report": {"active_nodes": {"head": 1}}}', overwrite=True)
        return here.lack(Size(4, 512)) == ""

    await_(waits)
    kv._internal_kv_del(status)
    [words] = said
    assert words.startswith("No Ray node has CPU=4 (the most: 2), ")
    assert "wait for the cluster's autoscaler" in words


ASKS = """
import sys, time
from prefect_slo import RayPool
from prefect_slo.control.need import Need
from prefect_slo.resources import Size

RayPool(sys.argv[1]).backend(None).expect(Need(now=((Size(1, 512), int(sys.argv[2])),)))
time.sleep(600)
"""


def test_what_rays_autoscaler_was_asked_by_processes_adds_up_and_ends_with_each_however_it_dies(ray_here):
    """Killed, they can take nothing back themselves; neither can what keeps the request, but it is started again."""
    address, worker = ray_here.get_runtime_context().gcs_address, {"CPU": 1.0, "memory": 512.0 * 2**20}
    processes = [subprocess.Popen([sys.executable, "-c", ASKS, address, str(workers)]) for workers in (2, 3)]
    try:
        await_(lambda: requested() == [worker] * 5)
        processes[0].kill()
        await_(lambda: requested() == [worker] * 3)
        mine = psutil.Process().children(recursive=True)
        [keeper] = [process for process in mine if process.name().startswith("ray::Keeper")]
        keeper.kill()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    await_(lambda: requested() == [])


def test_a_stage_that_falls_back_to_threads_needs_nothing_of_the_cluster_any_more(prefect_server):
    """What it takes doesn't pickle. A cluster that grew for it may shrink while it runs."""
    made: list[LocalCluster] = []

    def start(**options: Any) -> LocalCluster:
        made.append(LocalCluster(**options))
        return made[-1]

    options = {"n_workers": 0, "processes": False, "threads_per_worker": 1, "dashboard_address": None}
    adapt = {"minimum": 0, "maximum": 4, "interval": "50 ms"}
    pool = DaskPool(cluster=start, cluster_options=options, adapt=adapt, concurrency=2)
    plan = Plan("falls", None, {"held": StagePlan(2, Size(1, 512, hardware="dask"), "dask")})
    running, go_on = threading.Event(), threading.Event()

    @task
    def held(number: int) -> bool:
        running.set()
        return go_on.wait(PATIENCE_S)

    @flow(name="falls", task_runner=SLOTaskRunner(plan, pools=[pool]))
    def falls() -> list[bool]:
        waiting = held.map(range(4))
        assert running.wait(PATIENCE_S)
        await_(lambda: made[0]._adaptive.minimum == 0)
        go_on.set()
        return waiting.result()

    assert falls() == [True] * 4


def await_(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
