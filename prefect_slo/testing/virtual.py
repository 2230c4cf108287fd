"""Runs of a plan in virtual time: the package's own scheduler on a fake backend, item times drawn from a model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from prefect_slo.control import Scheduler, StageRule
from prefect_slo.control import events as control
from prefect_slo.models import WorkflowModel, makespan
from prefect_slo.plan import Plan
from prefect_slo.resources import Capacity
from prefect_slo.runner.backends import protocol
from prefect_slo.runner.backends.protocol import Bundle
from prefect_slo.simulate import simulate
from prefect_slo.testing.backend import FakeBackend
from prefect_slo.testing.clock import FakeClock
from prefect_slo.workflow import Workflow


@dataclass(frozen=True)
class VirtualRun:
    """One run of a plan.

    Attributes:
        latency_s: First item submitted to last item done, and the time of the flow function itself.
        cost_usd: As the model draws it.
        stage_end_s: When each stage that ran was done, in seconds from the start.
    """

    latency_s: float
    cost_usd: float
    stage_end_s: Mapping[str, float]


def virtual_runs(model: WorkflowModel, plan: Plan, runs: int, *, seed: int = 0) -> Iterator[VirtualRun]:
    """Runs of a plan, each with times drawn jointly for all stages.

    A stage's draw is what it would take if it had its workers to itself; its items then take that over the number of
    waves in which they run, and how stages hand items on and share the machine is up to the scheduler. What the model
    draws beyond the longest path (the time of the flow function itself) is added at the end.

    Args:
        model: Draws the times.
        plan: What is run.
        runs: How many.
        seed: Of the draws.

    Raises:
        UnknownStage: The plan lacks a stage.
        NotEnoughObservations: A stage that was never measured.
    """
    workflow = model.workflow
    waves = {name: _waves(workflow, plan, name) for name in workflow.order}
    drawn = simulate(model, plan, runs, seed)
    driver = np.maximum(drawn.latency_s - makespan(workflow, drawn.stage_latency_s, waves=waves), 0.0)
    for s in range(runs):
        item_s = {name: float(drawn.stage_latency_s[name][s]) / waves[name] for name in workflow.order}
        ends = virtual_run(workflow, plan, item_s)
        latency_s = max(ends.values(), default=0.0) + float(driver[s])
        yield VirtualRun(latency_s, float(drawn.cost_usd[s]), ends)


def virtual_run(workflow: Workflow, plan: Plan, item_s: Mapping[str, float]) -> dict[str, float]:
    """When each stage is done, where its items take these times; stages of 0 s don't run.

    Args:
        workflow: The graph.
        plan: How its stages are run.
        item_s: Seconds of one item, by stage.
    """
    return _Run(workflow, plan, item_s).ends()


class _Run:
    """Plays the runner's part: feeds the scheduler with what the fake backend reports, and does what it says."""

    def __init__(self, workflow: Workflow, plan: Plan, item_s: Mapping[str, float]) -> None:
        self._workflow, self._plan, self._item_s = workflow, plan, item_s
        self._clock = FakeClock()
        self._backend = FakeBackend(self._clock)
        pools = {plan[name].pool for name in workflow.order}
        self._scheduler = Scheduler({pool: _room(workflow.capacity, pool) for pool in pools})
        self._inbox: deque[control.Event] = deque()
        self._items: dict[str, tuple[int, ...]] = {}
        self._stage_of: dict[int, str] = {}
        self._left: dict[str, int] = {}
        self._missing: dict[int, int] = {}
        self._ends: dict[str, float] = {}

    def ends(self) -> dict[str, float]:
        self._submit()
        while True:
            while self._inbox:
                for action in self._scheduler.handle(self._inbox.popleft(), self._clock.now):
                    self._do(action)
            if not self._scheduler.unsettled:
                return self._ends
            if not self._clock.step():
                raise RuntimeError("the scheduler waits for what will never come")

    def _submit(self) -> None:
        number = 0
        depth = _depths(self._workflow)
        for name in self._workflow.order:
            if not self._item_s[name] > 0:
                continue
            count = _item_count(self._workflow, self._plan, name)
            items = self._items[name] = tuple(range(number, number + count))
            number += count
            self._left[name] = count
            self._stage_of.update(dict.fromkeys(items, name))
            stage = self._plan[name]
            rule = StageRule(stage.pool, stage.size, stage.workers, bundle=stage.bundle, priority=depth[name])
            self._inbox.append(control.PlanChanged(name, rule))
            needs = [self._needs(name, i) for i in range(count)]
            self._missing.update(zip(items, needs, strict=True))
            ready = tuple(item for item, need in zip(items, needs, strict=True) if not need)
            waiting = tuple(item for item, need in zip(items, needs, strict=True) if need)
            if ready:
                self._inbox.append(control.Submitted(name, ready))
            if waiting:
                self._inbox.append(control.Submitted(name, waiting, ready=False))

    def _needs(self, stage: str, i: int) -> int:
        """How many upstream items an item waits for."""
        parents = [(self._items.get(edge.parent, ()), edge.kind) for edge in self._workflow[stage].after]
        return sum(min(i < len(items), 1) if kind == "item" else len(items) for items, kind in parents)

    def _do(self, action: control.Action) -> None:
        match action:
            case control.OpenLease(lease, _, _, size):
                self._backend.open(lease, size, self._heard)
            case control.CloseLease(lease):
                self._backend.close(lease)
            case control.Dispatch(bundle, lease, stage, items):
                seconds = tuple((item, self._item_s[stage]) for item in items)
                self._backend.submit(lease, Bundle(bundle, stage, None, seconds))
            case control.SetTimer(after_s):
                self._clock.call_later(after_s, partial(self._inbox.append, control.Timer()))
            case control.Settle(items):
                for item in items:
                    self._settled(item)

    def _heard(self, report: protocol.Report) -> None:
        match report:
            case protocol.Opened(lease=lease):
                self._inbox.append(control.LeaseUp(lease))
            case protocol.Progress(lease, _, items):
                self._inbox.append(control.ItemDone(lease, tuple(item.item for item in items)))
            case protocol.Finished(lease=lease):
                self._inbox.append(control.BundleDone(lease, report.ended - report.received))

    def _settled(self, item: int) -> None:
        stage = self._stage_of[item]
        self._left[stage] -= 1
        if not self._left[stage]:
            self._ends[stage] = self._clock.now
        i = item - self._items[stage][0]
        ready = []
        for child in self._workflow.children(stage):
            kind = next(edge.kind for edge in self._workflow[child].after if edge.parent == stage)
            waiting = self._items.get(child, ())
            for other in waiting[i : i + 1] if kind == "item" else waiting:
                self._missing[other] -= 1
                if not self._missing[other]:
                    ready.append(other)
        if ready:
            self._inbox.append(control.Ready(tuple(ready)))


def _item_count(workflow: Workflow, plan: Plan, name: str) -> int:
    """Calls of a stage: its items in batches, or one per worker where its work is divided."""
    stage, chosen = workflow[name], plan[name]
    if stage.fanout == "planned" or not stage.items:
        return chosen.workers
    return math.ceil(stage.items / chosen.batch)


def _waves(workflow: Workflow, plan: Plan, name: str) -> float:
    return float(math.ceil(_item_count(workflow, plan, name) / plan[name].workers))


def _depths(workflow: Workflow) -> dict[str, float]:
    depth: dict[str, float] = {}
    for name in workflow.order:
        depth[name] = 1 + max((depth[parent] for parent in workflow[name].parents), default=0.0)
    return depth


def _room(capacity: Capacity, pool: str) -> Capacity:
    """What the runner's own scheduler counts: vCPUs of this machine, everything of a pool with its own capacity."""
    return capacity.pools.get(pool, Capacity(capacity.vcpus))
