"""The state machine that runs a flow by its plan: which items go to which worker, when, and in what bundles."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count

from prefect_slo.control import bundling, losses
from prefect_slo.control.events import (
    Action,
    BundleDone,
    Cancel,
    CancelBundle,
    Closed,
    CloseLease,
    Dispatch,
    Event,
    ItemDone,
    LeaseLost,
    LeaseUp,
    LossReason,
    Notice,
    OpenLease,
    PlanChanged,
    Ready,
    Rejected,
    SetTimer,
    Settle,
    StageRule,
    Submitted,
    Timer,
)

LINGER_S = 0.05
"""An idle lease is kept this long for the stage's next item, unless another stage needs the room."""

RAMP_S = 0.005
RAMP_START = 16
"""A stage without a worker limit opens 16 leases at once and twice as many every 5 ms while its items block."""

BLOCKING_S = 0.02
"""Items at least this long are taken to block (on I/O) where more leases would help."""


@dataclass(slots=True)
class _Stage:
    rule: StageRule
    queue: deque[int] = field(default_factory=deque)
    leases: set[int] = field(default_factory=set)
    idle: list[int] = field(default_factory=list)
    item_s: float | None = None
    ramp: int = RAMP_START
    ramped_at: float = 0.0
    start_failures: int = 0


@dataclass(slots=True)
class _Lease:
    stage: str
    pool: str
    size_vcpus: float
    rule: StageRule
    up: bool = False
    bundle: tuple[int, ...] = ()
    sent: int = 0
    idle_since: float = 0.0


