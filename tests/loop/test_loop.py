"""The loop on a real server with real worker processes: observe, profile, plan, run by the plan, compare, learn."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect import Flow, Task, flow, task
from prefect.artifacts import Artifact
from prefect.client.orchestration import SyncPrefectClient

from prefect_slo import planner, slo, slo_task
from prefect_slo.artifacts.publishing import key
from prefect_slo.blocks import SLOProfile, fold_in, folding, lease, plans, rebuild_profile
from prefect_slo.blocks import profile as profiles
from prefect_slo.errors import InvalidValue
from prefect_slo.loop import background, ended, knowledge, learning, saying
from prefect_slo.loop import director as directors
from prefect_slo.loop.director import LoopDirector
from prefect_slo.loop.profiling import Measurement, SweepReport, profile
from prefect_slo.runner.recipe import ObservedRun
from prefect_slo.telemetry import store
from prefect_slo.telemetry.store import read_runs

MENU = {"workers": (1, 2), "vcpus": 1}
SHOWN = 1  # runs that show the graph; what they show of a setting on the menu is measured, too
PER_STAGE = 4  # two settings, each twice
BLOB = 10_000_000
NOBODY = "http://127.0.0.1:9/api"


def burn(seconds: float) -> float:
    """Work, of CPU time, so that a busy machine doesn't make the work less."""
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass
    return seconds


@task
def load(n: int) -> list[int]:
    burn(0.02)
    return list(range(n))


@task
def train(shard: int) -> int:
    burn(0.03)
    return shard


@task
def blobs(n: int) -> list[bytes]:
    return [bytes([k]) * BLOB for k in range(n)]


@task
def size_of(blob: bytes) -> int:
    return len(blob)


@task
def check(shards: list[int]) -> int:
    burn(0.02)
    return sum(shards)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Path:
    """Logs of runs under way lie here; nothing has been said or read yet, and flows return when all is learned."""

    def soon(job: Callable[[], None]) -> None:
        behind.soon(job)
        assert behind.settle(200)

    behind = background.Background()
    monkeypatch.setattr(background, "soon", soon)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    monkeypatch.setattr(saying, "_said", set())
    monkeypatch.setattr(knowledge, "_REMEMBERED", knowledge._Remembered())
    monkeypatch.setattr(learning, "UNLEARNED", learning._Unlearned())
    return tmp_path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ObservedRun]:
    """What directors observe, besides what they make of it."""
    found: list[ObservedRun] = []
    observed = LoopDirector.observed

    def both(self: LoopDirector, run: ObservedRun) -> None:
        found.append(run)
        observed(self, run)

    monkeypatch.setattr(LoopDirector, "observed", both)
    return found


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], int]]:
    """How often something was logged."""
    caplog.set_level(logging.INFO)
    loggers = [logging.getLogger(name) for name in ("prefect.flow_runs", "prefect.slo")]
    for logger in loggers:
        logger.addHandler(caplog.handler)

    def count(words: str) -> int:
        return len({id(record) for record in caplog.records if words in record.getMessage()})

    yield count
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def unshared(stock: Task[..., Any]) -> Task[..., Any]:
    """The same task under a key of its own, so that no flow of another test has measured it."""
    fn = stock.fn
    copy = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__qualname__ = f"{fn.__name__}_{uuid4().hex}"
    copy.__annotations__, copy.__module__ = fn.__annotations__, fn.__module__
    return task(copy)


def letters(name: str, *, shared: bool = False, **options: Any) -> Flow[..., int]:
    """load → train x 4."""
    first, second = (load, train) if shared else (unshared(load), unshared(train))

    @flow(name=name)
    def body(n: int = 4) -> int:
        return sum(second.map(first.submit(n)).result())

    return slo(**{"latency": 20, "menu": MENU, **options})(body)


