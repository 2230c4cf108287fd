"""Messages arrive as they were sent, whatever the pieces they travel in."""

from __future__ import annotations

import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.runner.local.wire import Backlog, Decoder, encode, lift, send_all


class Drip:
    """A socket that delivers a stream a few bytes at a time."""

    def __init__(self, data, sizes):
        self.data, self.sizes = memoryview(data), sizes

    def _take(self, most):
        size = min(most, self.sizes.pop(0) if self.sizes else most, len(self.data))
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def recv(self, most):
        return bytes(self._take(most))

    def recv_into(self, view):
        taken = self._take(len(view))
        view[: len(taken)] = taken
        return len(taken)


def stream(messages):
    return b"".join(bytes(buffer) for message in messages for buffer in encode(message))


def receive_all(source):
    decoder, messages = Decoder(), []
    while (received := decoder.receive(source)) is not None:
        messages += received
    return messages


@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(1, 60), max_size=60))
def test_messages_survive_any_cut_of_the_stream(payloads, sizes):
    messages = [("item", index, payload) for index, payload in enumerate(payloads)]
    assert receive_all(Drip(stream(messages), sizes)) == messages


@pytest.mark.parametrize("size", [0, 1, 64 * 1024 - 1, 64 * 1024, 300_000, 3_000_000])
def test_payloads_of_all_sizes_arrive_as_bytes(size):
    payload = os.urandom(size)
    messages = [("before",), ("large", lift(payload), lift(payload)), ("after",)]
    received = receive_all(Drip(stream(messages), []))
    assert received == [("before",), ("large", payload, payload), ("after",)]
    assert [type(field) for field in received[1]] == [str, bytes, bytes]


def test_large_payloads_are_not_copied_into_the_frame():
    payload = os.urandom(1 << 20)
    head, aside = encode((lift(payload),))
    assert len(head) < 200
    assert aside.obj is payload


def test_a_backlog_is_written_as_far_as_the_socket_takes_it():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        backlog, payload = Backlog(), os.urandom(5_000_000)
        backlog.extend(encode(("large", lift(payload))))
        received = []
        reader = threading.Thread(target=lambda: received.extend(_receive(theirs, 1)))
        backlog.send(ours)
        assert backlog
        with pytest.raises(BlockingIOError):
            _send_all_at_once(backlog, ours)
        reader.start()
        ours.setblocking(True)
        while backlog:
            backlog.send(ours)
        reader.join(30)
        assert received == [("large", payload)]


def test_two_ends_that_send_much_at_once_do_not_wait_for_each_other_when_both_read():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        payload = os.urandom(20_000_000)
        received = {}
        readers = [
            threading.Thread(target=lambda end=end: received.update({end: _receive(end, 1)})) for end in (ours, theirs)
        ]
        writers = [threading.Thread(target=send_all, args=(end, encode(lift(payload)))) for end in (ours, theirs)]
        for thread in readers + writers:
            thread.start()
        for thread in readers + writers:
            thread.join(30)
        assert received == {ours: [payload], theirs: [payload]}


def _send_all_at_once(backlog, sock):
    while backlog:
        backlog.send(sock)


def _receive(sock, count):
    decoder, messages = Decoder(), []
    while len(messages) < count:
        messages += decoder.receive(sock)
    return messages
