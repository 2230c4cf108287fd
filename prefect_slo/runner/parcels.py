"""Makes calls ready to travel: waits for nothing, replaces finished futures by states, pickles what has to be."""

from __future__ import annotations

import copyreg
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context
from dataclasses import replace
from typing import Any
from uuid import UUID

import cloudpickle
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.results import ResultRecord  # type: ignore[attr-defined]
from prefect.utilities.annotations import BaseAnnotation, quote
from prefect.utilities.collections import StopVisiting, visit_collection

from prefect_slo.control.events import Ready
from prefect_slo.plan import Record
from prefect_slo.runner import program
from prefect_slo.runner.backends.protocol import HostedProgram
from prefect_slo.runner.calls import Call, Payload
from prefect_slo.runner.deposits import KeptRecord, plain_record
from prefect_slo.runner.elsewhere import referred
from prefect_slo.runner.exceptions import portable
from prefect_slo.runner.futures import RaisedFuture
from prefect_slo.runner.hosted import FunctionProgram
from prefect_slo.runner.payloads import by_value, importable_by_workers
from prefect_slo.runner.shelf import Shelf
from prefect_slo.runner.variants import Variant


class Parcels:
    """Payloads and programs of one flow run.

    Args:
        run_key: Names the flow run.
        context: The flow's context.
        shelf_bytes: What results may take in memory that processes share.
    """

    def __init__(self, run_key: str, context: Context, shelf_bytes: float = 0.0) -> None:
        self._run_key, self._context = run_key, context
        self._shelf = Shelf(shelf_bytes)
        self._hosted: dict[int, HostedProgram] = {}
        self._flow_context: bytes | None = None
        self._elsewhere: dict[tuple[int, bool], bytes] = {}
        self._context_elsewhere: bytes | None = None

    def program(
        self, variant: Variant, *, isolated: bool, inline: bool, elsewhere: bool = False, apart: bool = False
    ) -> Any:
        """What a worker opens for the calls of a variant; ``apart``: results may stay where they are made.

        Raises:
            Exception: Whatever pickling the task, the flow or its parameters raises.
        """
        if not isolated:
            return program.ThreadProgram(inline=inline)
        if elsewhere:
            return self._by_value(variant, apart=apart)
        if variant.program is None:
            importable_by_workers(variant.task.fn)
            if self._flow_context is None:
                self._flow_context = self._context.copy().run(program.dump_context)
            opened = program.ProcessProgram(self._run_key, self._flow_context, cloudpickle.dumps(variant.task))
            variant.program = bytes(cloudpickle.dumps(opened))
        return variant.program

    def _by_value(self, variant: Variant, *, apart: bool) -> bytes:
        """What a worker on another machine opens, where the user's own modules are not installed."""
        key = (variant.ordinal, apart)
        if key not in self._elsewhere:
            with by_value():
                if self._context_elsewhere is None:
                    self._context_elsewhere = self._context.copy().run(program.dump_context, without_flow=True)
                dumped = cloudpickle.dumps(variant.task)
            opened = program.ProcessProgram(self._run_key, self._context_elsewhere, dumped, apart)
            self._elsewhere[key] = bytes(cloudpickle.dumps(opened))
        return self._elsewhere[key]

    def hosted(self, variant: Variant) -> HostedProgram:
        """What a backend whose workers have no Prefect hosts for the calls of a variant.

        Raises:
            Exception: Whatever pickling the function raises.
        """
        if variant.ordinal not in self._hosted:
            self._hosted[variant.ordinal] = FunctionProgram.of(variant.task)
        return self._hosted[variant.ordinal]

    def payload(
        self,
        calls: list[Call],
        record: Record,
        *,
        isolated: bool,
        here: bool = False,
        elsewhere: bool = False,
        leave: Callable[[Any], bytes] | None = None,
        place: object | None = None,
    ) -> Any:
        """Calls that run as one, as a worker takes them.

        Args:
            calls: The calls.
            record: Their record level.
            isolated: Whether the worker is another process.
            here: Whether it is one of this machine, which has files in common with this process.
            elsewhere: Whether it is on a machine that has none of the user's own modules.
            leave: Pickles arguments that hold results, where those may lie at the worker's own place.
            place: Where results may lie that workers fetch themselves, where they don't have Prefect.

        Raises:
            ResultLost: A result that lay elsewhere is gone.
            Exception: Whatever pickling the arguments raises.
        """
        if not isolated:
            ready = [_ready(call, isolated=False) for call in calls]
            if place is not None:
                ready = [
                    replace(one, parameters=referred(one.parameters, place)) if one.resolve else one for one in ready
                ]
            return calls[0].context, (calls[0].task, ready, record)
        kept: dict[int, str] = {}

        def found(future: PrefectFuture[Any]) -> None:
            value = _value_of(future)
            if value is not None and (name := self._shelf.keep(future.task_run_id, value)) is not None:
                kept[id(value)] = name

        ready = [_ready(call, isolated=True, found=found if here else None) for call in calls]
        return program.dump(ready, record, kept, by_value() if elsewhere else None, leave)

    def close(self) -> None:
        """Let go of what was kept for workers."""
        self._shelf.close()


