"""Laws of the scheduler under any order of events; the world of ``conftest`` checks each action as it is obeyed."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefect_slo.control import StageRule
from prefect_slo.control import events as e
from prefect_slo.resources import Size

SIZES = (Size(1, 512), Size(1, 2048), Size(2, 1024))
LARGER = Size(1, 8192)
RULES = st.builds(
    StageRule,
    pool=st.sampled_from(["process", "thread"]),
    size=st.sampled_from(SIZES),
    workers=st.none() | st.integers(1, 5),
    bundle=st.none() | st.integers(1, 6),
    priority=st.sampled_from([0.0, 1.0, 2.0]),
    loss_retries=st.integers(0, 2),
    ladder=st.sampled_from([(), (LARGER,)]),
    fallback=st.none() | st.just("thread"),
    rerun_unpicklable=st.booleans(),
    task=st.sampled_from(["one", "other"]),
    together=st.none() | st.integers(1, 3),
)
KINDS = st.sampled_from([None, None, e.Kind(1), e.Kind(2, batch=3, loss_retries=1, rerun_unpicklable=False)])
STAGES = st.sampled_from(["a", "b", "c"])
PICK = st.integers(0, 10**6)
LOSSES = st.sampled_from(["died", "memory", "timeout"])


@pytest.fixture(scope="module")
def machine(make_world):
    class Scheduling(RuleBasedStateMachine):
        """Random submissions, plans, reports and losses."""

        @initialize(limit=st.sampled_from([1.0, 2.0, 4.0]), rules=st.tuples(RULES, RULES, RULES))
        def begin(self, limit, rules):
            self.world = make_world({"process": limit})
            self.waiting: list[int] = []
            for stage, first in zip("abc", rules, strict=True):
                self.world.tell(e.PlanChanged(stage, first))

        def one_of(self, leases: list[int], pick: int) -> int:
            return sorted(leases)[pick % len(leases)]

        @rule(stage=STAGES, n=st.integers(1, 12), ready=st.booleans(), kind=KINDS)
        def submit(self, stage, n, ready, kind):
            first = len(self.world.submitted)
            items = tuple(range(first, first + n))
            self.world.tell(e.Submitted(stage, items, ready, kind))
            if not ready:
                self.waiting += items

        @precondition(lambda self: self.waiting)
        @rule(n=st.integers(1, 5))
        def upstream_ends(self, n):
            ready, self.waiting = self.waiting[:n], self.waiting[n:]
            self.world.tell(e.Ready(tuple(ready)))

        @precondition(lambda self: self.world.opening())
        @rule(pick=PICK)
        def lease_comes_up(self, pick):
            self.world.up(self.one_of(self.world.opening(), pick))

        @precondition(lambda self: self.world.opening())
        @rule(pick=PICK)
        def lease_fails_to_start(self, pick):
            self.world.lose(self.one_of(self.world.opening(), pick), "start", running=0)

        @precondition(lambda self: self.world.busy())
        @rule(pick=PICK, busy_s=st.sampled_from([0.0, 1e-4, 0.01, 1.0]))
        def bundle_ends(self, pick, busy_s):
            self.world.finish(self.one_of(self.world.busy(), pick), busy_s)

        @precondition(lambda self: self.world.busy())
        @rule(pick=PICK, n=st.integers(1, 3))
        def items_end(self, pick, n):
            lease = self.one_of(self.world.busy(), pick)
            held = self.world.leases[lease]
            done, held.bundle = held.bundle[:n], held.bundle[n:]
            self.world.tell(e.ItemDone(lease, tuple(done)))

        @precondition(lambda self: self.world.busy())
        @rule(pick=PICK, n=st.integers(1, 3), ran=st.booleans())
        def items_do_not_pickle(self, pick, n, ran):
            lease = self.one_of(self.world.busy(), pick)
            if self.world.leases[lease].bundle and self.world.leases[lease].pool == "process":
                self.world.reject(lease, n, ran=ran)

        @precondition(lambda self: self.world.busy())
        @rule(pick=PICK, n=st.integers(1, 3))
        def items_cannot_be_sent_yet(self, pick, n):
            self.waiting += self.world.postpone(self.one_of(self.world.busy(), pick), n)

        @precondition(lambda self: self.waiting)
        @rule(n=st.integers(1, 5))
        def what_items_take_is_lost(self, n):
            barred, self.waiting = self.waiting[:n], self.waiting[n:]
            self.world.tell(e.Barred(tuple(barred)))
            assert set(barred) <= set(self.world.settled)

        @precondition(lambda self: self.world.leases)
        @rule(pick=PICK, reason=LOSSES, done=st.integers(0, 3), running=st.integers(0, 1))
        def worker_is_lost(self, pick, reason, done, running):
            lease = self.one_of(list(self.world.leases), pick)
            held = self.world.leases[lease]
            self.world.lose(lease, "cancelled" if held.cancelled else reason, done, running)

        @rule(stage=STAGES, new=RULES)
        def plan_changes(self, stage, new):
            self.world.tell(e.PlanChanged(stage, new))

        @precondition(lambda self: self.world.submitted)
        @rule(picks=st.lists(PICK, min_size=1, max_size=6))
        def cancel(self, picks):
            items = tuple({pick % len(self.world.submitted) for pick in picks})
            self.world.tell(e.Cancel(items))
            running = {item for held in self.world.leases.values() for item in held.bundle}
            assert set(items) <= set(self.world.settled) | running, "a cancelled item still waits"

        @precondition(lambda self: self.world.timer_at is not None)
        @rule()
        def time_passes(self):
            self.world.tick()

        @rule(now=st.booleans())
        @precondition(lambda self: len(self.world.log) > 25)
        def close(self, now):
            self.world.tell(e.Closed(now))

        @invariant()
        def counts_agree(self):
            if hasattr(self, "world"):
                assert self.world.scheduler.unsettled == len(self.world.submitted) - len(self.world.settled)
                assert self.world.scheduler.leased == len(self.world.leases)

        def teardown(self):
            if not hasattr(self, "world"):
                return
            self.world.tell(e.Ready(tuple(self.waiting)))
            self.world.run_dry()
            assert self.world.settled.keys() == self.world.submitted.keys(), "an item was never settled"
            self.world.tell(e.Closed())
            assert not self.world.scheduler.leased, "a lease was kept after everything had ended"
            self.replay()

        def replay(self):
            twin = self.world.another_scheduler()
            again = [action for event, now in self.world.log for action in twin.handle(event, now)]
            assert again == self.world.actions, "the same events gave other actions"

    return Scheduling


def test_every_order_of_events_keeps_the_laws(machine):
    case = machine.TestCase
    case.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
    case().runTest()


@pytest.mark.slow
def test_many_orders_of_events_keep_the_laws(machine):
    case = machine.TestCase
    case.settings = settings(max_examples=1500, stateful_step_count=100, deadline=None, derandomize=False)
    case().runTest()
