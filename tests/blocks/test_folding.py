from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from prefect_slo.blocks import (
    SLOProfile,
    elsewhere,
    fold_in,
    plan_from_history,
    put_in_force,
    rebuild_profile,
    update_profile,
)
from prefect_slo.blocks import profile as profile_module
from prefect_slo.errors import InvalidPlan, NotEnoughObservations
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.telemetry.store import publish, read_runs

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_the_first_fold_makes_a_profile_that_loads_as_it_was_saved(make_run, fit_sums):
    publish("first", [make_run("first", 1)])
    profile = fold_in("first", fit=fit_sums, objective={"latency_s": 30.0})
    loaded = SLOProfile.of_flow("first")
    assert all(getattr(loaded, name) == getattr(profile, name) for name in SLOProfile.model_fields)
    assert loaded.revision == 1
    assert loaded.objective == {"latency_s": 30.0}
    assert loaded.model_document()["latency_s"] == [["first-1", 5.0]]
    assert loaded.stages == ["load: 1 rows at 1 settings", "train: 1 rows at 1 settings"]


def test_a_run_counts_once_however_often_it_is_stored_or_folded(make_run, fit_sums):
    run = make_run("once", 1)
    publish("once", [run])
    first = fold_in("once", fit=fit_sums)
    publish("once", [run, replace(make_run("once", 2), status="failed")])
    second = fold_in("once", fit=fit_sums)
    assert second.model == first.model
    assert (first.revision, second.revision) == (1, 2)
    assert fold_in("once", fit=fit_sums).revision == 2
    assert fold_in("once", fit=fit_sums, refit=True).revision == 3


def test_a_flow_without_runs_has_an_empty_profile(fit_sums):
    profile = fold_in("nothing yet", fit=fit_sums)
    assert (profile.workflow(), profile.training(), profile.coverage()) == (None, None, {})
    assert (profile.model_document(), profile.fit_note) == (None, "no completed run yet")


def test_what_was_grown_run_by_run_and_what_is_rebuilt_from_the_api_are_equal(make_run, fit_sums):
    for number in (3, 1, 2, 5, 4):
        publish("rebuilt", [make_run("rebuilt", number, workers=number)])
        grown = fold_in("rebuilt", fit=fit_sums, objective={"latency_s": 9.0})
    rebuilt = rebuild_profile("rebuilt", fit=fit_sums)
    assert rebuilt.observations == grown.observations
    assert rebuilt.model == grown.model
    assert rebuilt.content_digest == grown.content_digest
    assert (rebuilt.revision, rebuilt.objective) == (6, {"latency_s": 9.0})


def test_a_profile_that_was_deleted_is_rebuilt_from_artifacts_alone(make_run, fit_sums):
    publish("deleted", [make_run("deleted", n) for n in range(3)])
    before = fold_in("deleted", fit=fit_sums)
    with get_client(sync_client=True) as client:
        document = client.read_block_document_by_name("deleted", "slo-profile")
        client.delete_block_document(document.id)
    assert SLOProfile.of_flow("deleted") is None
    after = rebuild_profile("deleted", fit=fit_sums)
    assert after.content_digest == before.content_digest
    assert after.model_document() == before.model_document()


REBUILD = """
import json
from prefect_slo.blocks import rebuild_profile
profile = rebuild_profile("elsewhere rebuilt")
print(json.dumps([profile.observations, profile.model, profile.fit_note]))
"""


