"""One invocation: what is retried, what is not, and what is billed; no AWS, real replies."""

from __future__ import annotations

import base64
import io
import json
import threading
from decimal import Decimal
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
)

from prefect_slo.aws import invoke
from prefect_slo.aws.invoke import LONGEST_WAIT_S, UNREACHED_TRIES, Failed, Invoker
from prefect_slo.aws.refusals import DEPLOY, PERMIT, SIGN_IN
from prefect_slo.aws.report import NOTHING, Billed, Report, bill
from prefect_slo.aws.spending import CappedCaller, SpendLimit
from prefect_slo.pricing import price_list

PRICES = price_list("aws-lambda-x86")
LINE = (
    "REPORT RequestId: r-1\tDuration: 100.20 ms\tBilled Duration: 101 ms\tMemory Size: 512 MB\tMax Memory Used: 60 MB\t"
)


def reply(document: Any, log: str = LINE, **fields: Any) -> dict[str, Any]:
    body = io.BytesIO(json.dumps(document).encode())
    return {"Payload": body, "LogResult": base64.b64encode(log.encode()).decode(), **fields}


def throttled() -> ClientError:
    error = {"Code": "TooManyRequestsException", "Message": "Rate Exceeded."}
    return ClientError(
        {"Error": error, "Reason": "ConcurrentInvocationLimitExceeded", "ResponseMetadata": {"HTTPStatusCode": 429}},
        "Invoke",
    )


def refused(code: str, status: int) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Invoke"
    )


class Lambdas:
    """Answers in turn; the last answer for ever."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.calls = list(answers), 0

    def invoke(self, **_: Any) -> Any:
        self.calls += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer


class Waits:
    """Notes how long was waited, without waiting."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, event: threading.Event, seconds: float) -> bool:
        self.seconds.append(seconds)
        return event.is_set()


def call(lambdas: Lambdas, *, again: bool = False, patience_s: float = 60.0) -> tuple[Any, Waits]:
    waits = Waits()
    invoker = Invoker(lambdas, PRICES, patience_s, seed=0, sleep=waits)
    try:
        return invoker.call("f", {"v": 1}, again=again, cancelled=threading.Event()), waits
    except Failed as failed:
        return failed, waits


def test_a_throttled_call_waits_longer_each_time_at_random_and_goes_on() -> None:
    answer, waits = call(Lambdas(*[throttled()] * 6, reply({"ok": True})))
    assert answer.reply == {"ok": True}
    assert len(waits.seconds) == 6
    assert all(seconds <= 0.05 * 2**n for n, seconds in enumerate(waits.seconds))
    assert len(set(waits.seconds)) == 6
    assert answer.waited_s == pytest.approx(sum(waits.seconds))


def test_what_may_be_billed_is_a_call_that_is_made_and_one_whose_reply_was_lost() -> None:
    """And none that came to nothing."""
    sent, seen = threading.Event(), list[tuple[str, bool]]()

    def look(what: str) -> bool:
        seen.append((what, sent.is_set()))
        return False

    def answered() -> Any:
        look("call")
        return reply({})

    away = EndpointConnectionError(endpoint_url="http://aws")
    lambdas = Lambdas(throttled(), away, ReadTimeoutError(endpoint_url="http://aws"), throttled(), answered)
    invoker = Invoker(lambdas, PRICES, sleep=lambda *_: look("wait"))
    invoker.call("f", {}, again=True, cancelled=threading.Event(), sent=sent)
    assert seen == [("wait", False), ("wait", False), ("wait", True), ("wait", True), ("call", True)]


@pytest.mark.parametrize(("code", "status"), [("ResourceNotReadyException", 502), ("ResourceConflictException", 409)])
def test_a_function_that_is_not_ready_yet_is_waited_for(code: str, status: int) -> None:
    answer, waits = call(Lambdas(*[refused(code, status)] * 3, reply({"ok": True})))
    assert (answer.reply, answer.lost, len(waits.seconds)) == ({"ok": True}, 0, 3)
    failed, _ = call(Lambdas(refused(code, status)))
    assert failed.why == "throttled"
    assert f"not ready, {code}: no, for " in failed.detail


def test_patience_with_throttling_ends_and_says_why() -> None:
    failed, waits = call(Lambdas(throttled()), patience_s=100.0)
    assert failed.why == "throttled"
    assert "ConcurrentInvocationLimitExceeded" in failed.detail
    assert 100 <= sum(waits.seconds) <= 100 + LONGEST_WAIT_S
    assert max(waits.seconds) <= LONGEST_WAIT_S


