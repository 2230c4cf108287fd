"""The test bed: functions run as Lambda runs them, and nothing gets out."""

from __future__ import annotations

import base64
import io
import json
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from prefect_slo.aws.report import Report
from prefect_slo.errors import InvalidValue
from prefect_slo.testing.aws import Fault, Faults, LocalAws, lambdas, local_aws, shares
from prefect_slo.testing.aws.disk import package_folder
from prefect_slo.testing.aws.lambdas import Throttled

CODE = """
import json, os, sys, time
calls = 0
def handler(event, context):
    global calls
    calls += 1
    what = event.get("do")
    if what == "sleep": time.sleep(event["s"])
    if what == "spin":
        until = time.process_time() + event["s"]
        while time.process_time() < until: pass
    if what == "exit": os._exit(3)
    if what == "eat":
        data = b"1" * (event["mb"] << 20); time.sleep(0.5)
    if what == "start":
        import subprocess
        subprocess.run([sys.executable, "-S", "-c", event["code"]], check=True)
    if what == "raise": raise ValueError("no")
    if what == "big": return "x" * event["n"]
    if what == "import": __import__(event["what"])
    print("said", event)
    left = context.get_remaining_time_in_millis()
    return {"calls": calls, "pid": os.getpid(), "mb": context.memory_limit_in_mb, "left": left}
"""


@pytest.fixture(scope="module")
def account() -> Iterator[LocalAws]:
    with local_aws() as account:
        yield account


@pytest.fixture
def call(account: LocalAws):
    """Calls a function made for the test; its reply, error and report."""
    client = boto3.client("lambda", config=_once())
    account.lambdas.invocations.clear()
    account.lambdas.reap()
    made: list[str] = []

    def function(name: str = "f", memory: int = 256, timeout: int = 5, code: str = CODE) -> str:
        package = io.BytesIO()
        with zipfile.ZipFile(package, "w") as archive:
            archive.writestr("main.py", code)
        client.create_function(
            FunctionName=name, Runtime="python3.11", Role=account.role, Handler="main.handler", MemorySize=memory,
            Timeout=timeout, Code={"ZipFile": package.getvalue()},
        )  # fmt: skip
        made.append(name)
        return name

    def invoke(name: str, **event: Any) -> tuple[Any, str, Report | None]:
        response = client.invoke(FunctionName=name, Payload=json.dumps(event), LogType="Tail")
        log = base64.b64decode(response["LogResult"]).decode()
        return json.loads(response["Payload"].read()), response.get("FunctionError", ""), Report.of(log)

    invoke.function = function  # type: ignore[attr-defined]
    yield invoke
    for name in made:
        client.delete_function(FunctionName=name)


def test_a_sandbox_is_cold_once_and_keeps_what_it_has(call) -> None:
    name = call.function()
    (first, _, cold), (second, _, warm) = call(name), call(name)
    assert (first["calls"], second["calls"]) == (1, 2)
    assert first["pid"] == second["pid"]
    assert first["mb"] == "256" or first["mb"] == 256
    assert 0 < first["left"] <= 5000
    assert cold.init_ms > 0
    assert warm.init_ms == 0
    assert abs(cold.billed_ms - cold.duration_ms - cold.init_ms) <= 1


def test_concurrent_calls_have_sandboxes_of_their_own(call, account) -> None:
    name = call.function()
    with ThreadPoolExecutor(3) as pool:
        pids = {reply["pid"] for reply, _, _ in pool.map(lambda _: call(name, do="sleep", s=0.5), range(3))}
    assert len(pids) == 3


@pytest.mark.parametrize(
    ("event", "kind", "words"),
    [
        ({"do": "raise"}, "ValueError", "no"),
        ({"do": "exit"}, "Runtime.ExitError", "exit status 3"),
        ({"do": "eat", "mb": 400}, "Runtime.OutOfMemory", "signal: killed"),
        (
            {"do": "start", "code": "x = b'1' * (400 << 20); import time; time.sleep(5)"},
            "Runtime.OutOfMemory",
            "killed",
        ),
        ({"do": "sleep", "s": 30}, "Sandbox.Timedout", "timed out after 1.00 seconds"),
        ({"do": "big", "n": 7_000_000}, "Function.ResponseSizeTooLarge", "maximum"),
        ({"do": "import", "what": "prefect"}, "ModuleNotFoundError", "prefect"),
    ],
)
def test_functions_end_as_lambda_ends_them(call, event, kind, words) -> None:
    name = call.function(timeout=1 if event["do"] == "sleep" else 20)
    reply, error, report = call(name, **event)
    assert (reply["errorType"], error) == (kind, "Unhandled")
    assert words in reply["errorMessage"]
    assert report is not None
    after, error, _ = call(name)
    assert not error, "the next one is served, by another sandbox if need be"
    assert after["calls"] == (
        2 if kind in ("ValueError", "ModuleNotFoundError", "Function.ResponseSizeTooLarge") else 1
    )


