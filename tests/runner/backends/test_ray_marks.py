"""A bundle's mark goes when the bundle is finished, and stays where nothing more may be heard of it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from prefect_slo.resources import Size
from prefect_slo.runner.backends import ray_cluster
from prefect_slo.runner.backends.protocol import Bundle, Finished, Lost
from prefect_slo.runner.backends.ray_marks import mark, turns
from prefect_slo.runner.backends.remote import Reply, Work

pytest.importorskip("ray")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What stands for the table of a cluster."""
    from ray.experimental import internal_kv

    table: dict[str, bytes] = {}
    monkeypatch.setattr(internal_kv, "_internal_kv_put", lambda key, value, namespace: table.update({key: value}))
    monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda key, namespace: table.pop(key))
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, namespace: table.get(key))
    return table


def settled() -> None:
    """Wait for the threads that make marks and drop them."""
    for thread in threading.enumerate():
        if thread.name == "prefect-slo-mark":
            thread.join(10)


def test_a_mark_says_since_when_until_it_is_dropped(kept: dict[str, bytes]) -> None:
    before = time.time()
    drop = mark("bundle")
    settled()
    [since] = turns("bundle")
    assert before <= since <= time.time()
    drop()
    settled()
    assert turns("bundle") == []


def test_a_mark_is_dropped_after_it_was_made(monkeypatch: pytest.MonkeyPatch, kept: dict[str, bytes]) -> None:
    """Making one may take longer than its bundle."""
    from ray.experimental import internal_kv

    begun, put = threading.Event(), internal_kv._internal_kv_put

    def slowly(*args: Any, **options: Any) -> None:
        begun.wait(10)
        put(*args, **options)

    monkeypatch.setattr(internal_kv, "_internal_kv_put", slowly)
    mark("bundle")()
    begun.set()
    settled()
    assert turns("bundle") == []


@pytest.mark.parametrize(("last", "stays"), [(Finished(1, 1, 0.0, 1.0), False), (Lost(1, "died", ""), True)])
def test_only_a_bundle_that_is_finished_takes_its_mark_along(
    monkeypatch: pytest.MonkeyPatch, kept: dict[str, bytes], last: Any, stays: bool
) -> None:
    """Ray ends the processes of a worker before the worker: that one may still see it, and never send its reply."""
    monkeypatch.setattr(ray_cluster, "run_here", lambda *_: Reply((last,), "here", 0.0, 1.0))
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    work = Work("bundle", Bundle(1, "program", b"", ()), Size(1, 512), ())
    ray_cluster.run_apart(work, 0)
    settled()
    assert bool(turns("bundle")) is stays
