"""Stages with a share of a GPU in flows: placed on their device here, run on the CPU where there is none."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import cloudpickle
import pytest
from prefect import flow, task

from prefect_slo.declaration import Declaration
from prefect_slo.placement import Share
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Outcome, Progress
from prefect_slo.runner.backends.remote import Work, run_here
from prefect_slo.runner.local import gpus
from prefect_slo.runner.pools import PROCESS, THREAD
from prefect_slo.runner.recipe import Recipe
from prefect_slo.runner.rules import stage_rule
from prefect_slo.runner.task_runner import SLOTaskRunner

HALF = Size(0.25, 512, 0.5, "gpu")
PLAN = Plan("looks", None, {"look": StagePlan(4, HALF, PROCESS, record="bare")})


@task
def look(item: int) -> tuple[str | None, float, float]:
    """The device that it sees, and from when to when it ran."""
    begun = time.monotonic()
    time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES"), begun, time.monotonic()


@flow(task_runner=SLOTaskRunner(PLAN))
def looks(n: int) -> list[tuple[str | None, float, float]]:
    return look.map(range(n)).result()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefect_server: str) -> pytest.MonkeyPatch:
    """This machine, with books of its own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_a_stage_with_half_a_gpu_runs_twice_at_once_on_it_and_never_more(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("PREFECT_INTEGRATIONS_SLO_GPU_DEVICES", "GPU-x:16384")
    seen = looks(12)
    assert {device for device, _, _ in seen} == {"GPU-x"}
    most = max(sum(begun <= at < ended for _, begun, ended in seen) for _, at, _ in seen)
    assert most <= 2


def test_where_there_is_no_gpu_it_runs_on_the_cpu_and_says_so(
    machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.setenv("PREFECT_INTEGRATIONS_SLO_GPU_DEVICES", "none")
    assert {device for device, _, _ in looks(3)} == {None}
    assert "'look' was to have 0.5 GPU, and there is no GPU here: it runs on the CPU" in caplog.text


def test_the_rule_of_a_stage_asks_for_gpus_only_where_it_needs_one() -> None:
    def rule(size: Size, *, lacks: str) -> Size:
        plan = Plan("f", None, {"look": StagePlan(1, size, PROCESS)})
        made = stage_rule("look", look, Recipe(plan), Declaration(), processes=True, lacks_gpus=lambda _: lacks)
        assert made.fallback == (None if made.size.gpu else THREAD), "threads would use a device unaccounted for"
        return made.size

    assert rule(HALF, lacks="") == HALF
    assert rule(HALF, lacks="none is here") == Size(0.25, 512)
    plain = Plan("f", None, {"look": StagePlan(1, Size(1, 512), PROCESS)})
    stage_rule(
        "look", look, Recipe(plain), Declaration(), processes=True, lacks_gpus=lambda _: pytest.fail("asked in vain")
    )


def test_on_a_cluster_a_share_is_told_to_libraries_and_the_device_is_the_clusters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    names = ("CUDA_VISIBLE_DEVICES", gpus.FRACTION, "CUPY_GPU_MEMORY_LIMIT")
    items = tuple((k, cloudpickle.dumps(name)) for k, name in enumerate(names))

    class Environment:  # a local one: it travels by value
        def open(self, emit: object) -> object:
            return lambda item, payload: Outcome(cloudpickle.dumps(os.environ.get(cloudpickle.loads(payload))))

    bundle = Bundle(1, "look", cloudpickle.dumps(Environment()), items)
    reply = run_here(Work("t", bundle, Size(0.5, 512, 0.25, "gpu"), ()))
    told = [cloudpickle.loads(i.outcome.payload) for r in reply.reports if isinstance(r, Progress) for i in r.items]
    assert told == ["7", "0.2500", "25%"]


def test_on_a_cluster_the_reply_comes_when_the_process_has_let_go_of_its_device() -> None:
    class Leaving:  # a local one: it travels by value
        def open(self, emit: object) -> object:
            def run(item: int, payload: bytes) -> Outcome:
                threading.Thread(target=time.sleep, args=(0.5,)).start()  # the interpreter's end waits for it
                return Outcome(cloudpickle.dumps(os.getpid()))

            return run

    bundle = Bundle(1, "leave", cloudpickle.dumps(Leaving()), ((1, cloudpickle.dumps(None)),))
    reply = run_here(Work("t", bundle, Size(0.5, 512, 0.25, "gpu"), ()))
    [pid] = [cloudpickle.loads(i.outcome.payload) for r in reply.reports if isinstance(r, Progress) for i in r.items]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_share_with_memory_is_told_in_bytes_where_the_device_is_not_known() -> None:
    told = gpus.limits(Share(0.25, 2048), "mps")
    assert told["CUPY_GPU_MEMORY_LIMIT"] == str(2048 * 2**20)
    assert told["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=2048M"
    assert gpus.FRACTION not in told
