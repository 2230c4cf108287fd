"""Maintenance of all flows."""

from __future__ import annotations

import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.loop import maintenance
from prefect_slo.loop.maintenance import for_each


def work(name: str) -> str:
    if name == "broken":
        raise InvalidValue("model.schema", None, "1")
    if name == "locked":
        raise TimeoutError("another writer took too long")
    return f"{name} is well"


def test_a_flow_that_cannot_be_worked_on_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(maintenance, "observed_flows", lambda: ("first", "broken", "locked", "last"))
    told = for_each(None, work)
    assert list(told) == ["first", "broken", "locked", "last"]
    assert told["last"] == "last is well"
    assert told["broken"].startswith("left out: model.schema is None")
    assert told["locked"] == "left out: another writer took too long"
    assert "broken was left out" in caplog.text


def test_what_keeps_the_one_flow_that_is_named_is_raised() -> None:
    assert for_each("only", work) == {"only": "only is well"}
    with pytest.raises(InvalidValue):
        for_each("broken", work)
