"""What the invocations of one bundle took together, and are billed: for the report of its end, whatever that is."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TypeVar

from prefect_slo.aws.exchange import Returned
from prefect_slo.aws.report import NOTHING, Billed
from prefect_slo.runner.backends.protocol import Finished, Lost

_Ended = TypeVar("_Ended", Finished, Lost)


@dataclass
class Totals:
    """Adds up what invocations tell of themselves."""

    init_s: float = 0.0
    waited_s: float = 0.0
    open_s: float = 0.0
    read_s: float = 0.0
    dump_s: float = 0.0
    write_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    billed: Billed = NOTHING
    storage_usd: Decimal = Decimal()
    untold: int = 0

    def add(self, returned: Returned) -> None:
        """Add an invocation that has sent something back."""
        told, report = returned.telemetry, returned.answer.report
        init_s = report.init_ms / 1000 if report is not None else 0.0
        opened_s = sum(told.get(name, 0.0) for name in ("claim_s", "read_s", "load_s"))
        self.init_s += init_s
        self.waited_s += returned.answer.waited_s
        self.open_s += init_s + returned.answer.waited_s + opened_s
        self.read_s += told.get("read_s", 0.0)
        self.dump_s += told.get("dump_s", 0.0)
        self.write_s += told.get("write_s", 0.0)
        self.cpu_s += told.get("cpu_s", 0.0)
        self.peak_mb = max(self.peak_mb, told.get("peak_mb", 0.0), float(report.used_mb) if report is not None else 0.0)
        self.bytes_in += told.get("bytes_in", 0)
        self.bytes_out += told.get("bytes_out", 0)
        self.bill(returned.answer.billed, returned.storage_usd, returned.answer.lost)

    def bill(self, billed: Billed, storage_usd: Decimal, untold: int) -> None:
        """Add what an invocation, or all that was tried for it, is billed, and what its objects cost.

        Args:
            billed: What it is billed, as far as it is told.
            storage_usd: Of its objects.
            untold: Tries whose bills nobody has told.
        """
        self.billed += billed
        self.storage_usd += storage_usd
        self.untold += untold

    def finished(self, lease: int, bundle: int, received: float) -> Finished:
        """The report of a bundle that ends now."""
        report = Finished(
            lease,
            bundle,
            received,
            time.monotonic(),
            open_s=self.open_s,
            cpu_s=self.cpu_s,
            peak_mb=self.peak_mb,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            init_s=self.init_s,
            waited_s=self.waited_s,
            read_s=self.read_s,
            dump_s=self.dump_s,
            write_s=self.write_s,
            billed_ms=self.billed.ms,
        )
        return self.billed_on(report)

    def billed_on(self, report: _Ended) -> _Ended:
        """A report of the bundle's end that also says what it is billed."""
        return replace(
            report,
            billed_usd=self.billed.usd + self.storage_usd,
            requests=self.billed.requests,
            storage_usd=self.storage_usd,
            untold=report.untold + self.untold,
        )
