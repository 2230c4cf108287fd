"""A pilot's letters: none is left out, however long storage can't be written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from prefect_slo.runner.backends.protocol import Chatter, Opened
from prefect_slo.runner.workpool import pilot
from prefect_slo.runner.workpool.mailbox import FROM_JOB, Incoming
from prefect_slo.runner.workpool.pilot import Sender
from prefect_slo.runner.workpool.stores import FolderStore

UP = Opened(1, True, 0.1, 0.0, 1)


class Failing(FolderStore):
    """A folder that can't be written for a while."""

    failures = 0

    def write(self, box: str, name: str, body: bytes) -> None:
        if Failing.failures > 0:
            Failing.failures -= 1
            raise OSError("no space left on device")
        super().write(box, name, body)


class Small(FolderStore):
    """A folder that has no room for much."""

    def write(self, box: str, name: str, body: bytes) -> None:
        if len(body) > 10_000:
            raise OSError("no space left on device")
        super().write(box, name, body)


def letters(store: FolderStore) -> list[object]:
    inbox, found = Incoming(store, "box", FROM_JOB), list[object]()
    while (letter := inbox.receive()) is not None:
        found += [*letter.reports, *([letter.over] if letter.over else [])]
    return found


def test_letters_arrive_in_order_however_often_storage_fails(tmp_path: Path) -> None:
    store = Failing(str(tmp_path))
    Failing.failures = 40
    pauses: list[float] = []
    sender = Sender(store, "box", sleep=pauses.append)
    sender.post(UP)
    sender.post(UP)
    sender.end("over")
    assert letters(store) == [UP, UP, "over"]
    assert len(pauses) == 40
    assert max(pauses) <= 2.0


def test_a_sender_says_for_how_long_nothing_could_be_written(tmp_path: Path) -> None:
    Failing.failures = 10**9
    sender = Sender(Failing(str(tmp_path)), "box", sleep=lambda _: time.sleep(0.001))
    assert sender.stuck_s(time.monotonic()) == 0.0
    sender.post(UP)
    deadline = time.monotonic() + 20
    while sender.stuck_s(time.monotonic()) == 0.0:
        assert time.monotonic() < deadline
    assert sender.stuck_s(time.monotonic() + 60) >= 60
    Failing.failures = 0
    while sender.stuck_s(time.monotonic() + 60) > 0:
        assert time.monotonic() < deadline
    sender.end("over")


def test_a_report_that_never_fits_does_not_keep_back_why_there_will_be_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "SETTLE_S", 0.2)
    store = Small(str(tmp_path))
    sender = Sender(store, "box", sleep=lambda _: time.sleep(0.01))
    sender.post(Chatter(1, b"x" * 20_000))
    sender.end("over")
    assert letters(store) == ["over"]
    assert "no space left" in sender.trouble