def test_another_machine_without_local_files_arrives_at_the_same_bytes(make_run, tmp_path, prefect_server):
    for number in range(12):
        publish("elsewhere rebuilt", [make_run("elsewhere rebuilt", number, workers=number % 4 + 1)])
        if number % 5 == 0:
            fold_in("elsewhere rebuilt")
    grown = fold_in("elsewhere rebuilt")
    assert grown.model
    environment = {
        **os.environ,
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path),
        "PYTHONHASHSEED": "7",
    }
    done = subprocess.run([sys.executable, "-c", REBUILD], env=environment, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [grown.observations, grown.model, ""]


def test_runs_older_than_the_window_are_not_read_again(make_run, fit_sums, monkeypatch):
    monkeypatch.setattr(profile_module, "WINDOW", timedelta(0))
    publish("window", [make_run("window", 1)])
    profile = fold_in("window", fit=fit_sums)
    publish("window", [make_run("window", 2)])
    assert len(list(read_runs("window", since=profile.since))) == 2  # the newest covered one, and the new one
    publish("window", [make_run("window", 3)])
    assert len(fold_in("window", fit=fit_sums).ledger().runs) == 3


def test_threads_that_fold_at_once_lose_nothing(make_run, fit_sums):
    def publish_and_fold(number: int) -> int:
        publish("threads", [make_run("threads", number)])
        return fold_in("threads", fit=fit_sums).revision

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish_and_fold, range(8)))
    profile = SLOProfile.of_flow("threads")
    assert sorted(profile.ledger().runs) == [f"threads-{n}" for n in range(8)]
    assert profile.content_digest == rebuild_profile("threads", fit=fit_sums).content_digest


PROCESS = """
import sys
from pathlib import Path
from uuid import uuid4
from prefect_slo.blocks import fold_in
from prefect_slo.observation import StageRun
from prefect_slo.telemetry import RunLog, StageKey
from prefect_slo.telemetry.store import publish_log

flow_name = sys.argv[3]
log = RunLog(flow_name, uuid4(), sys.argv[1])
log.workflow({"name": flow_name, "stages": [{"name": "train"}]})
row = StageRun(log.run_id, "train", 2, 1024, 1.0, 1.0 + int(sys.argv[2]) / 10, items=4)
log.stage_run(row, StageKey("train", flow_name))
log.end("completed", latency_s=2.0)
assert publish_log(log)
fold_in(flow_name, fit=lambda workflow, rows, latency_s: {"rows": len(rows), "total": float(rows["wall_s"].sum())})
print(log.run_id)
"""


