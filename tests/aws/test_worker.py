"""What an item leaves on a worker that stays warm."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest

from prefect_slo.aws import worker
from prefect_slo.aws.s3 import S3Prefix

CALL = cloudpickle.dumps(((), {}))


@pytest.fixture
def alarm() -> Iterator[None]:
    """Workers set the handler of a process of their own."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


def test_an_async_item_that_overran_does_not_go_on_with_the_next_one(alarm: None) -> None:
    told: list[str] = []

    async def waits(name: str) -> None:
        try:
            await asyncio.sleep(600)
        finally:
            told.append(name)

    async def slow() -> None:
        background = asyncio.ensure_future(waits("background"))
        await waits("item")
        await background

    async def quick() -> int:
        await asyncio.sleep(0.01)
        return 1

    outcomes, overran = worker._run_all(worker._caller(slow), [(1, CALL), (2, CALL)], 1.0, time.time())
    assert (outcomes, overran) == ([], 1)
    assert sorted(told) == ["background", "item"], "both have ended"
    [outcome], overran = worker._run_all(worker._caller(quick), [(3, CALL)], None, time.time())
    assert cloudpickle.loads(outcome[1]) == 1
    assert overran is None


class Broken:
    """An S3 that takes no part, and doesn't let go either."""

    def create_multipart_upload(self, **_: Any) -> dict[str, str]:
        return {"UploadId": "u"}

    def upload_part(self, **_: Any) -> Any:
        raise ConnectionError("no part")

    def abort_multipart_upload(self, **_: Any) -> None:
        raise PermissionError("s3:AbortMultipartUpload")


@pytest.mark.parametrize("side", ["worker", "caller"])
def test_an_upload_that_cannot_be_aborted_tells_what_went_wrong_first(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(9 * 2**20)
    monkeypatch.setitem(worker._STATE, "s3", Broken())
    monkeypatch.setattr(S3Prefix, "_s3", Broken())
    with pytest.raises(ConnectionError, match="no part"):
        worker._written("b", "k", content, {}) if side == "worker" else S3Prefix("b").put("k", content)
