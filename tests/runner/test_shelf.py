"""Results in shared memory: written once, mapped by every call that takes them, nobody's change seen by another."""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect import flow, task, unmapped

from prefect_slo import SLOTaskRunner
from prefect_slo.edges import EdgePlan, Way
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Size
from prefect_slo.runner import shelf as shelves
from prefect_slo.runner.shelf import Shelf, dump, load


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(50e6, tmp_path)


def test_a_result_is_written_once_and_comes_back_from_its_file(shelf: Shelf, tmp_path: Path) -> None:
    value = {"a": np.arange(100_000), "b": [np.ones((300, 200), order="F"), "text"]}
    name = shelf.keep(1, value)
    assert name == shelf.keep(1, value)
    payload = dump(["x", value, value], {id(value): name})
    assert len(payload) < 1000
    (text, first, second), mapped = load(payload)
    assert text == "x"
    assert mapped >= value["a"].nbytes + value["b"][0].nbytes
    np.testing.assert_array_equal(first["a"], value["a"])
    np.testing.assert_array_equal(second["b"][0], value["b"][0])
    assert len(list(tmp_path.rglob("*"))) == 3  # the run's folder, its lock, and one file


def test_who_changes_its_argument_changes_nobody_elses(shelf: Shelf) -> None:
    value = np.zeros(50_000)
    payload = dump(value, {id(value): shelf.keep(1, value)})
    mine, _ = load(payload)
    mine += 1
    theirs, _ = load(payload)
    assert mine.sum() == 50_000
    assert theirs.sum() == 0
    assert value.sum() == 0


@pytest.mark.parametrize(
    "value", [np.arange(200_000)[::2], np.asfortranarray(np.ones((300, 300)))[:, ::3], b"x" * 10**6]
)
def test_values_of_any_layout_come_back(shelf: Shelf, value: Any) -> None:
    found, _ = load(dump(value, {id(value): shelf.keep(1, value)}))
    np.testing.assert_array_equal(found, value)


def test_what_is_small_or_has_no_room_travels(shelf: Shelf) -> None:
    assert shelf.keep(1, b"small") is None
    assert shelf.keep(2, bytes(60_000_000)) is None
    assert shelf.keep(3, bytes(30_000_000)) is not None
    assert shelf.keep(4, bytes(30_000_000)) is None, "the first has taken more than half"


def test_it_is_empty_when_it_is_closed_and_what_is_mapped_stays(shelf: Shelf, tmp_path: Path) -> None:
    value = np.arange(100_000)
    found, _ = load(dump(value, {id(value): shelf.keep(1, value)}))
    shelf.close()
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(found, value)


def test_what_a_dead_process_left_is_swept(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from prefect_slo.runner.shelf import Shelf
Shelf(1e9, Path({str(tmp_path)!r})).keep(1, bytes(200_000))
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    [left] = tmp_path.iterdir()
    assert f"-{os.getpid()}-" not in left.name
    Shelf(1e9, tmp_path)
    assert list(tmp_path.iterdir()) == [], "as another is made, before it writes anything"


def test_what_is_left_is_swept_though_its_process_id_is_taken_again(tmp_path: Path) -> None:
    left = tmp_path / f"prefect-slo-shelf-{os.getpid()}-left"
    left.mkdir()
    (left / "1").write_bytes(bytes(100))
    Shelf(1e9, tmp_path).keep(1, bytes(200_000))
    assert not left.exists()


def test_a_run_of_another_namespace_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of this namespace has the id that the other has in its own."""
    shelf = Shelf(1e9, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: 2**22 + 1)
        name = shelf.keep(1, bytes(200_000))
    assert name is not None
    Shelf(1e9, tmp_path).keep(1, bytes(200_000))
    assert Path(name).exists()
    shelf.close()
    assert not Path(name).parent.exists()


def test_a_write_that_fails_leaves_nothing_of_its_file(shelf: Shelf, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        assert shelf.keep(1, bytes(3 * 2**20)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_a_disk_without_room_is_given_no_file(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shelves.shutil, "disk_usage", lambda path: room._replace(free=1000))
    assert shelf.keep(1, bytes(200_000)) is None
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_what_comes_after_it_is_closed_travels(shelf: Shelf, tmp_path: Path) -> None:
    shelf.close()
    assert shelf.keep(1, bytes(200_000)) is None
    assert list(tmp_path.iterdir()) == []


def passing(method: str, *stages: str) -> Plan:
    """A plan in which the first stage hands on so to each of the others."""
    edges = tuple(EdgePlan(stages[0], stage, Way(method, 0.1, 0.0)) for stage in stages[1:])
    sizes = {stage: StagePlan(2, Size(1, 1024), "process", record="bare") for stage in stages}
    return Plan("f", None, sizes, passing=edges)


@task
def make(n: int) -> np.ndarray:
    return np.ones(n)


@task
def total(data: np.ndarray, by: int) -> tuple[float, int, bool]:
    data *= by
    owner = data
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return float(data.sum()), by, isinstance(getattr(owner, "obj", None), mmap.mmap)


@pytest.mark.parametrize("record", ["bare", "full"])
def test_the_runner_obeys_the_plan(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: Any
) -> None:
    """By plan a large result is written once and mapped by each call; otherwise it travels with each."""
    monkeypatch.setattr(shelves, "_SHARED", tmp_path)
    written: list[str] = []
    original = Shelf._write
    monkeypatch.setattr(Shelf, "_write", lambda self, value: written.append("x") or original(self, value))

    def run(plan: Plan) -> Any:
        stages = {name: StagePlan(2, Size(1, 1024), "process", record=record) for name in plan.stages}
        runner = SLOTaskRunner(Plan(plan.workflow, None, stages, passing=plan.passing))

        @flow(task_runner=runner)
        def f() -> Any:
            return total.map(unmapped(make.submit(200_000)), range(6)).result()

        return f()

    expected = [(200_000.0 * n, n) for n in range(6)]
    mapped = run(passing("machine", "make", "total"))
    assert [row[:2] for row in mapped] == expected
    assert all(row[2] for row in mapped), "each call has it from the file"
    assert written == ["x"]
    sent = run(passing("inline", "make", "total"))
    assert [row[:2] for row in sent] == expected
    assert not any(row[2] for row in sent)
    assert written == ["x"]
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
