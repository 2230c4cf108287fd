"""What the demo measured: values, and all figures as a document."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from prefect_slo.attainment import Attainment
from prefect_slo.plan import Plan

CONFIDENCE = 0.99
"""With which deadlines are promised where the machine is calm enough."""


@dataclass(frozen=True)
class Series:
    """Runs of one way to run the flow.

    Attributes:
        name: What it is, e.g. ``"deadline 3.2 s"``.
        bound_s: Its deadline; ``nan`` for a reference.
        plan: The first plan that it followed; ``None`` for Prefect's default runner.
        latency_s: Of each run.
        cost_usd: Of each run.
    """

    name: str
    bound_s: float
    plan: Plan | None
    latency_s: tuple[float, ...]
    cost_usd: tuple[float, ...]

    @property
    def attainment(self) -> Attainment:
        """Runs that kept the deadline, of all."""
        return Attainment(sum(latency <= self.bound_s for latency in self.latency_s), len(self.latency_s))

    @property
    def mean_cost_usd(self) -> float:
        return statistics.fmean(self.cost_usd) if self.cost_usd else math.nan

    @property
    def mean_latency_s(self) -> float:
        return statistics.fmean(self.latency_s) if self.latency_s else math.nan


@dataclass(frozen=True)
class Calm:
    """How calm the machine was while the flow was profiled.

    Attributes:
        spread: Standard deviation of the logarithm of times among runs of one setting, as they were measured first:
            0.05 is 5 %.
        load: Processes that wanted a core before the demo began, by the system's average over a minute.
        cores: That there are.
        after: That of all runs, where settings were measured again, as little could be promised by the first time.
    """

    spread: float
    load: float
    cores: int
    after: float | None = None

    @property
    def again(self) -> bool:
        """Whether settings were measured again."""
        return self.after is not None

    def caveat(self, confidence: float) -> str:
        """What a user should know of what is promised then, in sentences; empty on a calm machine."""
        if self.after is None:
            return ""
        wanted = f" ({self.load:.1f} processes wanted one of its {self.cores} before the demo began)"
        busy = wanted if self.load > self.cores / 2 else ""
        words = (
            f"This machine was busy: runs of one setting differed by {self.spread:.0%}, where a few percent are usual. "
            f"Other work seems to take its cores{busy}, so each setting was measured twice as often; "
            f"runs differ by {self.after:.0%} in all."
        )
        if confidence < CONFIDENCE:
            words += (
                f" Deadlines are promised with {confidence:.0%} confidence only: more runs than usual may miss them."
            )
        return f"{words} Run the demo again when nothing else runs."


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured.

    Attributes:
        confidence: With which deadlines are promised.
        calm: How calm the machine was.
        deadlines: One series per deadline, tightest first.
        references: Everything at its largest, at its smallest, and Prefect's default task runner.
        profiling_runs: Runs of the sweep.
        profiling_s: How long it took.
        total_s: The whole demo.
    """

    confidence: float
    calm: Calm
    deadlines: tuple[Series, ...]
    references: tuple[Series, ...]
    profiling_runs: int
    profiling_s: float
    total_s: float

    @property
    def pooled(self) -> Attainment:
        """Over all deadlines."""
        met = sum(series.attainment.met for series in self.deadlines)
        return Attainment(met, sum(series.attainment.runs for series in self.deadlines))

    def to_document(self) -> dict[str, Any]:
        """All figures, for ``--json``."""
        pooled = self.pooled
        return {
            "profiling": {
                "runs": self.profiling_runs,
                "seconds": self.profiling_s,
                "spread": self.calm.spread,
                "spread_again": self.calm.after,
                "load_before": self.calm.load,
                "again": self.calm.again,
            },
            "confidence": self.confidence,
            "deadlines": [_series_document(series) for series in self.deadlines],
            "references": [_series_document(series) for series in self.references],
            "pooled": {"met": pooled.met, "runs": pooled.runs, "interval": list(pooled.interval())},
            "total_s": self.total_s,
        }


def _series_document(series: Series) -> dict[str, Any]:
    predicted = series.plan.predicted if series.plan is not None else None
    document: dict[str, Any] = {
        "name": series.name,
        "latency_s": list(series.latency_s),
        "cost_usd": list(series.cost_usd),
        "predicted_mean_s": predicted.latency_s.mean if predicted else None,
        "predicted_p95_s": predicted.latency_at_percentile_s if predicted else None,
        "predicted_cost_usd": predicted.cost_usd.mean if predicted else None,
    }
    if math.isfinite(series.bound_s):
        kept = series.attainment
        document |= {
            "deadline_s": series.bound_s,
            "met": kept.met,
            "runs": kept.runs,
            "interval": list(kept.interval()),
        }
    return document