@pytest.fixture(scope="module")
def profiled(
    prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Flow[..., int], SweepReport]]:
    """A flow that was profiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path_factory.mktemp("slo")))
        sized = letters("profiled", shared=True)
        yield sized, profile(sized)


def ledger_runs(name: str) -> list[str]:
    found = SLOProfile.of_flow(name)
    return [run.order.run_id for run in found.ledger().completed()] if found is not None else []


# ---- observe --------------------------------------------------------------------------------------------------------


def test_the_first_run_observes_and_says_so_once(seen: list[ObservedRun], said: Callable[[str], int]) -> None:
    sized = letters("first-seen")
    assert [sized(), sized()] == [6, 6]
    assert [run.recipe.plan for run in seen] == [None, None]
    assert said("runs as it is and is observed") == 2, "once for what was missing, once for what is missing still"
    assert sized() == 6
    assert said("runs as it is and is observed") == 2
    assert len(ledger_runs("first-seen")) == 3
    assert SLOProfile.of_flow("first-seen").workflow().order == ("load", "train")
    assert list(Path(learning.SLOSettings().telemetry_directory).iterdir()) == [], "published runs leave no file"


def test_without_telemetry_nothing_is_learned(seen: list[ObservedRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_TELEMETRY", "false")
    assert letters("untold")() == 6
    assert seen[-1].completed
    assert SLOProfile.of_flow("untold") is None


def test_a_flow_that_does_without_a_failed_item_learns_all_the_same(said: Callable[[str], int]) -> None:
    own = unshared(train)

    @task
    def picky(shard: int) -> int:
        if shard == 2:
            raise ValueError(shard)
        return shard

    @slo(latency=20, menu=MENU)
    @flow(name="tolerant")
    def body() -> int:
        good = sum(own.map(range(4)).result())
        return good + sum(state.is_completed() for state in picky.map(range(4), return_state=True))

    assert [body(), body()] == [9, 9]
    ledger = SLOProfile.of_flow("tolerant").ledger()
    assert [(run.status, len(run.ran)) for run in ledger.runs.values()] == [("completed", 2)] * 2
    assert len(rows_of("tolerant", "train")) == 2, "the stage that all went well in is learned from"
    assert rows_of("tolerant", "picky") == [], "the other one isn't"
    assert said("1 items of stage 'picky' failed or lost their worker") == 1


def test_a_run_that_timed_out_has_missed_its_bound(said: Callable[[str], int]) -> None:
    own = unshared(train)

    @slo(latency=20, menu=MENU)
    @flow(name="overdue")
    def body(hang: bool = False) -> int:
        found = own.submit(1).result()
        threading.Event().wait(60 if hang else 0)
        return found

    body()
    body.timeout_seconds = 1.5
    assert body(True, return_state=True).name == "TimedOut"
    past = knowledge.knowledge("overdue").past  # of runs that began in one second, either may be the first
    assert sorted(run.timed_out for run in past) == [False, True]
    assert all(run.met(body.task_runner.director.slo) != run.timed_out for run in past)
    assert len(rows_of("overdue", "train")) == 1, "it counts, and does not train"
    assert said("a run that ended timed out teaches nothing") == 1


def test_what_the_menus_cannot_say_costs_no_rows(
    said: Callable[[str], int], seen: list[ObservedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise InvalidValue("menu.workers", 0, "a whole number of at least 1")

    monkeypatch.setattr(ended, "with_menus", broken)
    assert letters("menuless")() == 6
    [stored] = read_runs("menuless")
    assert [(r.status, len(r.stages)) for r in stored.records] == [("completed", 2)]
    assert said("its stages' menus are unknown") == 1


def test_a_flow_returns_before_its_run_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = background.Background()
    monkeypatch.setattr(background, "soon", behind.soon)
    returned, learned = threading.Event(), []
    learn = learning.learn

    def late(flow_name: str, *args: Any, **options: Any) -> knowledge.Knowledge:
        assert returned.wait(60)
        learned.append(flow_name)
        return learn(flow_name, *args, **options)

    monkeypatch.setattr(learning, "learn", late)
    assert letters("unhurried")() == 6
    assert learned == []
    assert SLOProfile.of_flow("unhurried") is None
    assert [record.status for stored in read_runs("unhurried") for record in stored.records] == ["completed"]
    returned.set()
    assert behind.settle(60)
    assert (learned, len(ledger_runs("unhurried"))) == (["unhurried"], 1)


# ---- profile --------------------------------------------------------------------------------------------------------


def test_a_sweep_measures_until_the_flow_is_identified(profiled: tuple[Flow[..., int], SweepReport]) -> None:
    _, report = profiled
    assert report.identified
    assert report.stopped == "every setting was measured"
    assert PER_STAGE <= len(report.runs) <= SHOWN + PER_STAGE
    assert [run.number for run in report.runs] == list(range(1, len(report.runs) + 1))
    assert report.runs[-1].planned == len(report.runs)
    rows = SLOProfile.of_flow("profiled").training().stage_runs.of_stage("train")
    assert sorted(rows["workers"][rows["hardware"] == "cpu"].tolist()) == [1, 1, 2, 2]
    assert report.cost_usd > 0
    assert report.known.plan is not None, "a plan is in force from now on"


def test_a_second_sweep_measures_nothing(profiled: tuple[Flow[..., int], SweepReport]) -> None:
    again = profile(profiled[0])
    assert len(again.runs) == 1, "the run that shows the graph"
    assert again.stopped == "every setting had been measured before"
    assert again.identified


def test_then_runs_are_planned_executed_by_the_plan_compared_and_learned(
    profiled: tuple[Flow[..., int], SweepReport], seen: list[ObservedRun], said: Callable[[str], int]
) -> None:
    sized, _ = profiled
    before = len(ledger_runs("profiled"))
    stored = SLOProfile.of_flow("profiled")
    revision, plan = stored.revision, stored.plan_in_force()
    assert sized() == 6
    run = seen[-1]
    assert plan is not None
    assert run.recipe.plan is not None
    assert {s: p.option for s, p in run.recipe.plan.stages.items()} == {s: p.option for s, p in plan.stages.items()}
    assert {row.stage: row.workers for row in run.stage_runs} == {s: p.workers for s, p in plan.stages.items()}
    assert {row.hardware for row in run.stage_runs} == {"cpu"}, "in worker processes"
    assert plan.certificate is not None
    artifact = Artifact.get(key("attainment", "profiled"))
    assert artifact is not None
    assert str(artifact.flow_run_id) == run.run_id
    assert "runs kept the bound" in artifact.description
    assert run.run_id in ledger_runs("profiled")
    assert len(ledger_runs("profiled")) == before + 1
    assert SLOProfile.of_flow("profiled").revision > revision
    assert said("runs as it is") == 0


def test_the_plan_says_how_data_pass(profiled: tuple[Flow[..., int], SweepReport]) -> None:
    plan = SLOProfile.of_flow("profiled").plan_in_force()
    [edge] = plan.passing
    assert (edge.source, edge.sink, edge.method) == ("load", "train", "inline")
    assert 0 < edge.size_mb < 0.01
    assert edge.why.startswith("inline")


def test_a_mode_that_only_advises_shows_the_plan_and_follows_nothing(
    profiled: tuple[Flow[..., int], SweepReport], seen: list[ObservedRun], said: Callable[[str], int]
) -> None:
    advised = letters("profiled", shared=True, mode="advise")
    assert advised() == 6
    assert seen[-1].recipe.plan is None
    assert said("it is shown and not followed") == 1
    facts = next(iter(read_runs("profiled"))).records[0].facts
    assert (facts["mode"], facts["plan_digest"], facts["predicted_s"]) == ("advise", "", None)


def test_sweeps_are_refused_what_they_cannot_do() -> None:
    with pytest.raises(InvalidValue, match="decorated with @slo"):
        profile(flow(lambda: None, name="plain"))
    for wrong in ({"inputs": ()}, {"max_seconds": 0}, {"max_usd": -1}, {"repeats": 0}):
        with pytest.raises(InvalidValue):
            profile(letters("refused"), **wrong)


def test_a_time_cap_and_a_money_cap_end_a_sweep() -> None:
    sized = letters("capped")
    timed = profile(sized, max_seconds=1e-3)
    assert (len(timed.runs), timed.stopped) == (1, "the time cap of 0.001 s"), (
        "nothing is begun that would not end in time"
    )
    assert not timed.identified
    dear = profile(sized, max_usd=1.5 * timed.cost_usd)
    assert dear.stopped.startswith("the money cap")
    assert len(dear.runs) <= 3
    measured = len(timed.runs) + len(dear.runs)
    assert len(ledger_runs("capped")) == measured, "what was measured is kept: a later sweep goes on from there"


def test_failing_runs_are_counted_and_do_not_train() -> None:
    own = unshared(train)

    @flow(name="failing")
    def body(fail: bool = False) -> int:
        found = sum(own.map(range(2)).result())
        if fail:
            raise RuntimeError("no luck")
        return found

    sized = slo(latency=20, menu=MENU)(body)
    report = profile(sized, [{}, {"fail": True}])
    failed = [run for run in report.runs if run.error]
    assert len(failed) == len(report.runs) // 2 >= 2
    assert "RuntimeError: no luck" in failed[0].error
    found = SLOProfile.of_flow("failing").ledger()
    assert len(found.runs) == len(report.runs)
    assert sum(run.status == "failed" for run in found.runs.values()) == len(failed)
    rows = {row.row.run_id for group in found.groups.values() for m in group.values() for row in m.rows}
    assert rows == {run.order.run_id for run in found.completed()}


def test_a_flow_that_always_fails_ends_its_sweep_at_once() -> None:
    @flow(name="hopeless")
    def body() -> int:
        raise RuntimeError("no luck")

    report = profile(slo(latency=20)(body))
    assert (report.stopped, len(report.runs), report.identified) == ("the first run failed", 1, False)


def test_ctrl_c_in_the_middle_keeps_what_was_measured() -> None:
    sized = letters("interrupted")
    interrupt_after = 3
    heard: list[Measurement] = []

    def hear(run: Measurement) -> None:
        heard.append(run)
        if len(heard) == interrupt_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(sized, heard=hear)
    assert len(ledger_runs("interrupted")) == interrupt_after
    rest = profile(sized)
    assert len(rest.runs) <= SHOWN + PER_STAGE - (interrupt_after - SHOWN), "only what was missing"
    assert rest.identified


def test_async_flows_are_profiled_too() -> None:
    own = unshared(train)

    @slo(latency=20, menu=MENU)
    @flow(name="profiled asynchronously")
    async def body() -> int:
        return sum(own.map(range(3)).result())

    assert profile(body, repeats=2).identified


@pytest.mark.slow
def test_a_stage_with_big_results_is_measured_on_threads_too() -> None:
    make, take = unshared(blobs), unshared(size_of)

    @slo(latency=20, menu=MENU, mode="enforce")
    @flow(name="big results")
    def body() -> int:
        return sum(take.map(make.submit(4)).result())

    report = profile(body)
    tried = Counter(run.settings["blobs"].pool for run in report.runs if run.settings)
    assert tried["thread"] >= 2
    assert tried["process"] >= 3
    assert report.known.plan is not None
    assert body() == 4 * BLOB
    menu = SLOProfile.of_flow("big results").workflow()["blobs"].menu
    assert {pool.name for pool in menu.pools} == {"process", "thread"}, "both stay on offer"


def test_results_from_a_cache_are_worked_for_in_a_sweep(tmp_path: Path) -> None:
    from prefect.cache_policies import INPUTS
    from prefect.filesystems import LocalFileSystem

    results = LocalFileSystem(basepath=str(tmp_path / "results"))
    results.save("slo-cache-test", overwrite=True)

    @task(cache_policy=INPUTS, persist_result=True)
    def remembered(shard: int) -> int:
        burn(0.02)
        return shard

    @slo(latency=20, menu=MENU)
    @flow(name="remembering", result_storage=results)
    def body() -> int:
        return sum(remembered.map(range(3)).result())

    body()
    report = profile(body)
    assert report.identified, report.known.missing()
    rows = SLOProfile.of_flow("remembering").training().stage_runs.of_stage("remembered")
    assert min(row.compute_s for row in rows.rows() if row.hardware == "cpu") > 0.01, "no row of a run that did no work"


def test_a_stage_that_does_not_pickle_is_measured_and_run_on_threads(seen: list[ObservedRun]) -> None:
    @task
    def locked(shard: int) -> Any:
        burn(0.01)
        return threading.Lock()

    @slo(latency=20, menu=MENU)
    @flow(name="unpicklable")
    def body() -> int:
        return len(locked.map(range(3)).result())

    report = profile(body)
    assert report.identified, report.known.missing()
    for _ in range(3):
        assert body() == 3
    plans = [run.recipe.plan for run in seen[-3:]]
    assert all(plan is not None and plan["locked"].pool == "thread" for plan in plans), "and it stays so"


def test_knobs_are_measured_and_chosen(seen: list[ObservedRun]) -> None:
    @slo_task(knobs={"effort": (1, 6)}, pins={"workers": 1})
    @task
    def tuned(shard: int, effort: int = 6) -> int:
        burn(0.02 * effort)
        return effort

    @slo(latency=20, menu=MENU)
    @flow(name="tuned")
    def body() -> list[int]:
        return tuned.map(range(3)).result()

    report = profile(body)
    assert report.identified, report.known.missing()
    assert {dict(run.settings["tuned"].knobs)["effort"] for run in report.runs if run.settings} == {1, 6}
    assert body() == [1, 1, 1], "the cheapest that keeps the bound"
    walls = {effort: [] for effort in (1, 6)}
    table = SLOProfile.of_flow("tuned").training().stage_runs
    for effort, wall in zip(table.extra["effort"], table["wall_s"], strict=True):
        walls.get(effort, []).append(wall)
    assert min(walls[6]) > max(min(walls[1]), 0.3)


def test_batches_are_measured_and_planned(seen: list[ObservedRun]) -> None:
    @slo_task(batched=True, menu={"batch": (1, 4)}, pins={"workers": 1})
    @task
    def gathered(shard: list[int]) -> list[int]:
        burn(0.03)
        return [2 * one for one in shard]

    @slo(latency=20, menu=MENU)
    @flow(name="gathered")
    def body() -> list[int]:
        return gathered.map(range(8)).result()

    report = profile(body)
    assert report.identified, report.known.missing()
    assert body() == [2 * i for i in range(8)]
    assert seen[-1].recipe.plan["gathered"].batch == 4, "four at a time are cheaper"
    assert seen[-1].stage_runs[0].batch == 4


def test_the_way_back_leads_over_plans_that_are_kept(profiled: tuple[Flow[..., int], SweepReport]) -> None:
    plan = SLOProfile.of_flow("profiled").plan_in_force()
    assert plan is not None
    other = plan.with_stage("train", workers=3 - plan["train"].workers)
    for number, each in enumerate((plan, other, None, plan)):
        plans.put_in_force("rolling", each, f"step {number}")
    known = knowledge.Knowledge.of("rolling", SLOProfile.of_flow("rolling"))
    assert list(learning.earlier_plans(known)) == [other, plan], "newest first, without the one in force"


def test_a_plan_by_older_observations_does_not_replace_one_by_newer_ones(
    profiled: tuple[Flow[..., int], SweepReport],
) -> None:
    sized, _ = profiled
    slo_ = sized.task_runner.director.slo
    known = knowledge.knowledge("profiled")
    plan = known.plan
    other = plan.with_stage("train", workers=3 - plan["train"].workers)
    plans.put_in_force("profiled", other, "by another run, which has seen more")
    try:
        late = knowledge.replace(known, plan=None)
        found, reason = learning._planned_again(late, slo_, 0, 60.0, SLOProfile.of_flow("profiled"))
        assert reason == learning.SUPERSEDED
        assert found.plan == other == SLOProfile.of_flow("profiled").plan_in_force()
    finally:
        plans.put_in_force("profiled", plan, "as it was")
        knowledge.forget("profiled")


# ---- what is shared -------------------------------------------------------------------------------------------------


def test_of_a_profiled_flow_with_one_more_stage_only_that_is_measured(
    profiled: tuple[Flow[..., int], SweepReport],
) -> None:
    @flow(name="growing")
    def grown(n: int = 4) -> int:
        return check.submit(train.map(load.submit(n))).result()

    assert len(profile(letters("growing", shared=True)).runs) == SHOWN
    report = profile(slo(latency=20, menu=MENU)(grown))
    swept = [run for run in report.runs if run.settings]
    assert len(swept) == 4 - SHOWN, "the one setting of the new stage, four times"
    assert len({(run.settings["load"], run.settings["train"]) for run in swept}) == 1, "the others stay as they are"
    assert report.identified
    assert len(rows_of("growing", "check")) == SHOWN + len(swept)


def test_a_profiled_task_is_not_measured_again_in_a_second_flow(profiled: tuple[Flow[..., int], SweepReport]) -> None:
    report = profile(letters("second-flow", shared=True))
    assert [dict(run.settings) for run in report.runs] == [{}], "the run that shows the graph, and no other"
    assert report.identified
    assert report.known.plan is not None


def rows_of(name: str, stage: str) -> list[str]:
    table = SLOProfile.of_flow(name).training().stage_runs
    return [str(run) for run in table.of_stage(stage)["run_id"]]


# ---- many at once, other machines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_runs_at_once_lose_no_observation_and_leave_one_profile(
    seen: list[ObservedRun], said: Callable[[str], int], runs: int
) -> None:
    name = f"at-once-{runs}"
    sized = letters(name)
    results: list[int] = []

    def run() -> None:
        results.append(sized())

    threads = [threading.Thread(target=run) for _ in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    assert results == [6] * runs
    fold_in(name)
    ids = {run.run_id for run in seen}
    assert len(ids) == runs
    assert {record.run_id for stored in read_runs(name) for record in stored.records} == ids
    assert set(ledger_runs(name)) == ids
    found = SLOProfile.of_flow(name)
    assert {len(rows_of(name, stage)) for stage in ("load", "train")} == {runs}
    rebuilt = rebuild_profile(name)
    assert rebuilt.content_digest == found.content_digest, "as if they had come one after another"
    assert said("nothing was learned") == 0


PROCESS = """
import sys, time
from prefect import flow, task
from prefect_slo import slo

