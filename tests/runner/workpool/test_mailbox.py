"""Messages through storage: in order, whole or not at all, cleared up; clocks of two machines brought together."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.filesystems import LocalFileSystem

from prefect_slo.errors import InvalidValue
from prefect_slo.runner.workpool.mailbox import BEAT, Heart, Incoming, Offset, Outgoing, Pulse, sealed, unsealed
from prefect_slo.runner.workpool.stores import FolderStore, FsspecStore, Store, referred, store_of
from prefect_slo.testing.aws import local_aws


@pytest.fixture(params=["folder", "s3", "fsspec"])
def store(request, tmp_path):
    if request.param == "s3":
        with local_aws(packages=None) as account:
            yield store_of(account.bucket)
    else:
        yield store_of({"folder": tmp_path / "boxes", "fsspec": f"memory://{tmp_path}"}[request.param])


def test_messages_arrive_in_order_and_once(store: Store):
    out, incoming = Outgoing(store, "box", "to"), Incoming(store, "box", "to")
    assert incoming.receive() is None
    for message in ("first", ("second", b"x" * 100_000)):
        out.send(message)
    assert [incoming.receive() for _ in range(3)] == ["first", ("second", b"x" * 100_000), None]
    out.send("third")
    assert incoming.receive() == "third"


def test_a_message_that_cannot_be_discarded_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = store_of(tmp_path / "boxes")
    out, incoming = Outgoing(store, "box", "to"), Incoming(store, "box", "to")
    out.send("first")
    out.send("second")

    def refuse(self: FolderStore, box: str, name: str) -> None:
        raise PermissionError(name)

    monkeypatch.setattr(FolderStore, "discard", refuse)
    assert [incoming.receive() for _ in range(3)] == ["first", "second", None]


def test_what_a_full_disk_has_taken_of_a_message_does_not_stay(tmp_path: Path):
    store, said = FolderStore(str(tmp_path / "boxes")), tmp_path / "said"
    store.write("box", "beat", b"1")
    if not (fork := os.fork()):  # a limit holds for all threads of a process
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            store.write("box", "from-1", bytes(20_000))
        except OSError as error:
            said.write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(fork, 0)
    assert "too large" in said.read_text()
    assert [path.name for path in (tmp_path / "boxes" / "box").iterdir()] == ["beat"]


def test_directions_and_boxes_do_not_mix(store: Store):
    Outgoing(store, "box/a", "to").send("a")
    assert Incoming(store, "box/b", "to").receive() is None
    assert Incoming(store, "box/a", "from").receive() is None
    assert Incoming(store, "box/a", "to").receive() == "a"


def test_a_cleared_box_is_empty_and_others_are_not(store: Store):
    for box in ("office/a", "office/b"):
        store.write(box, "beat", b"1")
    store.clear("office/a")
    store.clear("office/a")
    assert store.read("office/a", "beat") is None
    assert store.read("office/b", "beat") == b"1"


def test_a_heart_that_cannot_write_says_so_and_goes_on_beating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, written = FolderStore(str(tmp_path)), SimpleQueue[bytes]()
    write = FolderStore.write

    def at_times(self: FolderStore, box: str, name: str, data: bytes) -> None:
        written.put(data)
        if data in (b"2", b"3"):
            raise PermissionError(name)
        write(self, box, name, data)

    monkeypatch.setattr(FolderStore, "write", at_times)
    missed: list[Exception] = []
    heart = Heart(store, "box", 0.001, missed=missed.append)
    signs = [written.get(timeout=60) for _ in range(4)]
    heart.stop()
    heart.join(60)
    assert signs == [b"1", b"2", b"3", b"4"]
    assert [type(error) for error in missed] == [PermissionError], "told once for as long as it lasts"
    last = signs[-1]
    while not written.empty():
        last = written.get()
    assert store.read("box", BEAT) == last


def test_a_job_finds_the_store_by_plain_json(store: Store):
    store.write("box", "name", b"here")
    assert referred(json.loads(json.dumps(store.reference))).read("box", "name") == b"here"


def test_half_a_message_is_none(tmp_path: Path):
    store = FolderStore(str(tmp_path))
    whole = sealed(("run", b"0123456789"))
    for length in range(len(whole)):
        assert unsealed(whole[:length]) is None
    assert unsealed(whole[:-1] + b"?") is None
    incoming = Incoming(store, "box", "to")
    store.write("box", "to-00000001", whole[:20])
    assert incoming.receive() is None
    store.write("box", "to-00000001", whole)
    assert incoming.receive() == ("run", b"0123456789")


def test_a_read_message_leaves_nothing_behind(tmp_path: Path):
    store = FolderStore(str(tmp_path / "boxes"))
    out, incoming = Outgoing(store, "office/box", "to"), Incoming(store, "office/box", "to")
    out.send("message")
    incoming.receive()
    assert [path for path in (tmp_path / "boxes").rglob("*") if path.is_file()] == []
    store.clear("office/box")
    assert list((tmp_path / "boxes").iterdir()) == []


@pytest.mark.parametrize("value", [None, "", 7, object()])
def test_what_is_no_storage_is_refused(value):
    with pytest.raises(InvalidValue, match="storage"):
        store_of(value)


def test_blocks_and_addresses_are_storage(tmp_path: Path):
    assert store_of(LocalFileSystem(basepath=str(tmp_path))) == FolderStore(str(tmp_path))
    assert store_of(tmp_path) == store_of(str(tmp_path)) == FolderStore(str(tmp_path))
    assert store_of("gs://bucket/runs/") == FsspecStore(address="gs://bucket/runs")


@given(
    shift=st.floats(-1e6, 1e6),
    ways=st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=5),
)
def test_the_clocks_of_two_machines_are_brought_together_as_well_as_ways_allow(shift, ways):
    """A clock that is ahead by ``shift``: the guess is wrong by at most the quickest round trip."""
    offset, now = Offset(), 1000.0
    for there, back in ways:
        offset.sent(now, now + there + shift)
        offset.received(now + there + back, now + there + shift)
        now += 10
    assert abs(offset.seconds + shift) <= min(there for there, _ in ways) + min(back for _, back in ways) + 1e-6


def test_one_machines_clock_is_taken_as_it_is():
    offset = Offset()
    offset.sent(10.0, 10.2)
    offset.received(10.9, 10.5)
    assert offset.seconds == 0.0


def test_a_pulse_is_silent_since_it_last_changed():
    pulse = Pulse(100.0)
    assert pulse.silent_s(None, 101.0) == 1.0
    assert pulse.silent_s(b"1", 102.0) == 0.0
    assert pulse.silent_s(b"1", 105.0) == 3.0
    assert pulse.silent_s(None, 106.0) == 4.0
    assert pulse.silent_s(b"2", 107.0) == 0.0