def program(folder: Path, name: str, code: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(code)
    (folder / name).chmod(0o755)


def test_layers_bring_programs_and_packages(call, account, tmp_path) -> None:
    """What lies in ``bin`` can be called, what lies in ``python`` be imported; a later layer is laid over earlier."""
    program(tmp_path / "one/bin", "shout", "#!/bin/sh\necho $1 | tr a-z A-Z\n")
    program(tmp_path / "one/python", "brought.py", "word = 'first'\n")
    program(tmp_path / "two/python", "brought.py", "word = 'second'\n")
    arns = [account.layer(name, tmp_path / name) for name in ("one", "two")]
    code = """
import brought, os, subprocess
def handler(event, context):
    said = subprocess.run(["shout", "hello"], capture_output=True, text=True, check=True).stdout.strip()
    return {"said": said, "word": brought.word, "from": brought.__file__, "opt": os.path.exists("/opt/bin/shout")}
"""
    name = call.function("layered", code=code)
    boto3.client("lambda").update_function_configuration(FunctionName=name, Layers=arns)
    reply, error, _ = call(name)
    assert not error, reply
    assert (reply["said"], reply["word"]) == ("HELLO", "second")
    assert reply["opt"] == reply["from"].startswith("/opt/"), "where the system lets it, at /opt itself"
    assert not Path("/opt/bin/shout").exists(), "and nobody else sees it"


def test_images_are_refused_unless_a_folder_stands_for_them(account, tmp_path) -> None:
    client = boto3.client("lambda", config=_once())
    program(tmp_path / "image", "own.py", "def run(event, context): return {'from': __file__}\n")
    account.lambdas._kept.images["here/worker:1"] = tmp_path / "image"
    for name, uri in (("known", "here/worker:1"), ("unknown", "here/worker:2")):
        client.create_function(
            FunctionName=name, Role=account.role, PackageType="Image", Code={"ImageUri": uri},
            ImageConfig={"Command": ["own.run"]}, MemorySize=256,
        )  # fmt: skip
    reply = json.loads(client.invoke(FunctionName="known", Payload=b"{}")["Payload"].read())
    assert reply == {"from": str(tmp_path / "image/own.py")}
    with pytest.raises(ClientError, match="no image is run here"):
        client.invoke(FunctionName="unknown", Payload=b"{}")
    for name in ("known", "unknown"):
        client.delete_function(FunctionName=name)


def test_a_handler_that_cannot_be_imported_says_so(call) -> None:
    reply, error, _ = call(call.function(code="import not_deployed\ndef handler(e, c): pass"))
    assert (reply["errorType"], error) == ("Runtime.ImportModuleError", "Unhandled")


def test_there_is_room_for_so_many_and_no_more(call, account) -> None:
    name = call.function()
    boto3.client("lambda").put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=1)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(call, name, do="sleep", s=1.0) for _ in range(4)]
    errors = [future.exception() for future in futures if future.exception()]
    assert len(errors) == 3
    assert isinstance(errors[0], ClientError)
    assert errors[0].response["Error"]["Code"] == "TooManyRequestsException"
    assert errors[0].response["ResponseMetadata"]["HTTPStatusCode"] == 429
    assert account.lambdas.throttled["ReservedFunctionConcurrentInvocationLimitExceeded"] == 3


def test_cpu_time_takes_as_long_as_its_share_makes_it(call, account, monkeypatch) -> None:
    """884 MB have half a vCPU: what takes 0.2 s of a whole one is reported as about 0.4 s."""
    monkeypatch.setattr(account.lambdas, "cpu", "modelled")
    waited: list[float] = []
    monkeypatch.setattr(account.lambdas, "_sleep", waited.append)
    name = call.function(memory=884)
    call(name)
    waited.clear()
    began = time.process_time()
    call(name, do="spin", s=0.2)
    assert sum(waited) == pytest.approx(0.2, rel=0.25)
    assert time.process_time() - began < 5