@task
def train(shard: int) -> int:
    begun = time.thread_time()
    while time.thread_time() - begun < 0.03:
        pass
    return shard

@slo(latency=20, menu={"workers": (1, 2), "vcpus": 1})
@flow(name="processes-at-once")
def body() -> int:
    return sum(train.map(range(4)).result())

assert [body() for _ in range(2)] == [6, 6]
"""


@pytest.mark.slow
def test_eight_runs_in_four_processes_lose_no_observation(home: Path, prefect_server: str) -> None:
    (home / "run.py").write_text(PROCESS)
    env = {**os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_LOGGING_LEVEL": "WARNING"}
    running = [subprocess.Popen([sys.executable, str(home / "run.py")], env=env) for _ in range(4)]
    assert [process.wait(timeout=200) for process in running] == [0] * 4
    found = fold_in("processes-at-once")
    assert len(ledger_runs("processes-at-once")) == 8
    assert len(rows_of("processes-at-once", "train")) == 8
    assert rebuild_profile("processes-at-once").content_digest == found.content_digest


def test_with_the_local_disk_wiped_another_machine_learns_the_same_from_the_api_alone(
    profiled: tuple[Flow[..., int], SweepReport], home: Path
) -> None:
    before = fold_in("profiled", refit=True)
    shutil.rmtree(home, ignore_errors=True)
    rebuilt = rebuild_profile("profiled")
    assert before.model_document() is not None
    assert rebuilt.model_document() == before.model_document()
    assert rebuilt.content_digest == before.content_digest


# ---- what fails is ours, never the flow -----------------------------------------------------------------------------


@contextmanager
def unreachable() -> Iterator[None]:
    """The package's own calls go to a port where nobody listens; Prefect's go where they went."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (profiles, folding, lease, plans, store):
            patch.setattr(module, "api_client", lambda: SyncPrefectClient(NOBODY))
        yield