def _value_of(future: PrefectFuture[Any]) -> Any:
    """The result that a finished future holds in this process; ``None`` where it holds none."""
    state = future.state
    if not state.is_completed():
        return None
    return state.data.result if isinstance(state.data, ResultRecord) else None


def _ready(call: Call, *, isolated: bool, found: Callable[[PrefectFuture[Any]], None] | None = None) -> Payload:
    """A call whose futures, all done, are states; those that hold an exception stay futures, for the engine to raise.

    On threads too: asked for its state, a future asks the API, which may still believe that it runs, and the engine
    would take it for this call's parent.
    """
    parameters, wait_for = call.parameters, call.wait_for
    if call.has_inputs:
        each = _only(call.mapped, found)
        parameters = {name: futures_to_states(v, isolated=isolated, each=each) for name, v in parameters.items()}
        wait_for = [_valueless(futures_to_states(value, isolated=isolated)) for value in wait_for or ()] or None
    return Payload(call.task_run_id, parameters, wait_for, call.dependencies, call.tags, call.has_inputs, call.late)


def pending(call: Call) -> list[PrefectFuture[Any]]:
    """Futures among a call's inputs that are not done."""
    found: dict[int, PrefectFuture[Any]] = {}

    def look(value: Any, context: dict[str, Any]) -> None:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        if isinstance(value, PrefectFuture) and not _is_done(value):
            found[id(value)] = value

    visit_collection([*call.parameters.values(), *(call.wait_for or ())], look, return_data=False, context={})
    return list(found.values())


def await_upstream(call: Call, then: Callable[[Ready], None]) -> bool:
    """Have ``then`` called, from any thread, when all that a call takes is done; false where it is already."""
    upstream = pending(call)
    remaining = [len(upstream)]
    lock = threading.Lock()

    def one_done(_: Any) -> None:
        with lock:
            remaining[0] -= 1
            last = remaining[0] == 0
        if last:
            call.ready = time.monotonic()
            then(Ready((call.item,)))

    for future in upstream:
        wrapped = getattr(future, "wrapped_future", None)  # its own callbacks may wait for each other
        (wrapped if isinstance(wrapped, Future) else future).add_done_callback(one_done)
    return bool(upstream)


def _only(
    mapped: frozenset[UUID], found: Callable[[PrefectFuture[Any]], None] | None
) -> Callable[[PrefectFuture[Any]], None] | None:
    """Hears of futures of these task runs alone; ``None`` where there are none."""
    if found is None or not mapped:
        return None
    return lambda future: found(future) if future.task_run_id in mapped else None


def futures_to_states(value: Any, *, isolated: bool, each: Callable[[PrefectFuture[Any]], None] | None = None) -> Any:
    """A parameter with futures (all done) replaced by their final states, annotations kept.

    Args:
        value: The parameter.
        isolated: Whether it goes to another process.
        each: Called with each future that is replaced.
    """

    def replace(found: Any, context: dict[str, Any]) -> Any:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        if isinstance(found, PrefectFuture):
            try:
                found.wait()
            except BaseException as error:
                return RaisedFuture(found.task_run_id, portable(error)) if isolated else found
            if each is not None:
                each(found)
            found = found.state
        if isolated and isinstance(found, State):
            return program.portable_result(found)
        return found

    return visit_collection(value, replace, return_data=True, max_depth=-1, context={})


def _valueless(awaited: Any) -> Any:
    """What a call only waits for, without values that stay elsewhere: they need not come for this."""

    def replace(found: Any, context: dict[str, Any]) -> Any:
        if isinstance(found, State) and isinstance(found.data, KeptRecord):
            return found.model_copy(update={"data": plain_record(None, found.data.metadata, persisted=False)})
        return found

    return visit_collection(awaited, replace, return_data=True, context={})


def _is_done(future: PrefectFuture[Any]) -> bool:
    wrapped = getattr(future, "wrapped_future", None)
    return wrapped.done() if isinstance(wrapped, Future) else future.state.is_final()


def _reduce(annotation: BaseAnnotation) -> tuple[Any, ...]:
    return type(annotation), (annotation.value,)


for _kind in BaseAnnotation.__subclasses__():
    # They are tuples with a constructor of their own, and come back from a pickle holding a tuple of their value.
    copyreg.pickle(_kind, _reduce)