def test_memory_and_time_of_what_a_handler_starts_count_too(call, account, monkeypatch) -> None:
    monkeypatch.setattr(account.lambdas, "cpu", "modelled")
    waited: list[float] = []
    monkeypatch.setattr(account.lambdas, "_sleep", waited.append)
    name = call.function(memory=884)
    call(name)
    waited.clear()
    code = "import time\nx = b'1' * (200 << 20)\nwhile time.process_time() < 0.4: pass"
    _, error, report = call(name, do="start", code=code)
    assert not error
    assert report.used_mb > 200
    assert 0.35 < sum(waited) < 2, "half a vCPU takes as long again"


def test_memory_that_processes_share_counts_once(call) -> None:
    """A process of 60 MB and two that it was forked into, which hold the same pages: no 128 MB."""
    code = """
import os, time
def handler(event, context):
    data = b"x" * (40 << 20)
    started = []
    for _ in range(2):
        pid = os.fork()
        if not pid:
            time.sleep(0.1)
            os._exit(0)
        started.append(pid)
    for pid in started:
        os.waitpid(pid, 0)
    return len(data)
"""
    reply, error, report = call(call.function("forks", memory=128, code=code))
    assert (reply, error) == (40 << 20, "")
    assert 40 < report.used_mb <= 128


@pytest.mark.parametrize("kept", ["quota", "duty"])
def test_a_sandbox_really_has_its_share(call, account, monkeypatch, kept: str) -> None:
    """442 MB have a quarter of a vCPU: 0.2 s of CPU time take 0.8 s, and the start is not held back."""
    if kept == "quota" and shares._place() is None:
        pytest.skip("no control group can be made here")
    limits: list[Any] = []

    def limit(vcpus: float) -> Any:
        limits.append(shares.Duty(vcpus) if kept == "duty" else shares.cpu_limit(vcpus))
        return limits[-1]

    monkeypatch.setattr(lambdas, "cpu_limit", limit)
    monkeypatch.setattr(account.lambdas, "cpu", "shares")
    name = call.function(memory=442)
    call(name)
    _, error, report = call(name, do="spin", s=0.2)
    assert not error
    assert report.duration_ms > 0.8 * 800
    [only] = limits
    account.lambdas.reap()
    assert kept == "duty" or not only._path.exists()
    assert kept == "quota" or only._ended.is_set()


def test_a_sandbox_that_was_killed_while_idle_is_not_used_again(call, account) -> None:
    name = call.function()
    first, _, _ = call(name)
    assert account.lambdas.kill(name) == 1
    second, error, report = call(name)
    assert not error
    assert second["pid"] != first["pid"]
    assert report.init_ms > 0


def test_what_is_killed_twice_is_ended_once_and_lets_its_runtime_go(call, account) -> None:
    name = call.function()
    call(name)
    [sandbox] = account.lambdas._every
    sandbox.kill()
    sandbox.kill()
    assert not sandbox.alive
    assert sandbox.next_event() is None, "nobody waits for an event for ever"
    account.lambdas.reap()


def test_a_bed_that_is_closed_starts_nothing_more() -> None:
    with local_aws() as account:
        name = account.pool(memory_mb=(128,), bucket=None).functions.name(128)
        boto3.client("lambda").invoke(FunctionName=name, Payload=b'{"warm": true}')
        spec = next(iter(account.lambdas._idle))
    with pytest.raises(Throttled):
        account.lambdas.run(spec, b"{}")
    assert account.lambdas.sandboxes == 0


def test_a_request_that_is_too_large_is_refused(call) -> None:
    with pytest.raises(ClientError, match="RequestEntityTooLarge"):
        call(call.function(), do="x" * 6_300_000)


def test_an_event_is_accepted_and_tried_three_times(call, account) -> None:
    name = call.function()
    response = boto3.client("lambda").invoke(FunctionName=name, InvocationType="Event", Payload=b'{"do": "raise"}')
    assert response["StatusCode"] == 202
    wait_for(account.lambdas.invocations, 3)
    assert [one.error for one in account.lambdas.invocations] == ["ValueError"] * 3


def wait_for(invocations: list[Any], number: int) -> None:
    deadline = time.monotonic() + 60
    while len(invocations) < number and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(invocations) == number


