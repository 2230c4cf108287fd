"""``profile``, ``import-history``, ``refit`` and ``report`` on a real server."""

from __future__ import annotations

import inspect
import json
import socket
import time
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.exceptions import PrefectHTTPStatusError
from prefect.server.api import server
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_slo.blocks import SLOProfile
from prefect_slo.cli.api_trouble import UNSTARTED, api_trouble
from prefect_slo.cli.commands.running import _words
from prefect_slo.loop import knowledge, reporting
from prefect_slo.resources import Option, Size

SOURCE = """
import time
from prefect import flow, task
from prefect_slo import slo

@task
def work_KEY(shard: int) -> int:
    begun = time.thread_time()
    while time.thread_time() - begun < 0.02:
        pass
    return shard

@flow(name="stock-KEY")
def stock(n: int = 3, fail: bool = False) -> int:
    if fail:
        raise RuntimeError("asked to fail")
    return sum(work_KEY.map(range(n)).result())

letters = slo(latency="20s", menu={"workers": (1, 2), "vcpus": 1})(stock.with_options(name="letters-KEY"))
hurried = slo(latency="1ms", menu={"workers": (1, 2), "vcpus": 1})(stock.with_options(name="letters-KEY"))
number = 7
"""


@pytest.fixture(scope="module")
def key() -> str:
    return uuid4().hex[:8]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory, key: str) -> Path:
    path = tmp_path_factory.mktemp("flows") / f"letters_{key}.py"
    path.write_text(SOURCE.replace("KEY", key))
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Path:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    monkeypatch.setattr(knowledge, "_REMEMBERED", knowledge._Remembered())
    return tmp_path


def test_a_flow_is_profiled_with_live_progress_and_then_reported(run, module: Path, key: str) -> None:
    twice = ("--most-repeats", "2")  # on a busy machine runs differ by so much that a sweep would go on
    answer = run("profile", f"{module}:letters", "--param", "n=4", *twice, "--json")
    assert answer.code == 0, answer.err
    document = answer.document
    assert document["identified"] is True
    assert document["stopped"] == "every setting was measured"
    assert document["flow"] == f"letters-{key}"
    assert document["plan"]["stages"]
    assert f"profile: {len(document['runs'])} of {len(document['runs'])}" in answer.err

    again = run("profile", f"{module}:letters", "--param", "n=4", *twice)
    assert again.code == 0
    assert "in 1 runs (0 failed)" in again.out
    assert "every setting had been measured before" in again.out

    told = run("report", f"letters-{key}")
    assert "p95 latency <= 20 s" in told.out
    assert f"work_{key}" in told.out
    known = run("report", f"letters-{key}", "--json").document
    assert known["can_be_planned"] is True
    stage = known["stages"][0]
    assert stage["predicted_mean_s"] > 0
    assert stage["actual_median_s"] == pytest.approx(stage["predicted_mean_s"], rel=1.0)
    assert stage["actual_runs"] >= 2
    assert known["attainment"] == {"met": 0, "runs": 0, "interval_95": [0.0, 1.0]}
    assert SLOProfile.of_flow(f"letters-{key}").training().stage_runs["items"].tolist() == [4] * stage["rows"]


