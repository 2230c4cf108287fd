"""What workers send back, and what a backend makes of it: the worker's own handler, in this process; no functions."""

from __future__ import annotations

import base64
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

from prefect_slo.aws import exchange as exchanges
from prefect_slo.aws import worker
from prefect_slo.aws.exchange import Exchange, Order
from prefect_slo.aws.invoke import Answer, Failed
from prefect_slo.aws.report import Billed
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.resources import Size
from prefect_slo.runner.backends.aws_lambda import LambdaBackend
from prefect_slo.runner.backends.protocol import Bundle, Carry, Lost
from prefect_slo.testing.aws import LocalAws

BILLED = Billed(Decimal("0.25"), 100, 1)
CALL = cloudpickle.dumps(((), {}))


class Here:
    """Has events handled in this process, or by another function of them."""

    def __init__(self, handled: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self.calls = 0
        self._handled = handled or (lambda event: worker.handler(event, SimpleNamespace()))

    def call(self, function: str, event: dict[str, Any], *, again: bool, cancelled: threading.Event) -> Answer:
        self.calls += 1
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


def backend(caller: Here, store: S3Prefix | None = None) -> LambdaBackend:
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


def test_what_cannot_be_stored_has_not_run(account: LocalAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "INLINE_BYTES", 10)
    caller = Here()
    with pytest.raises(Failed, match="NoSuchBucket") as caught:
        Exchange(caller, S3Prefix("nobodys-bucket")).run("f", Order("function", b"", [(1, bytes(100))], ("k",)))
    assert (caught.value.why, caller.calls) == ("start", 0)


def test_a_reply_of_other_items_is_refused() -> None:
    def other(event: dict[str, Any]) -> dict[str, Any]:
        result = pickle.dumps(([(99, b"", False, "", 0.0, 0.0, 0.0, 0.0)], []))
        return {"ok": True, "result": {"b64": base64.b64encode(result).decode()}}

    heard, lambdas = Heard(), backend(Here(other))
    lambdas.open(1, Size(1, 128), heard)
    lambdas.submit(1, Bundle(1, "p", b"", ((1, b""),)))
    lost = heard.lost()
    assert "items [1] were sent, its reply is of [99]" in lost.detail
    assert (lost.running, lost.billed_usd, lost.requests) == (1, BILLED.usd, 1)
    lambdas.shutdown()


def test_a_cancelled_lease_begins_no_further_invocation() -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(event: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        assert go.wait(60)
        return worker.handler(event, SimpleNamespace())

    class OneByOne:
        def host(self, items: Any, carry: Carry, report: Any) -> None:
            for item, code in items:
                carry(code, [(item, CALL)])

    code, caller, heard = cloudpickle.dumps(lambda: 1), Here(slow), Heard()
    lambdas = backend(caller)
    lambdas.open(1, Size(1, 128), heard)
    thread = lambdas._leases[1]._thread
    lambdas.submit(1, Bundle(1, "p", OneByOne(), ((1, code), (2, code))))
    lambdas.submit(1, Bundle(2, "p", OneByOne(), ((3, code),)))
    assert begun.wait(60)
    lambdas.cancel(1)
    go.set()
    thread.join(60)
    assert not thread.is_alive()
    assert caller.calls == 1
    assert heard.lost().untold == 1, "it is billed to its end, and nobody hears of it"
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
