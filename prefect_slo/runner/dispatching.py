"""What becomes of a dispatch: its calls go off as a bundle, but for those that have to wait or can't travel.

A call that lacks a result which lies elsewhere is put aside until that has come; the scheduler hears of either kind.
"""

from __future__ import annotations

import time

from prefect_slo.control import StageRule
from prefect_slo.control import events as control
from prefect_slo.runner.calls import Call
from prefect_slo.runner.leases import Leases, Sent
from prefect_slo.runner.measure import Measure
from prefect_slo.runner.packing import Packer
from prefect_slo.runner.remaking import Remaking
from prefect_slo.runner.supplies import Look, Supplies
from prefect_slo.runner.under_way import CallsUnderWay


class Dispatcher:
    """Sends the calls of one flow run to their leases. For the session's thread.

    Args:
        calls: Those under way.
        leases: Take bundles.
        packer: Makes bundles.
        supplies: Sees to what calls lack.
        remaking: Notes how results that stay elsewhere can be made again.
        measure: Hears of each bundle.
        look: Called with a call that takes a lost result which nobody could see to.
    """

    def __init__(
        self,
        calls: CallsUnderWay,
        leases: Leases,
        packer: Packer,
        supplies: Supplies,
        remaking: Remaking,
        measure: Measure,
        *,
        look: Look,
    ) -> None:
        self._calls, self._leases, self._packer, self._supplies = calls, leases, packer, supplies
        self._remaking, self._measure, self._look = remaking, measure, look

    def waits(self, call: Call, rule: StageRule) -> bool:
        """Whether a call of a stage has to wait for results that it takes; they are seen to."""
        if not call.has_inputs:
            return False
        records = self._supplies.lacking(call, self._place(call, rule.pool))
        if records:
            self._supplies.order(call.item, records)
        return bool(records)

    def dispatch(self, action: control.Dispatch, rule: StageRule) -> list[control.Event]:
        """Send a bundle on its way, under its stage's rule; what the scheduler has to hear of what does not go."""
        begun, pool = time.monotonic(), self._leases.pool_of(action.lease)
        assert pool is not None
        calls = [self._calls[item] for item in action.items]
        place, can = self._place(calls[0], pool), self._leases.capabilities(pool)
        lacking = {call.item: lacks for call in calls if (lacks := self._supplies.lacking(call, place))}
        calls = [call for call in calls if call.item not in lacking]
        packed = self._packer.pack(action, calls, rule, pool, place, can) if calls else None
        heard: list[control.Event] = []
        if packed is not None:
            for item, error in packed.stuck.items():
                self._calls.stuck(item, error)
            if packed.stuck:
                heard.append(control.Rejected(action.lease, tuple(packed.stuck), ran=False))
            for item, lost in packed.lost.items():
                lacking[item] = self._supplies.lacking(self._calls[item], place)
                if not lacking[item]:  # it is hidden in something, where nobody looks for it
                    self._look(item, lost)
        if lacking:
            heard.append(control.Postponed(action.lease, tuple(lacking)))
        for item, records in lacking.items():
            if records:
                self._supplies.order(item, records)
        if packed is None or packed.bundle is None:
            return [*heard, control.BundleDone(action.lease, 0.0)]
        if packed.bundle.keep is not None:
            for call in calls:
                call.origin = self._remaking.origin(call, (call.kind or rule).loss_retries)
        self._calls.sent(action.items, packed.record)
        ready = min(call.ready for call in calls)
        self._measure.dispatched(action.lease, action.bundle, begun, ready, packed.bundle.weight)
        sent = Sent(action.bundle, tuple(call.item for call in calls), packed.batches)
        self._leases.send(action.lease, packed.bundle, sent)
        return heard

    def _place(self, call: Call, pool: str) -> object:
        """Where results have to be that a call takes on a pool."""
        return self._leases.place(pool, valueless=call.variant.valueless)
