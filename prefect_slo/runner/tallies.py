"""What is added up of a flow run's leases and stages while it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple

from prefect_slo.observation import StageRun
from prefect_slo.pricing import PriceList
from prefect_slo.resources import Size

NAN = float("nan")


@dataclass
class LeaseTally:
    """A lease.

    Attributes:
        weight: Bytes of its bundle and of what that takes.
        beside: Whether it may wait for other stages of its own run, as they hold workers of its pool. For vCPUs of this
            machine none does: the scheduler asks for no more than there are.
    """

    stage: str
    pool: str
    size: Size
    asked: float
    metered: bool = False
    queues: bool = False
    beside: bool = False
    up: float | None = None
    billed_at: float = 0.0
    start_s: float = 0.0
    held_s: float = 0.0
    bundles: int = 0
    dispatched: float = 0.0
    weight: int = 0
    first_ready: float = 0.0
    items: int = 0
    failed: int = 0
    read_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0


class Wait(NamedTuple):
    """A bundle's time in the queue of a pool.

    Attributes:
        way_s: Of it, how long the way to its worker may have taken.
        starts: Whether that worker was started meanwhile.
    """

    pool: str
    since: float
    until: float
    way_s: float
    starts: bool


class Opening(NamedTuple):
    """How a lease came by its worker: asked for, let in, up."""

    asked: float
    admitted: float
    up: float

    def waited_s(self, first: float, last: float) -> tuple[float, float]:
        """For capacity, and for a start, while the stage had something to do: from ``first`` until ``last``."""
        asked, admitted, up = (min(max(at, first), last) for at in self)
        return admitted - asked, up - admitted


@dataclass
class StageTally:
    """A stage, over all its leases.

    Attributes:
        turns: Bundles that have held their size in a scheduler's queue.
        inits_s: Starts of its workers that bundles have told.
        held_s: Seconds for which leases on other machines were held.
        untold: Invocations and jobs whose bills nobody has told.
        metered, queues: Whether all its leases are of pools that are billed so, or queue each bundle.
        kinds: Hardware that its workers were on, as keys.
        no_gpu: Whether a worker was without the GPU that its size has.
    """

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
    openings: list[Opening] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    turns: int = 0
    inits_s: float = 0.0
    held_s: float = 0.0
    cost_usd: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    peak_mb: float = 0.0
    billed_usd: Decimal = Decimal()
    storage_usd: Decimal = Decimal()
    requests: int = 0
    untold: int = 0
    pool: str = ""
    metered: bool = True
    queues: bool = True
    now_leased: int = 0
    most_leased: int = 0
    size: Size = field(default_factory=lambda: Size(1, 1024))
    kinds: dict[str, None] = field(default_factory=dict)
    no_gpu: bool = False

    @property
    def total_usd(self) -> float:
        """What it has cost: what was billed where that is metered, and the time that other leases were held."""
        return float(self.billed_usd) + self.cost_usd

    def row(
        self,
        run_id: str,
        name: str,
        workers: int,
        started_at: float,
        queued_s: tuple[float, float],
        price: PriceList,
    ) -> StageRun:
        """It as a stage run.

        Args:
            run_id: Name of the run.
            name: Of the stage.
            workers: Of the stage.
            started_at: When it had something to do first, in seconds since the epoch.
            queued_s: Seconds of its bundles in a scheduler's queue: for others' work, and for workers that started.
            price: What its pool asks.
        """
        assert self.first_ready is not None
        waits = [each.waited_s(self.first_ready, self.last_end) for each in self.openings]
        queue_s = (sum(wait for wait, _ in waits) + queued_s[0]) / workers
        start_s = (sum(start for _, start in waits) + queued_s[1] + self.inits_s) / workers
        took_s, busy_s = self.last_end - self.first_ready, self.busy_s / workers
        wall_s = max(took_s - queue_s, min(took_s, busy_s), 1e-6)
        billed_s = self._billed_s(price)
        paid = self.requests or self.turns
        known = paid > 0 and not math.isnan(billed_s)
        return StageRun(
            run_id=run_id,
            stage=name,
            workers=workers,
            memory_mb=self.size.memory_mb,
            vcpus=self.size.vcpus,
            wall_s=wall_s,
            overhead_s=max(wall_s - busy_s, 0.0),
            read_s=self.read_s / workers,
            compute_s=self.compute_s / workers,
            write_s=self.write_s / workers,
            items=self.done,
            batch=self.batch,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            cold=start_s > 0,
            cost_usd=self.total_usd,
            peak_memory_mb=self.peak_mb or NAN,
            hardware="+".join(sorted(self.kinds)) if self.no_gpu else self.size.kind,
            started_at=started_at,
            queue_s=queue_s,
            requests=float(paid) if known else NAN,
            billed_s=billed_s,
            storage_usd=float(self.storage_usd) if known else NAN,
            start_s=start_s,
        )

    def _billed_s(self, price: PriceList) -> float:
        """Seconds that were billed at its size; ``nan`` unless all of it was metered and told, or queued, or leased."""
        size = self.size
        rate = price.rate(size.vcpus, size.memory_mb, size.gpu, size.hardware)
        if not (self.metered and self.requests and rate > 0 and not self.untold):
            alike = self.queues or not self.turns
            return self.held_s if self.held_s and not self.requests and alike else NAN
        time_usd = self.billed_usd - self.storage_usd - self.requests * Decimal(repr(price.request))
        return max(float(time_usd) / rate, 0.0)
