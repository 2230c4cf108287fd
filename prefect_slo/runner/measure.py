"""Measures a flow run: invocations and stage runs, from what backends report, on monotonic clocks.

Waiting for capacity that other runs hold is no property of a stage. Of ``d`` workers that lost ``w`` worker-seconds to
it, a stage of wall time ``t`` would have taken about ``t − w / d``: that is its wall time here, and ``w / d`` is told
apart. Waiting for workers to start is part of the stage, and told as well. Either is waiting only while there is
something to do: when that began is known for certain once items have ended. Where each bundle queues in a scheduler
that is another's (``Capabilities.queues``), a lease costs what its bundles held, and waits as they did (``queueing``):
for others' work, or for a worker to start.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from decimal import Decimal
from types import MappingProxyType

from prefect_slo.observation import Invocation, StageRun
from prefect_slo.pricing import PriceList
from prefect_slo.resources import Size
from prefect_slo.runner.backends import protocol
from prefect_slo.runner.billing import Meter
from prefect_slo.runner.pools import LOCAL, without_gpu
from prefect_slo.runner.queueing import Queue, way_s
from prefect_slo.runner.tallies import LeaseTally, Opening, StageTally, Wait


class Measure:
    """Adds up what one flow run's stages took.

    Args:
        prices: What reserved time costs.
        heard: Called with each invocation as it ends.
        prices_of: Price lists of pools that have their own.
        machine: All that this machine has: a run never reserves more of it at once.
        planned: Stages whose size was chosen. A worker of another one has no memory of its own and reserves what its
            vCPUs bring of the machine's.
    """

    def __init__(
        self,
        prices: PriceList,
        heard: Callable[[Invocation], None] | None = None,
        prices_of: Mapping[str, PriceList] = MappingProxyType({}),
        *,
        machine: Size,
        planned: Container[str] = (),
    ) -> None:
        self._prices, self._prices_of, self._heard = prices, prices_of, heard
        self._machine, self._planned = machine, planned
        self._meter = Meter(machine.vcpus)
        self._leases: dict[int, LeaseTally] = {}
        self._stages: dict[str, StageTally] = {}
        self._queues: defaultdict[str, Queue] = defaultdict(Queue)
        self._billing = threading.Lock()
        self._started_at = (time.time(), time.monotonic())

    # ---- what the session tells -------------------------------------------------------------------------------------

    def submitted(self, stage: str, items: int, ready: float | None) -> None:
        seen = self._stages.setdefault(stage, StageTally())
        seen.submitted += items
        if seen.first_ready is None and ready is not None:
            seen.first_ready = ready

    def leased(
        self,
        lease: int,
        stage: str,
        pool: str,
        size: Size,
        now: float,
        *,
        metered: bool = False,
        queues: bool = False,
    ) -> None:
        if stage not in self._planned and pool in LOCAL:
            share = min(size.vcpus / self._machine.vcpus, 1.0)
            size = replace(size, memory_mb=max(int(share * self._machine.memory_mb), 1))
        others = any(held.stage != stage and held.pool == pool for held in self._leases.values())
        beside = others and (pool not in LOCAL or size.gpu > 0)
        self._leases[lease] = LeaseTally(stage, pool, size, now, metered, queues, beside)
        seen = self._stages[stage]
        seen.size, seen.pool, seen.metered = size, pool, seen.metered and metered
        seen.queues = seen.queues and queues

    def stage_of(self, lease: int) -> str:
        """The stage that a lease works for; empty where it is over."""
        held = self._leases.get(lease)
        return held.stage if held is not None else ""

    def opened(self, report: protocol.Opened) -> None:
        lease = self._leases.get(report.lease)
        if lease is None:
            return
        lease.up, lease.start_s, lease.held_s = time.monotonic(), report.start_s, report.held_s
        if lease.pool in LOCAL and not lease.metered:
            lease.billed_at = self._meter.begin(lease.size.vcpus, lease.up)
        seen = self._stages[lease.stage]
        if report.no_gpu:
            lease.size = seen.size = without_gpu(lease.size)
            seen.no_gpu = True
        seen.kinds[lease.size.kind] = None
        if report.wait_s or report.start_s:
            admitted = lease.asked + report.wait_s
            asked = admitted if lease.beside else lease.asked
            seen.openings.append(Opening(asked, admitted, admitted + report.start_s))
        seen.now_leased += 1
        seen.most_leased = max(seen.most_leased, seen.now_leased)

    def dispatched(self, lease: int, bundle: int, now: float, first_ready: float, weight: int = 0) -> None:
        """A bundle is on its way to a worker, with so many bytes that it takes."""
        held = self._leases[lease]
        held.dispatched, held.first_ready, held.weight = now, first_ready, weight
        held.items = held.failed = 0
        held.read_s = held.compute_s = held.write_s = 0.0

    def item(self, lease: int, report: protocol.ItemReport, *, ready: float, batch: int = 1) -> None:
        """Take in an item that ended; one of ``batch`` that ran as one has its share of the time."""
        held = self._leases.get(lease)
        if held is None:
            return
        seen = self._stages[held.stage]
        outcome = report.outcome
        took = report.ended - report.started
        held.items += 1
        held.failed += outcome.failed
        held.read_s += outcome.read_s
        held.write_s += outcome.write_s
        held.compute_s += took - outcome.read_s - outcome.write_s
        seen.done += 1
        seen.batch = max(seen.batch, batch)
        seen.item_s += took
        seen.last_end = max(seen.last_end, report.ended)
        seen.first_ready = ready if seen.first_ready is None else min(seen.first_ready, ready)
        seen.read_s += outcome.read_s
        seen.write_s += outcome.write_s
        seen.compute_s += took - outcome.read_s - outcome.write_s

    def finished(self, report: protocol.Finished) -> float:
        """Take in a finished bundle; returns the seconds of work that it took."""
        busy_s = report.ended - report.received - report.open_s
        lease = self._leases.get(report.lease)
        if lease is None:
            return busy_s
        seen = self._stages[lease.stage]
        seen.busy_s += busy_s
        seen.bytes_in += report.bytes_in
        seen.bytes_out += report.bytes_out
        seen.peak_mb = max(seen.peak_mb, report.peak_mb)
        seen.inits_s += report.init_s
        queued_s = self._ran(lease, seen, report)
        self._bill(seen, report)
        if self._heard is not None:
            init_s = report.init_s + (lease.start_s if lease.bundles == 0 else 0.0)
            self._heard(
                Invocation(
                    stage=lease.stage,
                    worker=report.lease,
                    items=lease.items,
                    failed=lease.failed,
                    dispatched=lease.dispatched,
                    queue_s=max(lease.dispatched - lease.first_ready, 0.0),
                    init_s=init_s,
                    read_s=lease.read_s + report.read_s,
                    compute_s=lease.compute_s,
                    write_s=lease.write_s + report.dump_s + report.write_s,
                    cpu_s=report.cpu_s,
                    peak_memory_mb=report.peak_mb,
                    bytes_in=report.bytes_in,
                    bytes_out=report.bytes_out,
                    cold=init_s > 0,
                    waited_s=report.waited_s + queued_s,
                    load_s=max(report.open_s - report.init_s - report.waited_s - report.read_s, 0.0),
                    dump_s=lease.write_s + report.dump_s,
                    billed_ms=report.billed_ms,
                    requests=report.requests,
                )
            )
        lease.bundles += 1
        return busy_s

    def lost(self, report: protocol.Lost) -> None:
        lease = self._leases.get(report.lease)
        if lease is not None:
            seen = self._stages[lease.stage]
            seen.failed += 1
            seen.peak_mb = max(seen.peak_mb, report.peak_mb)
            if report.bundle is not None:
                self._ran(lease, seen, report)
            self._bill(seen, report)
        self.released(report.lease, time.monotonic())

    def released(self, lease: int, now: float) -> None:
        held = self._leases.pop(lease, None)
        if held is None or held.up is None:
            return
        seen = self._stages[held.stage]
        seen.now_leased -= 1
        if held.metered:
            return
        size = held.size
        if held.pool in LOCAL:
            billed_s = self._meter.end(size.vcpus, now) - held.billed_at
        else:
            billed_s = held.held_s if held.queues else now - held.up + held.held_s
            seen.held_s += billed_s
        prices = self._prices_of.get(held.pool, self._prices)
        seen.cost_usd += billed_s * prices.rate(size.vcpus, size.memory_mb, size.gpu, size.hardware)

    def failed(self, stage: str) -> None:
        seen = self._stages[stage]
        seen.failed += 1
        if not seen.done:
            seen.last_end = max(seen.last_end, time.monotonic())

    def fetched(self, stage: str, usd: Decimal) -> None:
        """A result of a stage that lay on storage was read here, in whichever thread."""
        with self._billing:
            seen = self._stages[stage]
            seen.billed_usd += usd
            seen.storage_usd += usd

    def came_from_cache(self, stage: str) -> None:
        self._stages[stage].cached += 1

    # ---- what was measured ------------------------------------------------------------------------------------------

    def mean_item_s(self, stage: str) -> float | None:
        """Mean time of a stage's items so far; ``None`` before the first."""
        seen = self._stages.get(stage)
        return seen.item_s / seen.done if seen is not None and seen.done else None

    def submitted_items(self, stage: str) -> int:
        """Items submitted to a stage so far."""
        seen = self._stages.get(stage)
        return seen.submitted if seen is not None else 0

    def cached_items(self, stage: str) -> int:
        """Items of a stage whose results came from a cache."""
        seen = self._stages.get(stage)
        return seen.cached if seen is not None else 0

    def failed_items(self, stage: str) -> int:
        """Items of a stage that did not end well, or lost a worker: its row says nothing of its work."""
        seen = self._stages.get(stage)
        return max(seen.failed, seen.submitted - seen.done) if seen is not None else 0

    @property
    def cost_usd(self) -> float:
        """Cost of all stages so far, of leases given back; what is billed is added up exactly."""
        return float(self.billed_usd) + sum(seen.cost_usd for seen in self._stages.values())

    @property
    def billed_usd(self) -> Decimal:
        """Of that, what metered backends are billed, to the last digit."""
        return sum((seen.billed_usd for seen in self._stages.values()), Decimal())

    @property
    def untold(self) -> int:
        """Invocations and jobs whose bills nobody has told: they are not in it."""
        return sum(seen.untold for seen in self._stages.values())

    def stage_runs(self, run_id: str, planned: Callable[[str], int | None]) -> tuple[StageRun, ...]:
        """One row per stage that ran, whether or not all of it ended well.

        Args:
            run_id: Name of the run.
            planned: Workers by plan, by stage; ``None`` where they were not limited.
        """
        return tuple(
            self._row(run_id, name, seen, planned(name))
            for name, seen in self._stages.items()
            if (seen.done or seen.failed) and seen.first_ready is not None
        )

    def _ran(self, lease: LeaseTally, seen: StageTally, report: protocol.Finished | protocol.Lost) -> float:
        """Take in how long a bundle was in a queue, which is returned, and held its size from there."""
        if not lease.queues:
            return 0.0
        began, ended = report.held or (lease.dispatched, time.monotonic())
        lease.held_s += max(ended - began, 0.0)
        seen.turns += ended > began
        starts = isinstance(report, protocol.Finished) and report.on_new
        seen.waits.append(Wait(lease.pool, lease.dispatched, began, way_s(lease.weight), starts))
        self._queues[lease.pool].ran(began, ended)
        return max(began - lease.dispatched, 0.0)

    def _bill(self, seen: StageTally, report: protocol.Finished | protocol.Lost) -> None:
        seen.untold += report.untold
        if report.billed_usd is None:
            return
        with self._billing:
            seen.billed_usd += report.billed_usd
            seen.storage_usd += report.storage_usd
            seen.requests += report.requests

    def _row(self, run_id: str, name: str, seen: StageTally, planned: int | None) -> StageRun:
        assert seen.first_ready is not None
        first, last = seen.first_ready, seen.last_end
        queued_s = {False: 0.0, True: 0.0}
        for pool, since, until, on_way_s, starts in seen.waits:
            queued_s[starts] += self._queues[pool].waited_s(max(since, first), min(until, last), on_way_s)
        unix, monotonic = self._started_at
        workers, prices = planned or max(seen.most_leased, 1), self._prices_of.get(seen.pool, self._prices)
        return seen.row(run_id, name, workers, unix + first - monotonic, (queued_s[False], queued_s[True]), prices)