@pytest.mark.parametrize("lost", [ReadTimeoutError(endpoint_url="https://x"), refused("ServiceException", 500)])
def test_a_call_whose_reply_is_lost_is_made_again_only_where_it_may(lost: Exception) -> None:
    lambdas = Lambdas(lost, reply({"ok": True}))
    assert call(lambdas)[0].why == "unknown"
    assert lambdas.calls == 1
    assert call(Lambdas(lost, reply({"ok": True})), again=True)[0].reply == {"ok": True}


UNREACHED = EndpointConnectionError(endpoint_url="https://x", error="no route")


@pytest.mark.parametrize("error", [UNREACHED, ConnectTimeoutError(endpoint_url="https://x")])
def test_a_call_that_does_not_reach_aws_has_not_run_and_is_made_again_a_few_times(error: Exception) -> None:
    lambdas = Lambdas(*[error] * 3, reply({"ok": True}))
    answer, waits = call(lambdas)
    assert (answer.reply, answer.lost, len(waits.seconds)) == ({"ok": True}, 0, 3)
    failed, _ = call(never := Lambdas(error))
    assert (failed.why, failed.lost, never.calls) == ("unreached", 0, UNREACHED_TRIES)


@pytest.mark.parametrize(
    ("error", "then"),
    [
        (refused("ResourceNotFoundException", 404), DEPLOY),
        (refused("AccessDeniedException", 403), PERMIT),
        (refused("ExpiredTokenException", 403), SIGN_IN),
        (NoCredentialsError(), SIGN_IN),
        (refused("InvalidRequestContentException", 400), ": no"),
    ],
)
def test_a_function_that_cannot_be_called_is_told_with_what_to_do_next(error: Exception, then: str) -> None:
    failed, waits = call(Lambdas(error), again=True)
    assert (failed.why, waits.seconds) == ("start", [])
    assert failed.detail.endswith(then)


@pytest.mark.parametrize(
    ("kind", "message", "used", "why"),
    [
        ("Sandbox.Timedout", "RequestId: x Error: Task timed out after 3.00 seconds", 60, "timeout"),
        ("Runtime.OutOfMemory", "Runtime exited with error: signal: killed", 512, "memory"),
        ("Runtime.ExitError", "Runtime exited with error: signal: killed", 512, "memory"),
        ("Runtime.ExitError", "Runtime exited with error: signal: killed", 60, "died"),
        ("Runtime.ExitError", "Runtime exited with error: exit status 3", 60, "died"),
        ("Runtime.ImportModuleError", "Unable to import module", 60, "start"),
        ("OSError", "[Errno 28] No space left on device", 60, "disk"),
        ("OSError", "[Errno 5] Input/output error", 60, "died"),
        ("SomethingElse", "who knows", 60, "died"),
    ],
)
def test_how_a_function_ended_is_told_apart_and_billed_all_the_same(kind, message, used, why) -> None:
    log = LINE.replace("60 MB", f"{used} MB")
    failed, _ = call(Lambdas(reply({"errorType": kind, "errorMessage": message}, log, FunctionError="Unhandled")))
    assert (failed.why, failed.used_mb, failed.memory_mb) == (why, used, 512)
    assert failed.billed == Billed(bill(PRICES, 512, 101), 101, 1)


def test_a_cancelled_call_waits_no_longer() -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Failed, match="cancelled"):
        Invoker(Lambdas(throttled()), PRICES).call("f", {}, again=False, cancelled=cancelled)


def test_a_cancelled_call_is_not_made() -> None:
    cancelled, lambdas = threading.Event(), Lambdas(reply({"ok": True}))
    cancelled.set()
    with pytest.raises(Failed, match="cancelled"):
        Invoker(lambdas, PRICES).call("f", {}, again=False, cancelled=cancelled)
    assert lambdas.calls == 0


def test_lost_tries_are_counted_whatever_comes_after_them() -> None:
    lost = ReadTimeoutError(endpoint_url="https://x")
    ended = reply({"errorType": "Runtime.ExitError", "errorMessage": "exit status 3"}, FunctionError="Unhandled")
    assert call(Lambdas(lost, lost, reply({"ok": True})), again=True)[0].lost == 2
    assert call(Lambdas(lost, ended), again=True)[0].lost == 1
    assert call(Lambdas(lost), again=True)[0].lost == 3
    assert call(Lambdas(lost))[0].lost == 1