def test_an_event_is_tried_as_often_as_its_function_says_and_waits_where_there_is_no_room(call, account) -> None:
    """Throttling is no try: an event that is throttled three times, and then fails, is still tried again."""
    name, client = call.function("patient"), boto3.client("lambda")
    client.put_function_event_invoke_config(FunctionName=name, MaximumRetryAttempts=1, DestinationConfig={})
    account.lambdas.throttled.clear()
    account.lambdas.concurrency = 0
    try:
        client.invoke(FunctionName=name, InvocationType="Event", Payload=b'{"do": "raise"}')
        while sum(account.lambdas.throttled.values()) < 3:
            time.sleep(0.01)
        assert not account.lambdas.invocations
    finally:
        account.lambdas.concurrency = 1000
    wait_for(account.lambdas.invocations, 2)
    with pytest.raises(ClientError, match="1048576"):
        client.invoke(FunctionName=name, InvocationType="Event", Payload=json.dumps({"do": "x" * 1_100_000}).encode())


def test_faults_strike_before_or_after_the_work(call, account) -> None:
    name = call.function()
    with Faults(Fault("lambda.Invoke", "error", times=1), Fault("lambda.Invoke", "error", "after", times=1)):
        for expected in (0, 1):
            with pytest.raises(ClientError, match=r"ServiceException"):
                boto3.client("lambda", config=_once()).invoke(FunctionName=name, Payload=b"{}")
            assert len(account.lambdas.invocations) == expected
    assert not call(name)[1]


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (("lambda.Invoke", "throtle"), "kind"),
        (("Lambda.invoke", "throttle"), "operation"),
        (("Invoke", "throttle"), "operation"),
        (("lambda.Invoke", "throttle", "afterwards"), "when"),
        (("lambda.Invoke", "throttle", "before", 30), "probability"),
    ],
)
def test_a_fault_that_would_never_strike_is_refused(rule, field) -> None:
    with pytest.raises(InvalidValue, match=f"fault.{field}"):
        Fault(*rule)


def test_the_same_seed_strikes_the_same_calls(account) -> None:
    def struck(seed: int) -> list[bool]:
        hits, client = [], boto3.client("s3", config=_once())
        with Faults(Fault("s3.ListBuckets", "slow-down", probability=0.5), seed=seed) as faults:
            for _ in range(20):
                before = sum(faults.struck.values())
                with suppress(ClientError):
                    client.list_buckets()
                hits.append(sum(faults.struck.values()) > before)
        return hits

    assert struck(1) == struck(1)
    assert struck(1) != struck(2)


def _once() -> Any:
    from botocore.config import Config

    return Config(retries={"total_max_attempts": 1, "mode": "standard"})


def test_sandboxes_that_start_at_once_share_one_folder_of_packages(tmp_path) -> None:
    names = ("boto3", "botocore", "numpy", "scipy", "cloudpickle", "no_such_package")
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(50):
            folder = tmp_path / str(attempt)
            starts = Barrier(8)

            def link(folder=folder, starts=starts) -> set[str]:
                starts.wait()
                return {path.name for path in Path(package_folder(folder, names)).iterdir()}

            seen = [task.result() for task in [pool.submit(link) for _ in range(8)]]
            assert all(names_of >= {"boto3", "botocore", "numpy", "scipy", "cloudpickle"} for names_of in seen)


def test_a_function_with_nothing_reserved_runs_never(call) -> None:
    name = call.function("paused")
    boto3.client("lambda").put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=0)
    with pytest.raises(ClientError, match="ReservedFunctionConcurrentInvocationLimitExceeded"):
        call(name)


def test_jobs_that_still_run_end_with_their_account() -> None:
    with local_aws() as account:
        client = boto3.client("batch")
        container = {"image": "image", "command": ["python", "-c", "import time; time.sleep(600)"]}
        needs = [{"type": "VCPU", "value": "1"}, {"type": "MEMORY", "value": "512"}]
        client.register_job_definition(
            jobDefinitionName="long", type="container", containerProperties={**container, "resourceRequirements": needs}
        )
        client.submit_job(jobName="long", jobQueue=account.batch.queue(), jobDefinition="long")
        while not account.batch._processes:
            time.sleep(0.01)
        [process] = account.batch._processes
        assert process.poll() is None
    assert process.wait(timeout=30) < 0
