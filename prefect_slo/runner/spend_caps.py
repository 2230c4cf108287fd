"""What one flow run may spend on one pool of AWS: a cap that all its calls share, its retries in this process too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from decimal import Decimal
from uuid import UUID

from prefect.context import FlowRunContext

from prefect_slo.aws.ownership import Owner
from prefect_slo.aws.spending import Caller, CappedCaller, SpendLimit

KEPT = 1000
"""Caps of so many flow runs are kept: a flow run that is retried has spent what its earlier attempts have."""

_lock = threading.Lock()
_caps: dict[tuple[UUID, Owner], SpendLimit] = {}


def cap_of(owner: Owner, max_spend_usd: float | None) -> SpendLimit | None:
    """The cap of the flow run that this is, on a pool.

    Args:
        owner: The pool's name for what is its own.
        max_spend_usd: What the pool says now; ``None`` for no cap.
    """
    if max_spend_usd is None:
        return None
    most_usd, context = Decimal(repr(max_spend_usd)), FlowRunContext.get()
    if context is None or context.flow_run is None:
        return SpendLimit(most_usd)
    with _lock:
        cap = _caps.setdefault((context.flow_run.id, owner), SpendLimit(most_usd))
        cap.most_usd = most_usd
        while len(_caps) > KEPT:
            del _caps[next(iter(_caps))]
    return cap


def capped(caller: Caller, cap: SpendLimit | None, worst_usd: Callable[[str], Decimal]) -> Caller:
    """A caller under a cap, where there is one; ``worst_usd`` is what a call of a function can cost at most."""
    return caller if cap is None else CappedCaller(caller, cap, worst_usd)
