"""One invocation of a worker function: throttling waited out, whatever else went wrong told apart.

``Invoke`` is called once per try: boto3's own retries would run a function again that is still running. A throttled
call never ran, so it is tried again, after a random part of a wait that doubles (AWS's "full jitter"), for as long as
the caller has patience; so is one that did not reach AWS, a few times. A call whose reply is lost may have run.
"""

from __future__ import annotations

import errno
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal

from prefect_slo.aws import limits
from prefect_slo.aws.refusals import with_advice
from prefect_slo.aws.report import NOTHING, Billed, Report, bill, tail
from prefect_slo.pricing import PriceList

_logger = logging.getLogger("prefect.slo")

Why = Literal["died", "memory", "disk", "timeout", "start", "throttled", "unreached", "unknown", "cancelled"]
NEVER_RAN = frozenset[Why]({"start", "throttled", "unreached"})
"""Ends of work that has not begun: it may be sent anew, whatever it is."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 10.0
_THROTTLED = {
    "TooManyRequestsException",
    "Throttling",
    "ThrottlingException",
    "EC2ThrottledException",
    "ENILimitReached",
}
_NOT_YET = {"ResourceNotReadyException", "ResourceConflictException"}
"""A function whose network comes back, or one that was just made: a moment later it can be called."""

_NEVER_STARTS = {"Runtime.ImportModuleError", "Runtime.HandlerNotFound", "Runtime.UserCodeSyntaxError"}
LOST_REPLY_TRIES, UNREACHED_TRIES = 3, 6
NO_SPACE = f"[Errno {errno.ENOSPC}]"
"""How the message of an error begins that a full temporary disk raises."""


def always() -> bool:
    """Yes."""
    return True


class Failed(Exception):
    """An invocation that gave no result.

    Attributes:
        why: ``throttled``: it never ran, for as long as there was patience; ``unreached``: nor did it, as AWS could not
            be reached; ``start``: it can't run as it is deployed;
            ``timeout``, ``memory``, ``disk``, ``died``: how it ended; ``unknown``: its reply was lost, it may have run;
            ``cancelled``: nobody wants it any more.
        detail: In words.
        used_mb: Most memory that it was seen to use.
        memory_mb: What it was allowed.
        billed: What it is billed all the same.
        storage_usd: US dollars of objects that were written and read for it.
        lost: Tries whose replies or reports were lost: what they are billed is not known, and not in ``billed``.
        on_batch: Whether it was a job on Batch that ended so.
    """

    def __init__(
        self, why: Why, detail: str, *, used_mb: float = 0.0, memory_mb: float = 0.0, billed: Billed = NOTHING
    ):
        self.why, self.detail, self.used_mb, self.memory_mb, self.billed = why, detail, used_mb, memory_mb, billed
        self.storage_usd, self.lost, self.on_batch = Decimal(), 0, False
        super().__init__(f"{why}: {detail}")


@dataclass(frozen=True)
class Answer:
    """The reply of a worker.

    Attributes:
        reply: What the handler returned.
        sent: When the call was made that was answered (monotonic).
        received: When its reply was there.
        waited_s: Seconds spent throttled before.
        report: What Lambda reports; ``None`` where its log came without.
        billed: What the try that was answered is billed.
        stored: Whether it came over S3.
        lost: Tries before whose replies were lost, and this one if it has no report: what they are billed is not known,
            and not in ``billed``.
    """

    reply: dict[str, Any]
    sent: float
    received: float
    waited_s: float
    report: Report | None
    billed: Billed
    stored: bool = False
    lost: int = 0


@dataclass
class Invoker:
    """Calls worker functions.

    Args:
        client: boto3's Lambda client.
        prices: What invocations cost.
        patience_s: How long one call may be throttled in all.
        storage_mb: Temporary disk of the functions.
        seed: Of the jitter.
        sleep: Waits for some seconds, or until the event is set; returns whether it was.
    """

    client: Any
    prices: PriceList
    patience_s: float = 300.0
    storage_mb: int = 0
    seed: int | None = None
    sleep: Callable[[threading.Event, float], bool] = threading.Event.wait
    clock: Callable[[], float] = time.monotonic
    _rng: random.Random = field(init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def call(
        self,
        function: str,
        event: dict[str, Any],
        *,
        again: bool,
        cancelled: threading.Event,
        sent: threading.Event | None = None,
        more: Callable[[], bool] = always,
    ) -> Answer:
        """Have a function run an event.

        Args:
            function: Name of the function.
            event: What it is to do.
            again: Whether it may be called once more after its reply was lost.
            cancelled: Nothing is called once it is set; ends the wait of a throttled call.
            sent: Set while a call may be billed of which nothing has been heard: between tries that came to nothing it
                is not.
            more: Asked after each lost reply where the call would be made again: whether it may be.

        Raises:
            Failed: It gave no result.
        """
        payload = json.dumps(event, separators=(",", ":")).encode()
        if len(payload) > limits.PAYLOAD_BYTES:
            raise Failed("start", f"a request of {len(payload)} bytes is over Lambda's {limits.PAYLOAD_BYTES}")
        if cancelled.is_set():
            raise Failed("cancelled", "cancelled before it was called")
        waited_s, wait_s, lost, unreached = 0.0, FIRST_WAIT_S, 0, 0
        sent = sent or threading.Event()
        while True:
            begun = self.clock()
            sent.set()
            try:
                response = self.client.invoke(FunctionName=function, Payload=payload, LogType="Tail")
                answer = self._answer(response, begun, waited_s)
                return replace(answer, lost=answer.lost + lost)
            except Failed as failed:
                raise _after(lost, failed) from None
            except Exception as error:
                why, detail = cause(error)
                lost, unreached = lost + (why == "unknown"), unreached + (why == "unreached")
                if not lost:
                    sent.clear()
                final = why == "start" or (why == "unknown" and not (again and lost < LOST_REPLY_TRIES and more()))
            if final or unreached >= UNREACHED_TRIES or waited_s >= self.patience_s:
                detail = detail if why != "throttled" else f"{detail}, for {waited_s:.0f} s"
                raise _after(lost, Failed(why, detail))
            pause_s = self._rng.uniform(0.0, wait_s)
            if cancelled.is_set() or self.sleep(cancelled, pause_s):
                raise _after(lost, Failed("cancelled", "cancelled while it was throttled"))
            waited_s, wait_s = waited_s + pause_s, min(2 * wait_s, LONGEST_WAIT_S)

    def _answer(self, response: dict[str, Any], sent: float, waited_s: float) -> Answer:
        document = json.loads(response["Payload"].read() or b"null")
        received = self.clock()
        log = tail(response.get("LogResult", ""))
        report = Report.of(log)
        billed = NOTHING
        if report is not None:
            usd = bill(self.prices, report.memory_mb, report.billed_ms, storage_mb=self.storage_mb)
            billed = Billed(usd, report.billed_ms, 1)
        untold = self._untold(log) if report is None else 0
        if response.get("FunctionError"):
            failed = _function_error(document or {}, report, billed)
            failed.lost = untold
            raise failed
        return Answer(document, sent, received, waited_s, report, billed, lost=untold)

    def _untold(self, log: str) -> int:
        """An invocation whose report did not come. Said once: costs are too low from then on."""
        if not self._warned:
            self._warned = True
            _logger.warning(
                "An invocation came back without a report that can be read (%r): what it is billed is not known "
                "and not in the costs of this run. A cap counts it with the most that it can cost. This is said once.",
                log[-200:],
            )
        return 1


def _after(lost: int, failed: Failed) -> Failed:
    """A failure after tries whose replies were lost: one of these may have run, whatever became of the last."""
    if lost and failed.why in NEVER_RAN:
        failed = Failed("unknown", f"its reply was lost; then: {failed.detail}", billed=failed.billed)
    failed.lost += lost
    return failed


def cause(error: Exception) -> tuple[Why, str]:
    """What an exception of boto3 means: ``throttled``, ``unreached``, ``start``; ``unknown``: it may have been done."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        ConnectTimeoutError,
        EndpointConnectionError,
        HTTPClientError,
        IncompleteReadError,
        ProxyConnectionError,
    )

    if isinstance(error, ClientError):
        told = error.response.get("Error", {})
        code, status = str(told.get("Code", "")), error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        reason = error.response.get("Reason", "")
        detail = f"{code}{f' ({reason})' if reason else ''}: {told.get('Message', '')}".rstrip(": ")
        if code in _THROTTLED or status == 429:
            return "throttled", f"throttled, {detail}"
        if code in _NOT_YET:
            return "throttled", f"not ready, {detail}"
        if status >= 500:
            return "unknown", detail
        return "start", with_advice(detail, error)
    if isinstance(error, (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError)):
        return "unreached", with_advice(f"AWS cannot be reached ({type(error).__name__}: {error})", error)
    if isinstance(error, (ConnectionError, HTTPClientError, IncompleteReadError)):
        return "unknown", f"its reply was lost ({type(error).__name__})"
    if isinstance(error, BotoCoreError):
        return "start", with_advice(f"{type(error).__name__}: {error}", error)
    raise error


def _function_error(document: dict[str, Any], report: Report | None, billed: Billed) -> Failed:
    kind, message = str(document.get("errorType", "")), str(document.get("errorMessage", ""))
    used = float(report.used_mb) if report is not None else 0.0
    allowed = float(report.memory_mb) if report is not None else 0.0
    killed = "signal: killed" in message
    if kind == "Sandbox.Timedout" or "Task timed out" in message:
        why: Why = "timeout"
    elif kind == "Runtime.OutOfMemory" or (killed and report is not None and used >= allowed):
        why = "memory"
    elif kind == "OSError" and message.startswith(NO_SPACE):
        why = "disk"
    elif kind in _NEVER_STARTS:
        why = "start"
    else:
        why = "died"
    detail = f"{kind}: {message}" + (" (signal 9)" if killed else "")
    return Failed(why, detail, used_mb=used, memory_mb=allowed, billed=billed)
