"""From a dispatch to a bundle: calls pickled as the worker of a lease takes them, and those that can't travel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prefect_slo.control import StageRule
from prefect_slo.control import events as control
from prefect_slo.errors import ResultLost
from prefect_slo.plan import Record
from prefect_slo.runner.apart import dump_call
from prefect_slo.runner.backends import protocol
from prefect_slo.runner.backends.protocol import Bundle
from prefect_slo.runner.calls import Call
from prefect_slo.runner.parcels import Parcels
from prefect_slo.runner.pools import PROCESS

GRACE_S = 30.0
"""What an attempt has at least beyond its task's own timeout, which counts the function alone: arguments have to be
unpickled, inputs resolved, results written. Only what hangs for longer has its worker killed."""


@dataclass(frozen=True)
class Packed:
    """What came of a dispatch.

    Attributes:
        bundle: To be submitted; ``None`` where nothing is left to be sent.
        record: Record level of its calls.
        batches: Items that run as one, by the first of them.
        stuck: Items that can't travel, and why.
        lost: Items that take a result which is lost.
    """

    bundle: Bundle | None
    record: Record
    batches: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    stuck: Mapping[int, BaseException] = field(default_factory=dict)
    lost: Mapping[int, ResultLost] = field(default_factory=dict)


class Packer:
    """Makes the bundles of one flow run.

    Args:
        run_key: Names the flow run.
        parcels: Its payloads and programs.
        level: Record level of the bundle that a call is in.
        stays: Whether results of a stage may stay where they are made, where its pool can keep them.
    """

    def __init__(
        self, run_key: str, parcels: Parcels, level: Callable[[Call], Record], stays: Callable[[str], bool]
    ) -> None:
        self._run_key, self._parcels, self._level, self._stays = run_key, parcels, level, stays

    def pack(
        self,
        dispatch: control.Dispatch,
        calls: list[Call],
        rule: StageRule,
        pool: str,
        place: object,
        can: protocol.Capabilities,
    ) -> Packed:
        """The bundle of some calls of a dispatch, all of one kind.

        Args:
            dispatch: The dispatch.
            calls: Those of its calls that lack nothing; at least one.
            rule: Of its stage.
            pool: Of its lease.
            place: Where that pool's workers find what its backend keeps.
            can: What that backend can promise.
        """
        isolated = can.isolated and not can.hosted
        record = self._level(calls[0])
        variant, batch = calls[0].variant, (calls[0].kind or rule).batch if record != "full" else 1
        where = {"isolated": isolated, "here": pool == PROCESS, "elsewhere": can.elsewhere}
        parts: list[protocol.Kept] = []
        leave = partial(dump_call, place=place, parts=parts) if can.keeps is not None else None
        fetched = place if can.hosted and can.keeps is not None and variant.valueless else None
        items: list[tuple[int, Any]] = []
        batches: dict[int, tuple[int, ...]] = {}
        stuck: dict[int, BaseException] = {}
        lost: dict[int, ResultLost] = {}
        for first in range(0, len(calls), batch):
            together = calls[first : first + batch]
            named = tuple(call.item for call in together)
            try:
                payload = self._parcels.payload(together, record, leave=leave, place=fetched, **where)
            except ResultLost as error:
                lost |= dict.fromkeys(named, error)
                continue
            except BaseException as error:
                stuck |= dict.fromkeys(named, error)
                continue
            items.append((named[0], payload))
            if len(named) > 1:
                batches[named[0]] = named
        opened: Any = None
        if items:
            try:
                if can.hosted:
                    opened = self._parcels.hosted(variant)
                else:
                    apart, inline = can.keeps is not None, rule.workers is not None
                    opened = self._parcels.program(
                        variant, isolated=isolated, inline=inline, elsewhere=can.elsewhere, apart=apart
                    )
            except BaseException as error:
                stuck, items = {call.item: error for call in calls if call.item not in lost}, []
        bundle = Bundle(
            dispatch.bundle,
            f"{self._run_key}/{variant.ordinal if isolated or can.hosted else dispatch.stage}",
            opened,
            tuple(items),
            timeout_s=_hard_limit(calls) if can.hard_timeouts and not can.hosted else None,
            parts=tuple(parts),
            keep=can.keeps if (variant.valueless if can.hosted else self._stays(dispatch.stage)) else None,
        )
        return Packed(bundle if items else None, record, batches, stuck, lost)


def _hard_limit(calls: list[Call]) -> float | None:
    """Seconds after which a call of the bundle can only hang: every attempt has had its timeout, and time to notice.

    A tagged call may rightly wait for a concurrency slot for ever: it has no limit.
    """
    task = calls[0].task
    if not task.timeout_seconds or task.tags or any(call.tags for call in calls):
        return None
    delays = task.retry_delay_seconds
    each = delays if isinstance(delays, list) else [delays or 0.0]
    waits = sum(float(each[min(i, len(each) - 1)]) for i in range(task.retries)) if each else 0.0
    grace_s = max(GRACE_S, task.timeout_seconds)
    return (task.retries + 1) * (task.timeout_seconds + grace_s) + waits * (1 + (task.retry_jitter_factor or 0.0))
