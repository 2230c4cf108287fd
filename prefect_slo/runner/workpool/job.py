"""What a job in a work pool loads by its name: the flow ``pilot``, and with it a zygote for the pilot's worker.

Prefect's engine loads the flow in its main thread, before it starts any other, and has imported Prefect by then: a fork
of it at that moment is a zygote that took milliseconds, where an interpreter of its own takes as long as the engine
took to start. Where the engine has threads already there is none, and the worker starts as it does anywhere else.

The flow is deployed by the name of this module, so that no code has to be stored.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

FLOW = "slo-pilot"
ENTRYPOINT = f"{__name__}.pilot"


def __getattr__(name: str) -> Any:
    """The flow, when the job asks for it."""
    if name != "pilot":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prefect_slo.runner.local.launch import Forker
    from prefect_slo.runner.preload import PRELOAD

    # first of all: what is imported from here on, the two import side by side
    zygote = Forker.forked(PRELOAD, _forget) if os.environ.get("PREFECT__FLOW_RUN_ID") else None
    from prefect import flow

    from prefect_slo.runner.workpool.pilot import Order, Pilot

    @flow(name=FLOW, persist_result=False)
    def pilot(order: dict[str, Any]) -> str:
        """Run bundles for another flow; returns why it ended."""
        return Pilot(Order(**order), zygote).serve()

    globals()[name] = pilot
    return pilot


def _forget() -> None:
    """Leave the line on which the job's supervisor cancels it to the job: flows in tasks would take it for theirs."""
    with suppress(ImportError, AttributeError):
        from prefect._internal.control_listener import stop

        stop()