@pytest.mark.parametrize(
    "then",
    [
        throttled(),
        UNREACHED,
        refused("ResourceNotFoundException", 404),
        reply({"errorType": "Runtime.ImportModuleError", "errorMessage": "no"}, FunctionError="Unhandled"),
    ],
)
def test_after_a_lost_reply_nothing_says_that_it_never_ran(then: Any) -> None:
    failed, _ = call(Lambdas(ReadTimeoutError(endpoint_url="https://x"), then), again=True, patience_s=5.0)
    assert (failed.why, failed.lost) == ("unknown", 1)
    assert "its reply was lost; then: " in failed.detail


def test_a_reply_that_breaks_off_is_lost() -> None:
    failed, _ = call(Lambdas(IncompleteReadError(actual_bytes=1, expected_bytes=2)))
    assert (failed.why, failed.lost) == ("unknown", 1)


def test_a_request_that_is_too_large_is_not_sent() -> None:
    lambdas = Lambdas(reply({}))
    with pytest.raises(Failed, match="6291456"):
        Invoker(lambdas, PRICES).call("f", {"x": "x" * 6_300_000}, again=False, cancelled=threading.Event())
    assert lambdas.calls == 0


# ---- reports and bills ----------------------------------------------------------------------------------------------


def test_a_report_is_read_from_the_end_of_a_log() -> None:
    log = f"START\nREPORT nonsense\n{LINE}\nsome output\n{LINE.replace('r-1', 'r-2')}Init Duration: 35.95 ms\t\n"
    assert Report.of(log) == Report("r-2", 100.2, 101, 512, 60, 35.95)
    assert Report.of("nothing") is None


def test_a_bill_is_exact() -> None:
    """128 MB for 1 ms: a 8,000th of a GB-second; and a request is 20 cents a million."""
    assert bill(PRICES, 128, 1) == Decimal("0.0000166667") / 8000 + Decimal("0.0000002")
    parts = sum((bill(PRICES, 1769, ms) for ms in range(1, 100)), Decimal())
    assert parts == bill(PRICES, 1769, sum(range(1, 100)), requests=99)


def test_a_bill_passes_from_one_tier_to_the_next() -> None:
    """A GB-second before the 6 billionth, and one after it."""
    edge = Decimal("6e9") - 1
    assert bill(PRICES, 1024, 2000, used_gb_s=edge) == Decimal("0.0000166667") + Decimal("0.000015") + Decimal("2e-7")
    assert bill(PRICES, 1024, 2000, used_gb_s=Decimal("20e9")) == 2 * Decimal("0.0000133334") + Decimal("2e-7")
    parts = bill(PRICES, 1024, 1500, used_gb_s=edge) + bill(PRICES, 1024, 500, used_gb_s=edge + Decimal("1.5"))
    assert parts == bill(PRICES, 1024, 2000, 2, used_gb_s=edge)


def test_temporary_disk_is_billed_beyond_what_is_included() -> None:
    assert bill(PRICES, 128, 1000, storage_mb=512) == bill(PRICES, 128, 1000)
    extra = bill(PRICES, 128, 1000, storage_mb=1536) - bill(PRICES, 128, 1000)
    assert extra == Decimal("0.0000000309")


def test_what_a_reply_without_a_report_is_billed_is_not_known_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(invoke._logger, "warning", lambda words, *values: said.append(words % values))
    lost, ended = ReadTimeoutError(endpoint_url="https://x"), {"errorType": "X", "errorMessage": "x"}
    lambdas = Lambdas(
        lost, reply({"ok": True}, log="cut short"), reply(ended, log="cut short", FunctionError="Unhandled")
    )
    invoker, limit = Invoker(lambdas, PRICES, seed=0, sleep=Waits()), SpendLimit(Decimal(9))
    answer = invoker.call("f", {}, again=True, cancelled=threading.Event())
    assert (answer.billed, answer.lost) == (NOTHING, 2)
    with pytest.raises(Failed, match="X: x") as failed:
        CappedCaller(invoker, limit, lambda name: Decimal(1)).call("f", {}, again=True, cancelled=threading.Event())
    assert (failed.value.billed, failed.value.lost, limit.spent_usd) == (NOTHING, 1, 1)
    assert len(said) == 1
    assert "cut short" in said[0]
