"""Measures a flow run: invocations and stage runs, from what backends report, on monotonic clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType

from prefect_slo.observation import Invocation, StageRun
from prefect_slo.pricing import PriceList
from prefect_slo.resources import Size
from prefect_slo.runner.backends import protocol

NAN = float("nan")


@dataclass
class _Lease:
    stage: str
    pool: str
    size: Size
    asked: float
    metered: bool = False
    up: float | None = None
    start_s: float = 0.0
    cold: bool = False
    bundles: int = 0
    dispatched: float = 0.0
    first_ready: float = 0.0
    items: int = 0
    failed: int = 0
    read_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0


@dataclass
class _Stage:
    submitted: int = 0
    done: int = 0
    batch: int = 1
    failed: int = 0
    cached: int = 0
    first_ready: float | None = None
    last_end: float = 0.0
    item_s: float = 0.0
    busy_s: float = 0.0
    read_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0
    reserved_s: float = 0.0
    cost_usd: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    peak_mb: float = 0.0
    cold: bool = False
    billed_usd: Decimal = Decimal()
    now_leased: int = 0
    most_leased: int = 0
    size: Size = field(default_factory=lambda: Size(1, 1024))


class Measure:
    """Adds up what one flow run's stages took.

    Args:
        prices: What reserved time costs.
        heard: Called with each invocation as it ends.
        prices_of: Price lists of pools that have their own.
    """

    def __init__(
        self,
        prices: PriceList,
        heard: Callable[[Invocation], None] | None = None,
        prices_of: Mapping[str, PriceList] = MappingProxyType({}),
    ) -> None:
        self._prices, self._prices_of, self._heard = prices, prices_of, heard
        self._leases: dict[int, _Lease] = {}
        self._stages: dict[str, _Stage] = {}
        self._started_at = (time.time(), time.monotonic())

    # ---- what the session tells -------------------------------------------------------------------------------------

    def submitted(self, stage: str, items: int, ready: float | None) -> None:
        seen = self._stages.setdefault(stage, _Stage())
        seen.submitted += items
        if seen.first_ready is None and ready is not None:
            seen.first_ready = ready

    def leased(self, lease: int, stage: str, pool: str, size: Size, now: float, *, metered: bool = False) -> None:
        self._leases[lease] = _Lease(stage, pool, size, now, metered)
        self._stages[stage].size = size

    def opened(self, report: protocol.Opened) -> None:
        lease = self._leases.get(report.lease)
        if lease is None:
            return
        lease.up, lease.cold, lease.start_s = time.monotonic(), report.cold, report.start_s
        seen = self._stages[lease.stage]
        seen.cold |= report.cold
        seen.now_leased += 1
        seen.most_leased = max(seen.most_leased, seen.now_leased)

    def dispatched(self, lease: int, bundle: int, now: float, first_ready: float) -> None:
        held = self._leases[lease]
        held.dispatched, held.first_ready = now, first_ready
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
        seen.cold |= report.init_s > 0
        self._bill(seen, report.billed_usd)
        if self._heard is not None:
            self._heard(
                Invocation(
                    stage=lease.stage,
                    worker=report.lease,
                    items=lease.items,
                    failed=lease.failed,
                    dispatched=lease.dispatched,
                    queue_s=max(lease.dispatched - lease.first_ready, 0.0),
                    init_s=report.init_s + (lease.start_s if lease.bundles == 0 else 0.0),
                    read_s=lease.read_s,
                    compute_s=lease.compute_s,
                    write_s=lease.write_s,
                    cpu_s=report.cpu_s,
                    peak_memory_mb=report.peak_mb,
                    bytes_in=report.bytes_in,
                    bytes_out=report.bytes_out,
                    cold=report.init_s > 0 or (lease.cold and lease.bundles == 0),
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
            self._bill(seen, report.billed_usd)
        self.released(report.lease, time.monotonic())

    def released(self, lease: int, now: float) -> None:
        held = self._leases.pop(lease, None)
        if held is None or held.up is None:
            return
        seen = self._stages[held.stage]
        seen.now_leased -= 1
        seen.reserved_s += now - held.up
        if held.metered:
            return
        size = held.size
        prices = self._prices_of.get(held.pool, self._prices)
        seen.cost_usd += (now - held.up) * prices.rate(size.vcpus, size.memory_mb, size.gpu, size.hardware)

    def failed(self, stage: str) -> None:
        self._stages[stage].failed += 1

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

    @property
    def clean(self) -> bool:
        """Whether every item of every stage ended well, in its worker."""
        return all(seen.failed == 0 and seen.done == seen.submitted for seen in self._stages.values())

    @property
    def cost_usd(self) -> float:
        """Cost of all stages so far, of leases given back."""
        return sum(map(_cost, self._stages.values()))

    @property
    def billed_usd(self) -> Decimal:
        """Of that, what metered backends are billed, to the last digit."""
        return sum((seen.billed_usd for seen in self._stages.values()), Decimal())

    def stage_runs(self, run_id: str, planned: Callable[[str], int | None]) -> tuple[StageRun, ...]:
        """One row per stage that ran to its end.

        Args:
            run_id: Name of the run.
            planned: Workers by plan, by stage; ``None`` where they were not limited.
        """
        return tuple(
            self._row(run_id, name, seen, planned(name))
            for name, seen in self._stages.items()
            if seen.done == seen.submitted and seen.done and not seen.failed and seen.first_ready is not None
        )

    @staticmethod
    def _bill(seen: _Stage, billed_usd: Decimal | None) -> None:
        if billed_usd is not None:
            seen.billed_usd += billed_usd

    def _row(self, run_id: str, name: str, seen: _Stage, planned: int | None) -> StageRun:
        workers = planned or max(seen.most_leased, 1)
        assert seen.first_ready is not None
        wall_s = max(seen.last_end - seen.first_ready, 1e-6)
        unix, monotonic = self._started_at
        return StageRun(
            run_id=run_id,
            stage=name,
            workers=workers,
            memory_mb=seen.size.memory_mb,
            vcpus=seen.size.vcpus,
            wall_s=wall_s,
            overhead_s=max(wall_s - seen.busy_s / workers, 0.0),
            read_s=seen.read_s / workers,
            compute_s=seen.compute_s / workers,
            write_s=seen.write_s / workers,
            items=seen.done,
            batch=seen.batch,
            bytes_in=seen.bytes_in,
            bytes_out=seen.bytes_out,
            cold=seen.cold,
            cost_usd=_cost(seen),
            peak_memory_mb=seen.peak_mb or NAN,
            hardware=seen.size.hardware,
            started_at=unix + seen.first_ready - monotonic,
        )


def _cost(seen: _Stage) -> float:
    """What a stage has cost: what was billed where that is metered, and the time that other leases were held."""
    return float(seen.billed_usd) + seen.cost_usd