@pytest.mark.parametrize("number", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_at_once_lose_no_observation_and_agree_on_one_profile(tmp_path, prefect_server, number):
    script, flow_name = tmp_path / "run.py", f"{number} processes"
    script.write_text(PROCESS)
    environment = {**os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_LOGGING_LEVEL": "WARNING"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "logs"), str(n), flow_name],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for n in range(number)
    ]
    ids = [process.communicate(timeout=200)[0].decode().strip() for process in started]
    assert [process.returncode for process in started] == [0] * number
    profile = SLOProfile.of_flow(flow_name)
    assert sorted(profile.ledger().runs) == sorted(ids)
    assert profile.model_document() == {"rows": number, "total": pytest.approx(sum(1 + n / 10 for n in range(number)))}
    assert list(Path(tmp_path / "logs").iterdir()) == []


def test_a_task_that_another_flow_has_profiled_needs_no_profiling(make_run, fit_sums):
    publish("lender", [make_run("lender", n, ("load", "train"), workers=n, version="shared") for n in range(1, 7)])
    fold_in("lender", fit=fit_sums)
    publish("borrower", [make_run("borrower", 1, ("fetch", "train"), workers=3, version="shared")])
    profile = fold_in("borrower", fit=fit_sums)
    known = profile.coverage()
    assert (known["train"].rows, known["train"].settings, known["train"].borrowed) == (7, 6, 6)
    assert (known["fetch"].rows, known["fetch"].borrowed) == (1, 0)
    assert list(profile.training().run_latency_s) == ["borrower-1"]
    assert profile.workflow().order == ("fetch", "train")
    assert rebuild_profile("borrower", fit=fit_sums).content_digest == profile.content_digest
    assert fold_in("lender", fit=fit_sums).coverage()["train"].borrowed == 0


def test_a_stage_added_to_a_profiled_flow_is_the_only_one_to_profile(make_run, fit_sums):
    publish("grown", [make_run("grown", n, ("load", "train"), workers=n) for n in range(1, 7)])
    fold_in("grown", fit=fit_sums)
    publish("grown", [make_run("grown", 9, ("load", "clean", "train"))])
    known = fold_in("grown", fit=fit_sums).coverage()
    assert {stage: known[stage].settings for stage in known} == {"load": 6, "clean": 1, "train": 6}


def test_code_that_comes_back_gets_its_rows_back(make_run, fit_sums):
    for number, version in enumerate(["a1", "a2", "a3", "a1"]):
        publish("versions", [make_run("versions", number, version=version)])
        profile = fold_in("versions", fit=fit_sums)
    assert profile.coverage()["train"].rows == 2
    assert rebuild_profile("versions", fit=fit_sums).content_digest == profile.content_digest


def test_a_model_that_cannot_be_fitted_is_noted_and_the_rows_are_kept(make_run, caplog):
    publish("unfit", [make_run("unfit", 1)])

    def too_few(workflow, rows, latency_s):
        raise NotEnoughObservations("train", 1, 4, "Run the flow again.")

    def broken(workflow, rows, latency_s):
        raise ZeroDivisionError("no luck")

    profile = fold_in("unfit", fit=too_few)
    assert "1 usable observations of 4" in profile.fit_note
    assert len(profile.training().stage_runs) == 2
    assert fold_in("unfit", fit=broken, refit=True).fit_note == "ZeroDivisionError: no luck"
    assert any("could not be fitted" in message for message in caplog.messages)


def test_the_models_of_the_package_are_fitted_by_default(make_run):
    publish("default fit", [make_run("default fit", n, workers=n % 4 + 1) for n in range(8)])
    profile = fold_in("default fit")
    assert profile.fit_note == ""
    assert set(profile.model_document()["stages"]) == {"load", "train"}
    assert rebuild_profile("default fit").model == profile.model


def test_plans_put_in_force_can_be_rolled_back(make_run):
    first, second = (Plan("planned", None, {"train": StagePlan(workers=n)}) for n in (1, 2))
    put_in_force("planned", first, "first plan")
    profile = put_in_force("planned", second, "cheaper by 20 %")
    assert profile.plan_in_force() == second
    assert [entry["reason"] for entry in profile.plan_history] == ["first plan", "cheaper by 20 %"]
    assert plan_from_history(profile.plan_history[0]) == first
    profile = put_in_force("planned", None, "observe only")
    assert profile.plan_in_force() is None
    assert plan_from_history(profile.plan_history[-1]) is None
    with pytest.raises(InvalidPlan, match="still exists"):
        plan_from_history({"artifact": "00000000-0000-0000-0000-000000000000"})


def test_updates_at_once_all_arrive():
    def add(number: int) -> None:
        update_profile("updated", lambda p: p.model_copy(update={"stages": sorted([*p.stages, f"s{number}"])}))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(6)))
    assert SLOProfile.of_flow("updated").stages == [f"s{n}" for n in range(6)]


async def test_folding_works_inside_a_running_event_loop(make_run, fit_sums):
    publish("looped", [make_run("looped", 1)])
    assert fold_in("looped", fit=fit_sums).revision == 1
    assert SLOProfile.of_flow("looped").revision == 1


def test_rows_of_a_task_are_found_in_any_number_of_other_profiles(make_run, fit_sums, monkeypatch):
    monkeypatch.setattr(elsewhere, "PAGE", 2)
    lenders = [f"lender {number}" for number in range(5)]
    for lender in lenders:
        publish(lender, [make_run(lender, 1, ("fetch",), version="lent")])
        fold_in(lender, fit=fit_sums)
    with get_client(sync_client=True) as client:
        found = elsewhere.known_elsewhere("borrower", {("fetch", "lent")}, client)
    assert {record.source for record in found} == {f"flow:{lender}" for lender in lenders}