class Scheduler:
    """Turns events into actions.

    Args:
        capacity: vCPUs by pool that the leases of this run may hold together; ``None`` or a missing pool means no
            limit. Other runs on the machine are the backend's matter.
    """

    def __init__(self, capacity: Mapping[str, float | None] | None = None) -> None:
        self.capacity = dict(capacity or {})
        self._stages: dict[str, _Stage] = {}
        self._leases: dict[int, _Lease] = {}
        self._stage_of: dict[int, str] = {}
        self._attempts: dict[int, int] = {}
        self._lease_ids, self._bundle_ids = count(1), count(1)
        self._closing = False
        self._timer_at: float | None = None
        self._out: list[Action] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about ``event``, in order. ``now`` is any clock that doesn't go back, in seconds."""
        self._out = []
        match event:
            case ItemDone(items=items):
                self._settle(items, "done")
                return self._out  # its lease is still busy: nothing can be dispatched
            case Submitted(stage, items, ready):
                self._submit(stage, items, ready)
            case Ready(items):
                self._enqueue(items)
            case BundleDone(lease, busy_s):
                self._bundle_done(lease, busy_s, now)
            case LeaseUp(lease):
                self._lease_up(lease, now)
            case LeaseLost(lease, reason, untouched):
                self._lease_lost(lease, reason, untouched)
            case Rejected(lease, items, ran):
                self._rejected(lease, items, ran)
            case PlanChanged(stage, rule):
                self._change_rule(stage, rule)
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

    def _submit(self, stage: str, items: tuple[int, ...], ready: bool) -> None:
        for item in items:
            self._stage_of[item] = stage
        if self._closing:
            self._settle(items, "cancelled")
        elif ready:
            self._stages[stage].queue.extend(items)

    def _enqueue(self, items: Iterable[int]) -> None:
        for item in items:
            if item in self._stage_of:
                self._stages[self._stage_of[item]].queue.append(item)

    def _bundle_done(self, lease_id: int, busy_s: float, now: float) -> None:
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        stage = self._stages[lease.stage]
        if lease.sent:
            stage.item_s = bundling.smoothed(stage.item_s, busy_s, lease.sent)
        self._set_idle(lease_id, lease, now)

    def _lease_up(self, lease_id: int, now: float) -> None:
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        lease.up = True
        self._stages[lease.stage].start_failures = 0
        self._set_idle(lease_id, lease, now)

    def _set_idle(self, lease_id: int, lease: _Lease, now: float) -> None:
        lease.bundle, lease.sent, lease.idle_since = (), 0, now
        self._stages[lease.stage].idle.append(lease_id)

    def _lease_lost(self, lease_id: int, reason: LossReason, untouched: tuple[int, ...]) -> None:
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        stage = self._stages[lease.stage]
        stage.leases.discard(lease_id)
        if lease_id in stage.idle:
            stage.idle.remove(lease_id)
        pending = [item for item in lease.bundle if item in self._stage_of]
        fresh = [item for item in pending if item in untouched]
        if reason == "start":
            self._start_failed(lease.stage, stage, pending)
            return
        if reason == "memory" and stage.rule.ladder and stage.rule == lease.rule:
            stage.rule = losses.grown(stage.rule)
            self._out.append(Notice(lease.stage, "grown", str(stage.rule.size)))
        again: list[int] = []
        for item in pending:
            if item in fresh:
                again.append(item)
                continue
            attempts = self._attempts[item] = self._attempts.get(item, 0) + 1
            if losses.verdict(lease.rule, reason, attempts) == "again" and not self._closing:
                again.append(item)
                self._out.append(Notice(lease.stage, "retried", reason))
            else:
                self._settle((item,), reason, attempts)
        if self._closing:
            self._settle(again, "cancelled")
        else:
            stage.queue.extendleft(reversed(again))

    def _start_failed(self, name: str, stage: _Stage, pending: list[int]) -> None:
        stage.start_failures += 1
        stage.queue.extendleft(reversed(pending))
        if stage.start_failures < losses.START_ATTEMPTS:
            return
        if stage.rule.fallback is not None:
            self._fall_back(name, stage, "its workers do not start")
        else:
            self._settle(list(stage.queue), "start")
            stage.queue.clear()

    def _rejected(self, lease_id: int, items: tuple[int, ...], ran: bool) -> None:
        name = self._stage_of.get(items[0]) if items else None
        if name is None:
            return
        stage = self._stages[name]
        lease = self._leases.get(lease_id)
        isolated = lease is not None and lease.pool == stage.rule.pool
        if ran and not stage.rule.rerun_unpicklable:
            self._settle(items, "unpicklable")
        elif stage.rule.fallback is not None:
            self._fall_back(name, stage, "its results do not pickle" if ran else "its arguments do not pickle")
            stage.queue.extendleft(reversed(items))
        elif isolated:
            self._settle(items, "unpicklable")
        else:  # the stage has fallen back since these were sent
            stage.queue.extendleft(reversed(items))

    def _fall_back(self, name: str, stage: _Stage, why: str) -> None:
        stage.rule = losses.fallen_back(stage.rule)
        stage.item_s, stage.start_failures = None, 0
        self._out.append(Notice(name, "fallback", why))

    def _change_rule(self, name: str, rule: StageRule) -> None:
        stage = self._stages.get(name)
        if stage is None:
            self._stages[name] = _Stage(rule)
        else:
            stage.rule = rule

    def _cancel(self, items: tuple[int, ...] | None) -> None:
        gone = set(self._stage_of if items is None else items)
        running = {item for lease in self._leases.values() for item in lease.bundle}
        for stage in self._stages.values():
            stage.queue = deque(item for item in stage.queue if item not in gone)
        self._settle(sorted(gone & self._stage_of.keys() - running), "cancelled")
        for lease_id, lease in self._leases.items():
            if gone.intersection(lease.bundle) & self._stage_of.keys():
                self._out.append(CancelBundle(lease_id))

    def _close(self, at_once: bool) -> None:
        self._closing = True
        running = {item for lease in self._leases.values() for item in lease.bundle}
        for stage in self._stages.values():
            stage.queue.clear()
        self._settle(sorted(self._stage_of.keys() - running), "cancelled")
        if at_once:
            self._out.extend(CancelBundle(lease_id) for lease_id, lease in self._leases.items() if lease.bundle)

    def _settle(self, items: Iterable[int], ending: str, attempts: int = 1) -> None:
        settled = tuple(item for item in items if self._stage_of.pop(item, None) is not None)
        for item in settled:
            self._attempts.pop(item, None)
        if settled:
            self._out.append(Settle(settled, ending, attempts))  # type: ignore[arg-type]

    # ---- what to do next --------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Send ready items to idle workers, open workers for the rest, give idle ones back."""
        hungry = [(name, stage) for name, stage in self._stages.items() if stage.queue]
        if len(hungry) > 1:
            hungry.sort(key=lambda entry: -entry[1].rule.priority)
        for name, stage in hungry:
            self._dispatch(name, stage)
        wake: float | None = None
        for name, stage in hungry:
            if stage.queue:
                wake = _earlier(wake, self._open_leases(name, stage, now))
        wake = _earlier(wake, self._give_back(now))
        if wake is not None and (self._timer_at is None or wake < self._timer_at - 1e-4):
            self._timer_at = wake
            self._out.append(SetTimer(max(wake - now, 0.0)))

    def _dispatch(self, name: str, stage: _Stage) -> None:
        while stage.queue and stage.idle:
            lease_id = stage.idle.pop()
            lease = self._leases[lease_id]
            if not _serves(lease.rule, stage.rule):
                self._close_lease(lease_id)
                continue
            workers = max(len(stage.leases), stage.rule.workers or 1)
            n = bundling.bundle_size(len(stage.queue), workers, stage.item_s, stage.rule.bundle)
            lease.bundle = tuple(stage.queue.popleft() for _ in range(n))
            lease.sent = n
            self._out.append(Dispatch(next(self._bundle_ids), lease_id, name, lease.bundle))

    def _open_leases(self, name: str, stage: _Stage, now: float) -> float | None:
        """Open what the queue calls for and capacity allows; returns when to look again."""
        wanted, again = self._wanted(stage, now)
        vcpus = stage.rule.size.vcpus
        while len(stage.leases) < wanted and self._make_room(stage.rule.pool, vcpus):
            lease_id = next(self._lease_ids)
            self._leases[lease_id] = _Lease(name, stage.rule.pool, vcpus, stage.rule)
            stage.leases.add(lease_id)
            self._out.append(OpenLease(lease_id, name, stage.rule.pool, stage.rule.size))
        return again

    def _wanted(self, stage: _Stage, now: float) -> tuple[int, float | None]:
        """Leases that the stage should have, and when that may change by itself."""
        opening = sum(1 for lease_id in stage.leases if not self._leases[lease_id].up)
        busy = len(stage.leases) - opening
        if stage.rule.workers is not None:
            bundle = stage.rule.bundle or 1
            return min(stage.rule.workers, busy + -(-len(stage.queue) // bundle)), None
        if len(stage.leases) >= stage.ramp and (stage.item_s is None or stage.item_s >= BLOCKING_S):
            if now >= stage.ramped_at + RAMP_S and not opening:
                stage.ramp, stage.ramped_at = 2 * stage.ramp, now
            return min(stage.ramp, busy + len(stage.queue)), stage.ramped_at + RAMP_S
        if not stage.leases:
            stage.ramp, stage.ramped_at = RAMP_START, now
        return min(stage.ramp, busy + len(stage.queue)), now + RAMP_S

    def _make_room(self, pool: str, vcpus: float) -> bool:
        """Whether a lease of that many vCPUs fits now, after giving back idle leases of stages with nothing to do."""
        limit = self.capacity.get(pool)
        if limit is None:
            return True
        held = sum(lease.size_vcpus for lease in self._leases.values() if lease.pool == pool)
        if held + vcpus <= limit + 1e-9 or held == 0:
            return True
        for stage in self._stages.values():
            while stage.idle and not stage.queue:
                lease_id = stage.idle[-1]
                if self._leases[lease_id].pool != pool:
                    break
                stage.idle.pop()
                held -= self._leases[lease_id].size_vcpus
                self._close_lease(lease_id)
                if held + vcpus <= limit + 1e-9 or held <= 1e-9:
                    return True
        return False

    def _give_back(self, now: float) -> float | None:
        """Close leases that have idled for long enough; returns when the next one will have."""
        wake: float | None = None
        for stage in self._stages.values():
            for lease_id in tuple(stage.idle):
                lease = self._leases[lease_id]
                until = lease.idle_since + LINGER_S
                if self._closing or not _serves(lease.rule, stage.rule) or now >= until:
                    stage.idle.remove(lease_id)
                    self._close_lease(lease_id)
                else:
                    wake = _earlier(wake, until)
        return wake

    def _close_lease(self, lease_id: int) -> None:
        lease = self._leases.pop(lease_id)
        self._stages[lease.stage].leases.discard(lease_id)
        self._out.append(CloseLease(lease_id))


def _serves(held: StageRule, wanted: StageRule) -> bool:
    """Whether a lease opened under one rule is good for another."""
    return held.pool == wanted.pool and held.size == wanted.size


def _earlier(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
