"""The state machine that runs a flow by its plan: which items go to which worker, when, and in what bundles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count

from prefect_slo.control import item_times, losses
from prefect_slo.control.allowance import Allowance
from prefect_slo.control.events import (
    Action,
    Barred,
    BundleDone,
    Cancel,
    CancelBundle,
    Closed,
    CloseLease,
    Dispatch,
    Ending,
    Event,
    ItemDone,
    Kind,
    LeaseLost,
    LeaseUp,
    Notice,
    OpenLease,
    PlanChanged,
    Postponed,
    Ready,
    Rejected,
    SetTimer,
    Settle,
    StageRule,
    Submitted,
    Timer,
)
from prefect_slo.control.stages import Lease, Stage
from prefect_slo.resources import Capacity

LINGER_S = 0.05
"""An idle lease is kept this long for the stage's next item, unless another stage needs the room."""


class Scheduler:
    """Turns events into actions.

    Every submitted item is settled exactly once; nothing is sent to a lease that is not up and idle; once ``Closed``
    and everything has been settled, no lease is left.

    Args:
        capacity: By pool, what the leases of this run may hold together; a missing pool means no limit. Other runs on
            the machine are the backend's matter.
    """

    def __init__(self, capacity: Mapping[str, Capacity] | None = None) -> None:
        self._allowance = Allowance(capacity or {})
        self._stages: dict[str, Stage] = {}
        self._leases: dict[int, Lease] = {}
        self._stage_of: dict[int, str] = {}
        self._attempts: dict[int, int] = {}
        self._unwanted: set[int] = set()
        self._lease_ids, self._bundle_ids = count(1), count(1)
        self._closing = self._ending = False  # told so; and not to wait for what was submitted
        self._timer_at: float | None = None
        self._out: list[Action] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about ``event``, in order. ``now`` is any clock that doesn't go back, in seconds."""
        self._out = []
        match event:
            case ItemDone(lease, items):
                self._items_done(lease, items)
                return self._out  # its lease is still busy: nothing can be dispatched
            case Submitted(stage, items, ready, kind):
                self._submit(stage, items, ready, kind)
            case Ready(items):
                self._enqueue(items)
            case BundleDone(lease, busy_s):
                self._bundle_done(lease, busy_s, now)
            case LeaseUp(lease):
                self._lease_up(lease, now)
            case LeaseLost():
                self._lease_lost(event)
            case Rejected(lease, items, ran):
                self._rejected(lease, items, ran)
            case Postponed(lease, items):
                self._postponed(lease, items)
            case Barred(items):
                self._settle(items, "done")
            case PlanChanged(stage, rule):
                self._plan_changed(stage, rule)
            case Timer():
                self._timer_at = None
            case Cancel(items):
                self._cancel(items)
            case Closed(at_once):
                self._close(at_once)
        self._advance(now)
        return self._out

    @property
    def unsettled(self) -> int:
        """Items submitted and not yet settled."""
        return len(self._stage_of)

    @property
    def leased(self) -> int:
        """Leases not yet closed."""
        return len(self._leases)

    # ---- what happened ----------------------------------------------------------------------------------------------

    def _submit(self, stage: str, items: tuple[int, ...], ready: bool, kind: Kind | None) -> None:
        self._stage_of.update(dict.fromkeys(items, stage))
        if kind is not None:
            self._stages[stage].kinds.update(dict.fromkeys(items, kind))
        if self._ending:
            self._settle(items, "cancelled")
        elif ready:
            self._stages[stage].queue.extend(items)

    def _enqueue(self, items: Iterable[int]) -> None:
        for item in items:
            if item in self._stage_of:
                self._stages[self._stage_of[item]].queue.append(item)

    def _items_done(self, lease_id: int, items: tuple[int, ...]) -> None:
        if (lease := self._leases.get(lease_id)) is not None:
            ended = lease.take(items)
            lease.done += len(ended)
            self._stages[lease.stage].failures = 0
            self._settle(ended, "done")

    def _bundle_done(self, lease_id: int, busy_s: float, now: float) -> None:
        if (lease := self._leases.get(lease_id)) is None:
            return
        stage = self._stages[lease.stage]
        if lease.done and stage.serves(lease):
            stage.item_s = item_times.smoothed(stage.item_s, busy_s, lease.done)
        self._settle(lease.take(tuple(lease.pending)), "died")  # never reported, and never will be
        self._set_idle(lease_id, lease, stage, now)

    def _lease_up(self, lease_id: int, now: float) -> None:
        if (lease := self._leases.get(lease_id)) is not None:
            stage = self._stages[lease.stage]
            lease.up, stage.opening = True, stage.opening - 1
            self._set_idle(lease_id, lease, stage, now)

    def _set_idle(self, lease_id: int, lease: Lease, stage: Stage, now: float) -> None:
        lease.done, lease.idle_since = 0, now
        stage.idle[lease_id] = None
        if self._ending or stage.spare() or not stage.serves(lease):
            self._close_lease(lease_id)

    def _lease_lost(self, lost: LeaseLost) -> None:
        if (lease := self._leases.get(lost.lease)) is None:
            return
        self._drop(lost.lease)
        reason = lost.reason
        stage = self._stages[lease.stage]
        never_ran = set(lease.pending if reason == "start" else lost.untouched)
        if reason == "memory" and stage.rule.ladder and stage.serves(lease):
            self._change_rule(stage, losses.grown(stage.rule))
            self._out.append(Notice(stage.name, "grown", str(stage.rule.size)))
        again: list[int] = []
        for item in lease.pending:
            if item in never_ran:
                again.append(item)
                continue
            attempts = self._attempts[item] = self._attempts.get(item, 0) + 1
            rule = stage.kinds.get(item) or lease.rule
            larger = bool(lease.rule.ladder)
            if losses.verdict(rule, reason, attempts, larger=larger) == "again" and not self._dropped(item):
                again.append(item)
                self._out.append(Notice(stage.name, "retried", reason))
            else:
                self._settle((item,), reason, attempts)
        self._settle([item for item in again if self._dropped(item)], "cancelled")
        stage.put_back([item for item in again if item in self._stage_of])
        unused = bool(lease.pending) and never_ran.issuperset(lease.pending) and not lost.inputs_gone
        if reason == "start" or unused:
            self._never_started(stage, lease)

    def _never_started(self, stage: Stage, lease: Lease) -> None:
        """A worker was lost before it ran anything; after a few in a row the stage goes elsewhere or is given up."""
        if not stage.serves(lease):
            return
        stage.failures += 1
        if stage.failures < losses.START_ATTEMPTS:
            return
        if stage.rule.fallback is not None:
            self._fall_back(stage, "its workers do not start")
        else:
            self._settle(tuple(stage.queue), "start")
            stage.queue.clear()

    def _rejected(self, lease_id: int, items: tuple[int, ...], ran: bool) -> None:
        if (lease := self._leases.get(lease_id)) is None:
            return  # its loss has dealt with them
        stage = self._stages[lease.stage]
        stuck = lease.take(items)
        self._settle([item for item in stuck if self._dropped(item)], "unpicklable" if ran else "cancelled")
        stuck = [item for item in stuck if item in self._stage_of]
        if not stuck:
            return
        moved = lease.rule.pool != stage.rule.pool  # the stage has fallen back since these were sent
        if stage.rule.fallback is None and not moved:
            self._settle(stuck, "unpicklable")
            return
        once = [item for item in stuck if ran and not stage.treatment(item).rerun_unpicklable]
        self._settle(once, "unpicklable")
        stuck = [item for item in stuck if item in self._stage_of]
        if not stuck:
            return
        if not moved:
            self._fall_back(stage, "its results do not pickle" if ran else "its arguments do not pickle")
        stage.put_back(stuck)

    def _postponed(self, lease_id: int, items: tuple[int, ...]) -> None:
        if (lease := self._leases.get(lease_id)) is not None:
            self._settle([item for item in lease.take(items) if self._dropped(item)], "cancelled")

    def _fall_back(self, stage: Stage, why: str) -> None:
        self._change_rule(stage, losses.fallen_back(stage.rule))
        self._out.append(Notice(stage.name, "fallback", why))

    def _plan_changed(self, name: str, rule: StageRule) -> None:
        if (stage := self._stages.get(name)) is None:
            self._stages[name] = Stage(name, rule)
        else:
            self._change_rule(stage, rule)

    def _change_rule(self, stage: Stage, rule: StageRule) -> None:
        """Treat a stage by another rule; leases that run nothing and are of no more use are given back."""
        if rule.pool != stage.rule.pool or rule.size != stage.rule.size:
            stage.item_s, stage.failures = None, 0
        stage.rule = rule
        for lease_id, lease in tuple(stage.leases.items()):
            if not stage.serves(lease) and (lease_id in stage.idle or not lease.up):
                self._close_lease(lease_id)

    def _cancel(self, items: tuple[int, ...] | None) -> None:
        """Drop what waits; end a bundle unless it holds an item that is still wanted."""
        self._unwanted.update(item for item in (self._stage_of if items is None else items) if item in self._stage_of)
        self._drop_waiting(self._unwanted)
        for lease_id, lease in self._leases.items():
            if lease.pending and self._unwanted.issuperset(lease.pending):
                self._out.append(CancelBundle(lease_id))

    def _close(self, at_once: bool) -> None:
        self._closing = True
        if not at_once:
            return
        self._ending = True
        self._drop_waiting(self._stage_of)
        for lease_id, lease in tuple(self._leases.items()):
            if not lease.up or lease_id in self._stages[lease.stage].idle:
                self._close_lease(lease_id)
            else:
                self._out.append(CancelBundle(lease_id))

    def _drop_waiting(self, unwanted: Iterable[int]) -> None:
        running = {item for lease in self._leases.values() for item in lease.pending}
        self._settle(sorted(set(unwanted) - running), "cancelled")
        for stage in self._stages.values():
            stage.queue = type(stage.queue)(item for item in stage.queue if item in self._stage_of)

    def _dropped(self, item: int) -> bool:
        """Whether an item that has not run is not to run any more."""
        return self._ending or item in self._unwanted

    def _settle(self, items: Iterable[int], ending: Ending, attempts: int = 1) -> None:
        settled = []
        for item in items:
            if (stage := self._stage_of.pop(item, None)) is None:
                continue
            settled.append(item)
            self._stages[stage].kinds.pop(item, None)
            self._attempts.pop(item, None)
            self._unwanted.discard(item)
        if settled:
            self._out.append(Settle(tuple(settled), ending, attempts))

    # ---- what to do next --------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Send ready items to idle workers, open workers for the rest, give idle ones back."""
        hungry = [stage for stage in self._stages.values() if stage.queue]
        if len(hungry) > 1:
            hungry.sort(key=lambda stage: -stage.rule.priority)
        wake: float | None = None
        full: dict[str, float] = {}  # pools that a stage waits for, and its priority
        for stage in hungry:
            pool, priority = stage.rule.pool, stage.rule.priority
            if full.get(pool, priority) > priority:
                continue
            self._dispatch(stage)
            if stage.queue:
                again, satisfied = self._open_leases(stage, now)
                wake = _earlier(wake, again)
                if not satisfied:
                    full.setdefault(pool, priority)
        if self._closing:
            self._withdraw()
        wake = _earlier(wake, self._give_back(now))
        if wake is not None and (self._timer_at is None or wake < self._timer_at - 1e-4):
            self._timer_at = wake
            self._out.append(SetTimer(max(wake - now, 0.0)))

    def _dispatch(self, stage: Stage) -> None:
        while stage.queue and stage.idle:
            lease_id, _ = stage.idle.popitem()
            bundle = stage.next_bundle()
            self._leases[lease_id].pending = dict.fromkeys(bundle)
            self._out.append(Dispatch(next(self._bundle_ids), lease_id, stage.name, bundle))

    def _open_leases(self, stage: Stage, now: float) -> tuple[float | None, bool]:
        """Open what the queue calls for and capacity allows; returns when to look again, and if the pool let it."""
        wanted, again = stage.wanted(now)
        rule = stage.rule
        while len(stage.leases) < wanted:
            if not self._make_room(rule):
                return again, not self._allowance.pool_is_full(rule)
            lease_id, lease = next(self._lease_ids), Lease(stage.name, rule)
            self._leases[lease_id] = stage.leases[lease_id] = lease
            stage.opening += 1
            self._allowance.take(rule)
            self._out.append(OpenLease(lease_id, stage.name, rule.pool, rule.size))
        return again, True

    def _make_room(self, rule: StageRule) -> bool:
        """Whether a lease fits now, after giving back idle ones of stages with nothing to do or less urgent work."""
        given = self._allowance.in_the_way(rule, self._spare(rule))
        for lease_id in given or ():
            self._close_lease(lease_id)
        return given is not None

    def _spare(self, rule: StageRule) -> Iterator[tuple[int, StageRule]]:
        """Idle leases that a stage under that rule may have in place of their own, the best first."""
        for other in self._stages.values():
            if other.idle and (not other.queue or other.rule.priority < rule.priority):
                yield from ((lease_id, self._leases[lease_id].rule) for lease_id in reversed(tuple(other.idle)))

    def _give_back(self, now: float) -> float | None:
        """Close leases that have idled for long enough; returns when the next one will have."""
        wake: float | None = None
        linger_s = 0.0 if self._closing and not self._stage_of else LINGER_S
        for stage in self._stages.values():
            while stage.idle:
                lease_id = next(iter(stage.idle))
                until = stage.leases[lease_id].idle_since + linger_s
                if now < until:
                    wake = _earlier(wake, until)
                    break
                self._close_lease(lease_id)
        return wake

    def _withdraw(self) -> None:
        """Ask no more for workers that have nothing to run by now."""
        for stage in self._stages.values():
            if stage.opening and not stage.queue:
                for lease_id in [lease_id for lease_id, lease in stage.leases.items() if not lease.up]:
                    self._close_lease(lease_id)

    def _close_lease(self, lease_id: int) -> None:
        self._drop(lease_id)
        self._out.append(CloseLease(lease_id))

    def _drop(self, lease_id: int) -> None:
        lease = self._leases.pop(lease_id)
        stage = self._stages[lease.stage]
        del stage.leases[lease_id]
        stage.opening -= not lease.up
        stage.idle.pop(lease_id, None)
        self._allowance.free(lease.rule)


def _earlier(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
