"""A world for the scheduler: it obeys actions, reports like a backend, and checks every law of the protocol."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest

from prefect_slo.control import Scheduler, StageRule
from prefect_slo.control import events as e
from prefect_slo.resources import Capacity


@dataclass
class Held:
    """A lease as the world knows it."""

    stage: str
    pool: str
    vcpus: float
    up: bool = False
    bundle: list[int] = field(default_factory=list)
    busy: bool = False
    cancelled: bool = False
    task: str = ""


class World:
    """Feeds a scheduler and does what it says; an action that breaks the protocol fails the test.

    Args:
        capacity: vCPUs by pool.
    """

    def __init__(self, capacity: dict[str, float] | None = None) -> None:
        self.capacity = capacity or {}
        self.scheduler = self.another_scheduler()
        self.now = 0.0
        self.log: list[tuple[e.Event, float]] = []
        self.actions: list[e.Action] = []
        self.leases: dict[int, Held] = {}
        self.submitted: dict[int, str] = {}
        self.rules: dict[str, StageRule] = {}
        self.kinds: dict[int, e.Kind | None] = {}
        self.settled: dict[int, e.Settle] = {}
        self.runs: Counter[int] = Counter()
        self.timer_at: float | None = None

    def another_scheduler(self) -> Scheduler:
        """One that has seen nothing yet."""
        return Scheduler({pool: Capacity(vcpus) for pool, vcpus in self.capacity.items()})

    def tell(self, event: e.Event) -> list[e.Action]:
        """Hand an event over and obey."""
        if isinstance(event, e.PlanChanged):
            self.rules[event.stage] = event.rule
        if isinstance(event, e.Submitted):
            self.submitted.update(dict.fromkeys(event.items, event.stage))
            self.kinds.update(dict.fromkeys(event.items, event.kind))
        self.log.append((event, self.now))
        actions = self.scheduler.handle(event, self.now)
        for action in actions:
            self.obey(action)
        self.actions += actions
        return actions

    def obey(self, action: e.Action) -> None:
        match action:
            case e.OpenLease(lease, stage, pool, size):
                assert lease not in self.leases
                rule = self.rules[stage]
                self.leases[lease] = Held(stage, pool, size.vcpus, task=rule.task)
                self.check_capacity(pool)
                held = sum(other.task == rule.task for other in self.leases.values())
                assert rule.together is None or held <= rule.together, f"{held} leases of one task"
            case e.CloseLease(lease):
                assert not self.leases.pop(lease).busy, "a lease was closed while it ran something"
            case e.Dispatch(_, lease, stage, items):
                held = self.leases[lease]
                assert held.up, "sent to a lease that is not up"
                assert not held.busy, "sent to a lease that is busy"
                assert held.stage == stage
                assert items
                assert len(set(items)) == len(items)
                assert len({self.kinds[item] for item in items}) == 1, "a bundle of several kinds"
                for item in items:
                    assert item in self.submitted
                    assert item not in self.settled, "an item ran after it was settled"
                    assert all(item not in other.bundle for other in self.leases.values()), "an item runs twice at once"
                held.bundle, held.busy = list(items), True
                self.runs.update(items)
            case e.CancelBundle(lease):
                assert self.leases[lease].busy
                self.leases[lease].cancelled = True
            case e.Settle(items):
                for item in items:
                    assert item in self.submitted
                    assert item not in self.settled, "settled twice"
                    self.settled[item] = action
            case e.SetTimer(after_s):
                assert after_s >= 0
                self.timer_at = self.now + after_s

    def check_capacity(self, pool: str) -> None:
        limit = self.capacity.get(pool)
        held = [lease.vcpus for lease in self.leases.values() if lease.pool == pool]
        assert limit is None or sum(held) <= limit + 1e-6 or len(held) == 1, f"{sum(held)} vCPUs of {limit}"

    # ---- what backends report -------------------------------------------------------------------------------------

    def up(self, lease: int) -> list[e.Action]:
        self.leases[lease].up = True
        return self.tell(e.LeaseUp(lease))

    def finish(self, lease: int, busy_s: float = 0.001) -> list[e.Action]:
        """Everything that a lease runs ends well."""
        held = self.leases[lease]
        items, held.bundle = tuple(held.bundle), []
        done = self.tell(e.ItemDone(lease, items)) if items else []
        self.now += busy_s
        held.busy = False
        return [*done, *self.tell(e.BundleDone(lease, busy_s))]

    def lose(
        self, lease: int, reason: e.LossReason = "died", done: int = 0, running: int = 1, *, inputs_gone: bool = False
    ) -> list[e.Action]:
        """A lease is lost after it has reported ``done`` items and started ``running`` more."""
        held = self.leases[lease]
        reported, rest = tuple(held.bundle[:done]), held.bundle[done:]
        held.bundle = list(rest)
        actions = self.tell(e.ItemDone(lease, reported)) if reported else []
        self.leases.pop(lease)
        return [*actions, *self.tell(e.LeaseLost(lease, reason, tuple(rest[running:]), inputs_gone))]

    def reject(self, lease: int, n: int = 1, *, ran: bool) -> list[e.Action]:
        held = self.leases[lease]
        items, held.bundle = tuple(held.bundle[:n]), held.bundle[n:]
        return self.tell(e.Rejected(lease, items, ran))

    def postpone(self, lease: int, n: int = 1) -> list[int]:
        """Items of a lease can't be sent yet; those that wait from now on."""
        held = self.leases[lease]
        items, held.bundle = held.bundle[:n], held.bundle[n:]
        self.tell(e.Postponed(lease, tuple(items)))
        return items

    def tick(self) -> list[e.Action]:
        """Time passes until the timer."""
        assert self.timer_at is not None
        self.now, self.timer_at = max(self.now, self.timer_at), None
        return self.tell(e.Timer())

    # ---- what tests ask ---------------------------------------------------------------------------------------------

    def opening(self) -> list[int]:
        return [lease for lease, held in self.leases.items() if not held.up]

    def busy(self) -> list[int]:
        return [lease for lease, held in self.leases.items() if held.busy]

    def endings(self) -> dict[int, str]:
        return {item: settle.ending for item, settle in self.settled.items()}

    def start(self, rule: StageRule, items: int, stage: str = "work") -> list[e.Action]:
        """A stage with so many ready items."""
        self.tell(e.PlanChanged(stage, rule))
        first = len(self.submitted)
        return self.tell(e.Submitted(stage, tuple(range(first, first + items))))

    def run_dry(self, busy_s: float = 0.001) -> None:
        """Everything that can report reports, until nothing is left to do."""
        for _ in range(20 * len(self.submitted) + 1000):
            if opening := self.opening():
                self.up(opening[0])
            elif busy := self.busy():
                if self.leases[busy[0]].cancelled:
                    self.lose(busy[0], "cancelled")
                else:
                    self.finish(busy[0], busy_s)
            elif self.timer_at is not None:
                self.tick()
            else:
                return
        raise AssertionError("it never came to rest")


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    """The class, for worlds with a capacity."""
    return World
