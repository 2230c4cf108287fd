"""What workers send back, and what a backend makes of it: the worker's own handler, in this process; no functions."""

from __future__ import annotations

import base64
import copy
import copyreg
import json
import logging
import pickle
import threading
from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import boto3
import cloudpickle
import pytest
from botocore.exceptions import ClientError

from prefect_slo.aws import exchange as exchanges
from prefect_slo.aws import worker
from prefect_slo.aws.exchange import Exchange, Order
from prefect_slo.aws.invoke import Answer, Failed, Invoker
from prefect_slo.aws.report import Billed
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.pricing import price_list
from prefect_slo.resources import Size
from prefect_slo.runner.backends.aws_lambda import LambdaBackend
from prefect_slo.runner.backends.aws_replies import carried
from prefect_slo.runner.backends.protocol import Apart, Bundle, Carry, Lost
from prefect_slo.testing.aws import LocalAws

BILLED = Billed(Decimal("0.25"), 100, 1)
CALL = cloudpickle.dumps(((), {}))


class Here:
    """Has events handled in this process, or by another function of them."""

    def __init__(self, handled: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self.calls = 0
        self._handled = handled or (lambda event: worker.handler(event, SimpleNamespace()))

    def call(
        self, function: str, event: dict[str, Any], *, again: bool, cancelled: threading.Event, sent: threading.Event
    ) -> Answer:
        self.calls += 1
        sent.set()
        return Answer(json.loads(json.dumps(self._handled(event))), 0.0, 1.0, 0.0, None, BILLED)


class Heard:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self._news = threading.Condition()

    def __call__(self, event: Any) -> None:
        with self._news:
            self.told.append(event)
            self._news.notify_all()

    def lost(self) -> Lost:
        with self._news:
            assert self._news.wait_for(lambda: any(isinstance(one, Lost) for one in self.told), 60)
        return next(one for one in self.told if isinstance(one, Lost))


def backend(caller: Here | Invoker, store: S3Prefix | None = None) -> LambdaBackend:
    return LambdaBackend(Exchange(caller, store), lambda mb: "f", concurrency=2, memory_mb=128, run_key="run")


def died(event: dict[str, Any]) -> dict[str, Any]:
    raise Failed("died", "exit status 3")


def test_a_result_that_fits_into_no_reply_has_run_and_is_billed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "INLINE_RESULT", 1000)
    code, items = cloudpickle.dumps(lambda: bytes(5000)), [(7, CALL), (8, CALL)]
    returned = Exchange(Here()).run("f", Order("function", code, items, ("k",)))
    assert [(one.item, one.failed) for one in returned.items] == [(7, False), (8, False)]
    assert all("give the pool a bucket" in one.unpicklable for one in returned.items)
    assert returned.answer.billed == BILLED


def lacks_numpy() -> None:
    raise ModuleNotFoundError("No module named 'numpy'")


@pytest.mark.parametrize("when", ["it is opened", "it runs"])
def test_a_package_that_lacks_is_said_with_how_to_bring_it(when: str) -> None:
    def opening(event: dict[str, Any]) -> dict[str, Any]:
        return {**worker._failure("open", ModuleNotFoundError("No module named 'numpy'")), "v": worker.PROTOCOL}

    order = Order("function", cloudpickle.dumps(lacks_numpy), [(1, CALL)], ("k",))
    if when == "it is opened":
        with pytest.raises(Failed) as caught:
            Exchange(Here(opening)).run("f", order)
        said = str(caught.value)
    else:
        [item] = Exchange(Here()).run("f", order).items
        said = "".join(carried(item, 0.0, 1.0).value.__notes__)
    assert "numpy" in said
    assert "layers= or image=" in said


class Missing(LookupError):
    def __init__(self, name: str) -> None:
        super().__init__(f"no {name}")


def test_an_exception_says_the_same_here_and_is_known_here_by_what_it_took_to_come() -> None:
    def lacks() -> None:
        raise Missing("thing")

    order = Order("function", cloudpickle.dumps(lacks), [(1, CALL)], ("k",))
    try:
        [item] = Exchange(Here()).run("f", order).items
        del copyreg.dispatch_table[Missing]  # that was the worker's
        error = carried(item, 0.0, 1.0).value
        for one in (error, copy.deepcopy(error), pickle.loads(cloudpickle.dumps(error))):
            assert (type(one), str(one)) == (Missing, "no thing")
    finally:
        copyreg.dispatch_table.pop(Missing, None)


