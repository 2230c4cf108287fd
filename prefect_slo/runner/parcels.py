"""Makes calls ready to travel: waits for nothing, replaces finished futures by states, pickles what has to be."""

from __future__ import annotations

from concurrent.futures import Future
from contextvars import Context
from typing import Any

import cloudpickle
from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection

from prefect_slo.plan import Record
from prefect_slo.runner import program
from prefect_slo.runner.calls import Call
from prefect_slo.runner.payloads import importable_by_workers


class Parcels:
    """Payloads and programs of one flow run.

    Args:
        run_key: Names the flow run.
        context: The flow's context.
    """

    def __init__(self, run_key: str, context: Context) -> None:
        self._run_key, self._context = run_key, context
        self._programs: dict[str, bytes] = {}
        self._flow_context: bytes | None = None

    def program(self, stage: str, call: Call, *, isolated: bool, inline: bool) -> Any:
        """What a worker opens for the calls of a stage.

        Raises:
            Exception: Whatever pickling the task, the flow or its parameters raises.
        """
        if not isolated:
            return program.ThreadProgram(inline=inline)
        if stage not in self._programs:
            importable_by_workers(call.task.fn)
            if self._flow_context is None:
                self._flow_context = self._context.copy().run(program.dump_context)
            opened = program.ProcessProgram(self._run_key, self._flow_context, cloudpickle.dumps(call.task))
            self._programs[stage] = bytes(cloudpickle.dumps(opened))
        return self._programs[stage]

    def payload(self, call: Call, record: Record, *, isolated: bool) -> Any:
        """One call as a worker takes it.

        Raises:
            Exception: Whatever pickling the arguments raises.
        """
        if not isolated:
            return (call, record)
        if not call.has_inputs:
            return program.dump_call(call, call.parameters, call.wait_for, record)
        parameters = {name: futures_to_states(value) for name, value in call.parameters.items()}
        wait_for = [futures_to_states(value) for value in call.wait_for] if call.wait_for else None
        return program.dump_call(call, parameters, wait_for, record)


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


def futures_to_states(value: Any) -> Any:
    """A parameter with futures (all done) replaced by their final states, annotations kept."""

    def replace(found: Any, context: dict[str, Any]) -> Any:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        if isinstance(found, PrefectFuture):
            found.wait()
            return found.state
        return found

    return visit_collection(value, replace, return_data=True, max_depth=-1, context={})


def _is_done(future: PrefectFuture[Any]) -> bool:
    wrapped = getattr(future, "wrapped_future", None)
    return wrapped.done() if isinstance(wrapped, Future) else future.state.is_final()
