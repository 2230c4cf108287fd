"""Events and logs of worker processes travel to the flow's process, which has the one connection to Prefect's API.

Workers hand each event over as finished JSON, instead of through an events service of their own: that saves a thread
and a connection in each of them. The flow's process adds what Prefect adds there (the flow run, its flow, deployment
and tags, read once) and writes it to the socket as it is: validating and dumping it again would cost three times what
the task run itself costs here.
"""

from __future__ import annotations

import json
import pickle
import queue
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect.context import TaskRunContext
from prefect.events import Event
from prefect.events.related import related_resources_from_run_context
from prefect.events.worker import EventsWorker, ProcessPoolForwardingEventsClient
from prefect.logging import get_logger
from prefect.logging.handlers import APILogWorker, set_api_log_sink
from prefect.utilities.context import temporary_context

Emit = Callable[[bytes], None]

# ---- in a worker ----------------------------------------------------------------------------------------------------


def _unheard(_: bytes) -> None:
    """Before a program is opened there is nobody to send to."""


class _Relay:
    """Stands where an events service stands in a process with its own connection."""

    client_type = ProcessPoolForwardingEventsClient

    def __init__(self) -> None:
        self.emit: Emit = _unheard

    def send(self, event: Event) -> None:
        related = [dict(resource.root) for resource in event.related]
        taken = {event.resource.id, *(resource["prefect.resource.id"] for resource in related)}
        for resource in _task_run_around():
            if resource["prefect.resource.id"] in taken:
                break  # an event of the task run itself
            related.append(resource)
            taken.add(resource["prefect.resource.id"])
        body = event.model_dump_json(exclude={"related"})
        self.emit(pickle.dumps(("event", event.id, body, [json.dumps(item) for item in related], taken)))

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


def _task_run_around() -> list[dict[str, str]]:
    """The task run that this code runs in, and its tags, as related resources."""
    context = TaskRunContext.get()
    if context is None:
        return []
    run = context.task_run
    itself = {"prefect.resource.id": f"prefect.task-run.{run.id}", "prefect.resource.role": "task-run"}
    tags = [
        {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in sorted(run.tags or ())
    ]
    return [{**itself, "prefect.resource.name": run.name}, *tags]


# ---- in the flow's process ------------------------------------------------------------------------------------------


@dataclass
class FlowRunEvents:
    """Events of one flow run's workers.

    Attributes:
        context: The flow's context, for its related resources.
    """

    context: Context
    _related: dict[str, str] | None = None
    _forwarder: _Forwarder | None = None

    def receive(self, payload: bytes) -> None:
        """Pass on what a worker sent."""
        kind, *content = pickle.loads(payload)
        if kind == "log":
            APILogWorker.instance().send(*content)
        else:
            if self._forwarder is None or self._forwarder._stopped:
                self._forwarder = _Forwarder.instance()
            self._forwarder.send(_Relayed(self, *content))  # type: ignore[arg-type]

    async def related(self, client: Any) -> dict[str, str]:
        """The flow run's related resources as JSON, by their ids."""
        if self._related is None:
            self._related = {}
            try:
                with temporary_context(self.context):
                    found = await related_resources_from_run_context(client=client)
                self._related = {resource.id: json.dumps(resource.root) for resource in found}
            except Exception:
                get_logger("slo").warning("Events of workers lack the resources of their flow run.", exc_info=True)
        return self._related


@dataclass(repr=False)
class _Relayed:
    """An event as its worker wrote it, without its related resources; has what Prefect's client asks of an event."""

    run: FlowRunEvents
    id: UUID
    body: str
    related: list[str]
    taken: set[str]
    whole: str = field(default="", init=False)

    def model_dump_json(self) -> str:
        return self.whole

    def __repr__(self) -> str:
        return f"<event {self.id}>"  # Prefect logs one whenever the socket breaks: its body would fill a page


class _Forwarder(EventsWorker):
    """Writes finished events to the socket, as many as there are at once: a hop between threads for each adds up."""

    def _prepare_item(self, event: Any) -> Any:
        return event

    def _on_item_dropped(self, item: Any) -> None:
        """Nothing was allocated for it."""

    async def _handle(self, event: Any) -> None:
        await self._forward(event)
        while True:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                return
            try:
                if following is None:  # the service is told to stop, once this is done
                    self._queue.put_nowait(None)
                    return
                await self._forward(following)
            finally:
                self._queue.task_done()

    async def _forward(self, event: Any) -> None:
        related = await event.run.related(self._orchestration_client)
        added = [text for resource_id, text in related.items() if resource_id not in event.taken]
        event.whole = f'{event.body[:-1]},"related":[{",".join(event.related + added)}]}}'
        await self._client.emit(event)