def of_release(protocol: int, ran: list[int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The handler of an image that holds another release: the first protocol has no version, and looks at none."""

    def handled(event: dict[str, Any]) -> dict[str, Any]:
        try:
            if protocol == 1:
                assert event["py"], "it looks at this first"
            elif event["v"] != protocol:
                return {"v": protocol, "ok": False, "error": {"kind": "protocol", "message": "another"}}
        except KeyError as error:
            return {"ok": False, "error": {"kind": "handler", "message": repr(error)}, "telemetry": {}}
        ran.append(protocol)
        return {"ok": True, "result": {"b64": base64.b64encode(pickle.dumps(([], []))).decode()}, "telemetry": {}}

    return handled


@pytest.mark.parametrize("protocol", [1, worker.PROTOCOL + 1])
def test_a_worker_of_another_release_runs_nothing_and_is_said_to_be_one(protocol: int) -> None:
    ran: list[int] = []
    with pytest.raises(Failed, match="build its image with the release") as caught:
        Exchange(Here(of_release(protocol, ran))).run("f", Order("function", b"", [(1, CALL)], ("k",)))
    assert (caught.value.why, caught.value.billed, ran) == ("start", BILLED, [])


def test_a_worker_takes_no_event_of_another_release() -> None:
    reply = worker.handler({"v": worker.PROTOCOL - 1, "py": [3, 11], "kind": "function"}, SimpleNamespace())
    assert (reply["ok"], reply["error"]["kind"], reply["v"]) == (False, "protocol", worker.PROTOCOL)


def test_a_reply_without_a_version_is_not_believed() -> None:
    """What ran there would otherwise be taken for its result, whatever it is wrapped in."""

    def unwrapped(event: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in worker.handler(event, SimpleNamespace()).items() if name != "v"}

    with pytest.raises(Failed, match="another release"):
        Exchange(Here(unwrapped)).run("f", Order("function", cloudpickle.dumps(int), [(1, CALL)], ("k",)))


def test_what_cannot_be_stored_has_not_run(account: LocalAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "INLINE_BYTES", 10)
    caller = Here()
    with pytest.raises(Failed, match="NoSuchBucket") as caught:
        Exchange(caller, S3Prefix("nobodys-bucket")).run("f", Order("function", b"", [(1, bytes(100))], ("k",)))
    assert (caught.value.why, caller.calls) == ("start", 0)


def test_a_reply_of_other_items_is_refused() -> None:
    def other(event: dict[str, Any]) -> dict[str, Any]:
        result = pickle.dumps(([(99, b"", False, "", 0.0, 0.0, 0.0, 0.0)], []))
        return {"v": worker.PROTOCOL, "ok": True, "result": {"b64": base64.b64encode(result).decode()}}

    heard, lambdas = Heard(), backend(Here(other))
    lambdas.open(1, Size(1, 128), heard)
    lambdas.submit(1, Bundle(1, "p", b"", ((1, b""),)))
    lost = heard.lost()
    assert "items [1] were sent, its reply is of [99]" in lost.detail
    assert (lost.running, lost.billed_usd, lost.requests) == (1, BILLED.usd, 1)
    lambdas.shutdown()


class OneByOne:
    """Sends items out one after another."""

    def host(self, items: Any, carry: Carry, report: Any) -> None:
        for item, code in items:
            carry(code, [(item, CALL)])


def cancelled_in(call: int, *bundles: tuple[int, ...]) -> tuple[int, Lost]:
    """Calls made for bundles of a lease that is cancelled in the middle of one of them, and what it is told of it."""
    begun, go = threading.Event(), threading.Event()

    def slow(event: dict[str, Any]) -> dict[str, Any]:
        if caller.calls == call:
            begun.set()
            assert go.wait(60)
        return worker.handler(event, SimpleNamespace())

    code, caller, heard = cloudpickle.dumps(lambda: 1), Here(slow), Heard()
    lambdas = backend(caller)
    lambdas.open(1, Size(1, 128), heard)
    thread = lambdas._leases[1]._thread
    for number, bundle in enumerate(bundles, start=1):
        lambdas.submit(1, Bundle(number, "p", OneByOne(), tuple((item, code) for item in bundle)))
    assert begun.wait(60)
    lambdas.cancel(1)
    go.set()
    thread.join(60)
    assert not thread.is_alive()
    lambdas.shutdown()
    return caller.calls, heard.lost()


def test_a_cancelled_lease_begins_no_further_invocation() -> None:
    calls, lost = cancelled_in(1, (1, 2), (3,))
    assert calls == 1
    assert lost.untold == 1, "it is billed to its end, and nobody hears of it"


def test_what_a_bundle_was_billed_before_it_was_cancelled_is_told() -> None:
    _, lost = cancelled_in(2, (1, 2))
    assert (lost.billed_usd, lost.requests, lost.untold) == (BILLED.usd, 1, 1)
    assert (lost.running, lost.untouched) == (1, ())


class Throttled:
    """A client whose calls come to nothing."""

    def invoke(self, **_: Any) -> Any:
        raise ClientError(
            {"Error": {"Code": "TooManyRequestsException"}, "ResponseMetadata": {"HTTPStatusCode": 429}}, "Invoke"
        )


def test_a_call_that_is_cancelled_while_it_is_throttled_is_not_billed() -> None:
    waits, heard = threading.Event(), Heard()

    def sleep(cancelled: threading.Event, _: float) -> bool:
        waits.set()
        return cancelled.wait(60)

    lambdas = backend(Invoker(Throttled(), price_list("aws-lambda-x86"), sleep=sleep))
    lambdas.open(1, Size(1, 128), heard)
    lambdas.submit(1, Bundle(1, "p", b"", ((1, b""),)))
    assert waits.wait(60)
    lambdas.cancel(1)
    assert heard.lost().untold == 0
    lambdas.shutdown()


class Taking:
    """Sends one item out with a large value beside it."""

    def host(self, items: Any, carry: Carry, report: Any) -> None:
        carry(b"", list(items), parts=[Apart("sha", bytes(exchanges.INLINE_BYTES + 1))])


def test_a_stored_value_that_is_gone_tells_against_no_worker_but_once(account: LocalAws) -> None:
    """All calls in flight find it gone together. Where it is gone again they can't see where it lies."""
    together, sent = threading.Barrier(3), list[int]()

    def gone(event: dict[str, Any]) -> dict[str, Any]:
        together.wait(60)
        key = event["parts"][0]["key"]
        return {"v": worker.PROTOCOL, "ok": False, "error": {"kind": "gone", "message": "gone", "keys": [key]}}

    lambdas = LambdaBackend(
        Exchange(Here(gone), S3Prefix.of(account.bucket)), lambda mb: "f", concurrency=3, memory_mb=128, run_key="run"
    )
    for excused in (True, False):
        heard = [Heard() for _ in range(3)]
        for one in heard:
            sent.append(len(sent) + 1)
            lambdas.open(sent[-1], Size(1, 128), one)
            lambdas.submit(sent[-1], Bundle(sent[-1], "p", Taking(), ((1, CALL),)))
        assert [one.lost().inputs_gone for one in heard] == [excused] * 3
    lambdas.shutdown()


def test_a_call_that_is_cancelled_while_what_it_takes_is_stored_is_not_billed(
    account: LocalAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, caller, heard = threading.Event(), threading.Event(), Here(), Heard()

    def put(self: S3Prefix, key: str, body: bytes) -> None:
        begun.set()
        assert go.wait(60)

    monkeypatch.setattr(S3Prefix, "put", put)
    monkeypatch.setattr(exchanges, "INLINE_BYTES", 10)
    lambdas = backend(caller, S3Prefix.of(account.bucket))
    lambdas.open(1, Size(1, 128), heard)
    thread = lambdas._leases[1]._thread
    lambdas.submit(1, Bundle(1, "p", b"", ((1, bytes(100)),)))
    assert begun.wait(60)
    lambdas.cancel(1)
    assert heard.lost().untold == 0
    go.set()
    thread.join(60)
    lambdas.shutdown()


def test_what_failed_work_has_stored_is_deleted(account: LocalAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "INLINE_BYTES", 10)
    store, heard = S3Prefix.of(account.bucket), Heard()
    lambdas = backend(Here(died), store)
    lambdas.open(1, Size(1, 128), heard)
    lambdas.submit(1, Bundle(1, "p", b"", ((1, bytes(100)),)))
    heard.lost()
    client = boto3.client("s3")
    assert client.list_objects_v2(Bucket=store.bucket).get("KeyCount") == 1
    lambdas.shutdown()
    assert client.list_objects_v2(Bucket=store.bucket).get("KeyCount") == 0


def test_a_run_is_finished_though_what_it_stored_cannot_be_deleted(
    account: LocalAws, caplog: pytest.LogCaptureFixture
) -> None:
    heard, lambdas = Heard(), backend(Here(died), S3Prefix("nobodys-bucket"))
    lambdas.open(1, Size(1, 128), heard)
    lambdas.submit(1, Bundle(1, "p", b"", ((1, b""),)))
    heard.lost()
    with caplog.at_level(logging.WARNING):
        lambdas.shutdown()
    assert "s3://nobodys-bucket/prefect-slo cannot be deleted" in caplog.text