def test_an_api_that_only_we_cannot_reach_costs_a_notice(
    quick_retries: None, seen: list[ObservedRun], said: Callable[[str], int], home: Path
) -> None:
    sized = letters("out-of-reach")
    with unreachable():
        assert [sized(), sized()] == [6, 6]
    assert said("runs as it is: there is no plan") == 1
    assert said("is kept in") == 2
    assert said("nothing was learned from this run yet") == 0, "it isn't even tried"
    assert len(list(home.rglob("*.slolog"))) == 2, "kept on disk"
    learning.sweep_orphans(learning.SLOSettings().telemetry_directory)
    fold_in("out-of-reach")
    assert set(ledger_runs("out-of-reach")) == {run.run_id for run in seen}, "and published once the API answers"


def test_a_disk_that_cannot_be_written_costs_a_notice(
    said: Callable[[str], int], seen: list[ObservedRun], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    (home / "file").write_text("in the way")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(home / "file"))
    assert letters("no-disk")() == 6
    assert said("stays in memory until its end") == 1
    assert ledger_runs("no-disk") == [seen[-1].run_id], "published all the same"


def test_a_planner_that_raises_costs_a_notice(
    profiled: tuple[Flow[..., int], SweepReport],
    said: Callable[[str], int],
    seen: list[ObservedRun],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a defect in the planner")

    monkeypatch.setattr(planner, "make_plan", broken)
    hurried = letters("profiled", shared=True, latency=7)  # there is no plan for this bound yet
    assert [hurried(), hurried()] == [6, 6]
    assert [run.recipe.plan for run in seen] == [None, None]
    assert said("there is no plan (ZeroDivisionError: a defect in the planner)") == 1
    assert said("nothing was learned from this run yet; a later one will (ZeroDivisionError") == 1


def test_features_that_raise_cost_a_notice(said: Callable[[str], int]) -> None:
    sized = letters("featured", features=lambda given: {"n": 1 / 0})
    assert [sized(), sized()] == [6, 6]
    assert said("features= failed") == 1


def test_a_view_that_cannot_be_drawn_costs_a_notice(
    profiled: tuple[Flow[..., int], SweepReport], said: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("a defect in a view")

    monkeypatch.setattr(ended, "stage_forecasts", broken)
    assert profiled[0]() == 6
    assert said("its plan was not compared with the run") == 1


def test_knowledge_of_a_while_ago_serves_while_the_api_is_down(
    quick_retries: None,
    profiled: tuple[Flow[..., int], SweepReport],
    monkeypatch: pytest.MonkeyPatch,
    seen: list[ObservedRun],
) -> None:
    monkeypatch.setattr(knowledge, "FRESH_S", -1.0)
    with unreachable(), pytest.raises(httpx.ConnectError):
        knowledge.knowledge("profiled")
    known = knowledge.knowledge("profiled")
    with unreachable():
        assert knowledge.knowledge("profiled") is known
        assert profiled[0]() == 6
    assert seen[-1].recipe.plan is not None


def test_a_sweep_tells_only_its_own_flow(seen: list[ObservedRun]) -> None:
    inner, own = letters("inner"), unshared(train)

    @flow(name="outer")
    def outer() -> int:
        return inner() + own.submit(1).result()

    profile(slo(latency=20, menu=MENU)(outer), repeats=1)
    recipes = {run.flow_name: run.recipe for run in seen}
    assert recipes["inner"].plan is None
    assert recipes["outer"].plan is not None
    assert len(recipes["outer"].plan.stages) == 1
    assert directors._FOLLOWING.get() is None
