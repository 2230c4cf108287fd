"""Events and logs of worker processes travel to the flow's process, which has the one connection to Prefect's API.

Workers hand each event over at once instead of through an events service of their own: that saves a thread, a
connection and about half a millisecond an event.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextvars import Context
from typing import Any

from prefect.events import Event
from prefect.events.worker import EventsWorker, ProcessPoolForwardingEventsClient
from prefect.logging.handlers import APILogWorker, set_api_log_sink

Emit = Callable[[bytes], None]


def _unheard(_: bytes) -> None:
    """Before a program is opened there is nobody to send to."""


class _Relay:
    """Stands where an events service stands in a process with its own connection."""

    client_type = ProcessPoolForwardingEventsClient

    def __init__(self) -> None:
        self.emit: Emit = _unheard

    def send(self, event: Event) -> None:
        self.emit(pickle.dumps(("event", event.model_dump_json())))

    def log(self, record: dict[str, Any]) -> None:
        self.emit(pickle.dumps(("log", record)))

    def wait_until_empty(self) -> None:
        """Nothing is queued here."""


_RELAY = _Relay()


def send_through(emit: Emit) -> None:
    """From now on, send this process's events and logs through ``emit``."""
    if _RELAY.emit is _unheard:
        EventsWorker.instance = classmethod(lambda cls, *_, **__: _RELAY)  # type: ignore[method-assign, assignment]
        set_api_log_sink(_RELAY.log)
    _RELAY.emit = emit


def receive(payload: bytes, context: Context) -> None:
    """Pass on what a worker sent, in the context of the flow run: Prefect adds the run's own resources to events."""
    kind, content = pickle.loads(payload)
    if kind == "event":
        event = Event.model_validate_json(content)
        context.run(EventsWorker.instance().send, event)
    else:
        APILogWorker.instance().send(content)