def test_modules_are_found_in_the_working_directory(
    run, module: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(module.parent)
    answer = run("profile", f"{module.stem}:letters", "--max-seconds", "0.001", "--json")
    assert answer.document["flow"] == f"letters-{key}"


def test_inputs_come_from_a_file_and_are_taken_in_turn(run, module: Path, place: Path) -> None:
    (place / "inputs.json").write_text(json.dumps([{"n": 2}, {"n": 3, "fail": True}]))
    arguments = ["profile", f"{module}:letters", "--params", place / "inputs.json", "--repeats", "5", "--json"]
    document = run(*arguments).document
    runs = document["runs"]
    assert len(runs) > 2, document["stopped"]
    assert [bool(r["error"]) for r in runs] == [i % 2 == 1 for i in range(len(runs))]
    assert "asked to fail" in runs[1]["error"]


def test_what_cannot_be_planned_afterwards_ends_with_1(run, module: Path) -> None:
    answer = run("profile", f"{module}:letters", "--param", "fail=true", "--json")
    assert (answer.code, answer.document["stopped"]) == (1, "the first run failed")


def test_a_bound_that_nothing_keeps_is_told_by_the_report(run, module: Path, key: str) -> None:
    assert run("profile", f"{module}:hurried").code == 0
    told = run("report", f"letters-{key}").out
    assert "infeasible: p95 latency <= 0.001 s cannot be met" in told
    assert "(not certified)" in told


def test_models_are_fitted_again_and_rebuilt(run, key: str) -> None:
    before = SLOProfile.of_flow(f"letters-{key}")
    (entry,) = run("refit", f"letters-{key}", "--json").document
    assert entry["revision"] > before.revision
    (rebuilt,) = run("refit", f"letters-{key}", "--rebuild", "--json").document
    assert [s["rows"] for s in rebuilt["stages"]] == [s["rows"] for s in entry["stages"]]
    assert SLOProfile.of_flow(f"letters-{key}").model_document() is not None
    assert f"letters-{key}" in run("refit", f"letters-{key}").out


def recorded(flow_name: str, task_runs: int) -> None:
    """Wait until the server has written down that many completed task runs of a flow."""
    wanted = FlowFilter(name=FlowFilterName(any_=[flow_name]))
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while sum(run.state_name == "Completed" for run in client.read_task_runs(flow_filter=wanted)) < task_runs:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_history_of_an_undecorated_flow_is_learned_from_once(run) -> None:
    @task
    def part(x: int) -> int:
        return x

    @flow(name="undecorated")
    def undecorated() -> int:
        return sum(part.map(range(3)).result())

    for _ in range(3):
        undecorated()
    recorded("undecorated", 9)
    first = run("import-history", "undecorated", "--json").document
    assert (first["runs"], first["new"]) == (3, 3)
    assert [(s["stage"], s["rows"]) for s in first["stages"]] == [("part", 3)]
    again = run("import-history", "undecorated", "--limit", "2", "--json").document
    assert (again["runs"], again["new"]) == (2, 0)
    assert "Read 3 runs of undecorated" in run("import-history", "undecorated").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["profile", "nowhere"], "flow is 'nowhere'"),
        (["profile", "no_such_module_at_all:flow"], "No module named"),
        (["profile", "no_such_file.py:flow"], "no_such_file.py"),
        (["profile", "{module}:nothing"], "nothing"),
        (["profile", "{module}:number"], "number"),
        (["profile", "{module}:stock"], "decorated with @slo"),
        (["profile", "{module}:letters", "--param", "n"], "name=value"),
        (["profile", "{module}:letters", "--params", "no-such.json"], "no-such.json"),
        (["profile", "{module}:letters", "--max-seconds", "0"], "caps is"),
        (["profile", "{module}:letters", "--repeats", "0"], "caps is"),
        (["import-history", "never-ran"], "never-ran"),
        (["import-history", "never-ran", "--limit", "0"], "limit is 0"),
        (["report", "never-ran"], "never-ran"),
        (["refit", "never-ran"], "never-ran"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(run, module: Path, arguments: list[str], words: str) -> None:
    answer = run(*(argument.format(module=module) for argument in arguments))
    assert answer.code == 1
    assert answer.out == ""
    told = [line for line in answer.err.splitlines() if line.startswith("prefect-slo: ")]
    assert len(told) == 1, answer.err
    assert words in told[0]
    assert "defect" not in told[0]


@pytest.mark.parametrize("arguments", [["report", "letters"], ["approve", "letters"], ["pin", "a/b"], ["register"]])
def test_an_api_that_is_away_is_no_defect_and_is_told_with_what_to_do(run, arguments: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    with temporary_settings({PREFECT_API_URL: nobody, PREFECT_CLIENT_MAX_RETRIES: 0}):
        answer = run(*arguments)
    assert answer.code == 1
    [told] = answer.err.splitlines()
    assert nobody in told
    assert "prefect server start" in told
    assert "defect" not in told


def test_an_answer_of_the_api_is_told_with_what_to_do() -> None:
    request = httpx.Request("GET", "http://api/health")
    for status, then in ((401, "PREFECT_API_KEY"), (429, "Wait"), (500, "server's log")):
        refused = httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))
        assert f"answers {status}" in api_trouble(refused)
        assert then in api_trouble(refused)
    assert api_trouble(ZeroDivisionError()) == ""


def test_a_temporary_server_that_does_not_start_is_no_defect() -> None:
    assert UNSTARTED in inspect.getsource(server), "what Prefect raises says so"
    told = api_trouble(RuntimeError(f"Timed out while attempting to connect to {UNSTARTED}."))
    assert "has not started in time" in told
    assert "PREFECT_API_URL" in told
    assert api_trouble(RuntimeError("something else")) == ""


def test_a_request_that_the_api_finds_wrong_is_a_defect_and_is_told_with_what_is_wrong(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = httpx.Request("POST", "http://api/flows/filter")
    answer = httpx.Response(422, json={"exception_detail": "limit: not above 200"}, request=request)
    refused = PrefectHTTPStatusError.from_httpx_error(
        httpx.HTTPStatusError("Client error '422'", request=request, response=answer)
    )

    def refusing(*_: object) -> None:
        raise refused

    monkeypatch.setattr(reporting, "report", refusing)
    told = run("report", "letters").err
    assert "limit: not above 200" in told
    assert "a defect" in told
    assert "server's log" not in told
    monkeypatch.setenv("PREFECT_SLO_TRACEBACK", "1")
    with pytest.raises(PrefectHTTPStatusError):
        run("report", "letters")
    refused = httpx.ConnectError("nobody listens")
    with pytest.raises(httpx.ConnectError):
        run("report", "letters")


@pytest.mark.parametrize("command", ["approve", "rollback"])
def test_a_plan_of_a_flow_that_nobody_knows_is_told_apart_from_none_that_waits(run, command: str) -> None:
    answer = run(command, "never-ran")
    assert answer.code == 1
    assert "nothing is known of it. Check the flow's name" in answer.err


def test_a_setting_says_where_it_was_measured_unless_that_is_here() -> None:
    assert _words(Option(4, Size(1, 1769, hardware="lambda"), "lambda")) == "4 x 1 vCPU / 1769 MB on lambda"
    assert _words(Option(4, Size(1, 1769), "process")) == "4 x 1 vCPU / 1769 MB"
