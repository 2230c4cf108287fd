from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_slo.observation import Invocation, StageRun
from prefect_slo.settings import SLOSettings
from prefect_slo.telemetry import RunLog, StageKey
from prefect_slo.telemetry import store as store_module
from prefect_slo.telemetry.store import (
    artifact_key,
    observed_flows,
    publish,
    publish_log,
    read_runs,
    slug,
    sweep_orphans,
)

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def ended_log(tmp_path):
    """A log of a completed run, for a flow and a directory of this test's own."""

    def make(flow: str, run_id: str | None = None, attempt: int = 1) -> RunLog:
        log = RunLog(flow, run_id or str(uuid4()), tmp_path, attempt=attempt)
        log.invocation(Invocation("train", 0, 4, 1.0, compute_s=0.5))
        log.stage_run(StageRun(log.run_id, "train", 1, 1024, 1.0, 0.6, items=4), StageKey("train", "v1"))
        log.end("completed", latency_s=0.75)
        return log

    return make


def runs_of(flow):
    return [record for stored in read_runs(flow) for record in stored.records]


def test_a_published_log_is_one_artifact_and_its_file_is_gone(ended_log, tmp_path):
    log = ended_log("publish one")
    expected = log.record()
    assert publish_log(log)
    assert list(tmp_path.iterdir()) == []
    (record,) = runs_of("publish one")
    assert (record.run_id, record.status, record.latency_s) == (expected.run_id, "completed", 0.75)
    assert record.invocations == expected.invocations
    assert record.stages[0].key == StageKey("train", "v1")


def test_runs_come_newest_first_over_all_pages(make_run, monkeypatch):
    monkeypatch.setattr(store_module, "PAGE", 3)
    for number in range(7):
        publish("pages", [make_run(number, flow="pages")])
    assert [record.run_id for record in runs_of("pages")] == [f"run-{n:04d}" for n in reversed(range(7))]
    third = list(read_runs("pages"))[2].created
    assert len(list(read_runs("pages", since=third))) == 3


def test_an_unreachable_api_keeps_the_log_for_a_later_sweep(quick_retries, ended_log, tmp_path, caplog):
    log = ended_log("kept-while-offline")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert not publish_log(log)
        assert sweep_orphans(tmp_path).kept == 1
    assert sum("is kept in" in message for message in caplog.messages) == 2
    assert sweep_orphans(tmp_path).published == (log.run_id,)
    assert [record.run_id for record in runs_of("kept-while-offline")] == [log.run_id]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_leaves_runs_under_way_alone(tmp_path):
    log = RunLog("under way", str(uuid4()), tmp_path)
    assert sweep_orphans(tmp_path).busy == 1
    log.close()
    assert sweep_orphans(tmp_path).published == (log.run_id,)
    assert runs_of("under way")[0].status == "crashed"


def test_a_run_that_was_published_already_is_not_published_again(ended_log, tmp_path):
    run_id = str(uuid4())
    first, second = ended_log("twice", run_id), ended_log("twice", run_id, attempt=2)
    publish("twice", [first.record()])  # as if the answer had been lost
    first.close()
    second.close()
    assert sorted(sweep_orphans(tmp_path).published) == [run_id, f"{run_id}#2"]
    assert sorted(record.run_id for record in runs_of("twice")) == [run_id, f"{run_id}#2"]


def test_orphans_of_a_killed_process_are_published_as_crashed(tmp_path):
    script = (
        "import os, sys; from prefect_slo.telemetry import RunLog\n"
        "log = RunLog('killed', sys.argv[2], sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    run_id = str(uuid4())
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path), run_id], check=False).returncode == -9
    assert sweep_orphans(tmp_path).published == (run_id,)
    assert [(record.run_id, record.status) for record in runs_of("killed")] == [(run_id, "crashed")]


def test_what_is_left_behind_under_one_api_is_published_to_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    with temporary_settings({PREFECT_API_URL: "https://production.example/api"}):
        log = RunLog("left in production", str(uuid4()), SLOSettings().telemetry_directory)
    log.close()
    assert sweep_orphans(SLOSettings().telemetry_directory).published == ()
    assert runs_of("left in production") == []
    assert log.path.exists(), "it waits for its own"


def test_an_empty_log_is_removed(tmp_path):
    (tmp_path / "x.slolog").write_bytes(b"")
    assert sweep_orphans(tmp_path).published == ()
    assert os.listdir(tmp_path) == []


def test_artifacts_of_another_make_are_left_out(make_run, caplog):
    with get_client(sync_client=True) as client:
        for data in ({"runs": [{"schema": 99}]}, {"other": 1}, "text"):
            client.create_artifact(ArtifactCreate(key=artifact_key("odd"), type="slo-telemetry", data=data))
    publish("odd", [make_run(1, flow="odd")])
    assert [record.run_id for record in runs_of("odd")] == ["run-0001"]
    assert any("newer version" in message for message in caplog.messages)


def test_many_invocations_are_thinned_evenly_and_stage_runs_never(make_run, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_INVOCATIONS", 10)
    invocations = tuple(Invocation("train", 0, n + 1, float(n)) for n in range(100))
    publish("thinned", [replace(make_run(1, flow="thinned"), invocations=invocations)])
    (record,) = runs_of("thinned")
    assert [invocation.items for invocation in record.invocations] == list(range(1, 100, 10))
    assert (record.facts["invocations_seen"], len(record.stages)) == (100, 2)


def test_flows_with_runs_are_listed_by_their_own_names(make_run):
    for name in ("My Flow", "my-flow", "my_flow"):
        publish(name, [make_run(1, flow=name)])
    assert {"My Flow", "my-flow", "my_flow"} <= set(observed_flows())
    assert len({slug(name) for name in ("My Flow", "my-flow", "my_flow", "my flow")}) == 4
    assert slug("my-flow") == "my-flow"


async def test_publishing_works_inside_a_running_event_loop(ended_log):
    assert publish_log(ended_log("in a loop"))
    assert len(runs_of("in a loop")) == 1
