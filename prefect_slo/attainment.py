"""How often the bound was kept in real runs, and how sure that makes us."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prefect_slo.errors import InvalidValue
from prefect_slo.units import fraction, whole


@dataclass(frozen=True)
class Attainment:
    """Runs that kept the bound, of all runs that completed or timed out. Failed and cancelled runs don't count.

    Attributes:
        met: Runs that kept the bound.
        runs: Runs that completed or timed out.
    """

    met: int
    runs: int

    def __post_init__(self) -> None:
        whole(self.runs, "runs", least=0)
        if whole(self.met, "met", least=0) > self.runs:
            raise InvalidValue("met", self.met, f"at most the number of runs, {self.runs}")

    @property
    def share(self) -> float:
        """Fraction of runs that kept the bound; ``nan`` before the first."""
        return self.met / self.runs if self.runs else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided interval of Clopper and Pearson (1934) for the true fraction.

        The bounds are the quantiles α/2 of Beta(k, n − k + 1) and 1 − α/2 of Beta(k + 1, n − k), with k = ``met``,
        n = ``runs`` and α = 1 − confidence: it covers the truth with *at least* this confidence. (0, 1) without runs.

        >>> [round(end, 3) for end in Attainment(95, 100).interval(0.95)]
        [0.887, 0.984]
        """
        from scipy.special import betaincinv

        alpha = 1 - fraction(confidence, "confidence")
        missed = self.runs - self.met
        low = float(betaincinv(self.met, missed + 1, alpha / 2)) if self.met else 0.0
        high = float(betaincinv(self.met + 1, missed, 1 - alpha / 2)) if missed else 1.0
        return low, high


def runs_for_claim(percentile: float = 0.95, confidence: float = 0.99) -> int:
    """Fewest runs, none of which misses, that support "at least ``percentile`` of runs keep the bound".

    n = ⌈log(1 − confidence) / log(percentile)⌉ (Wilks 1941): 90 runs for 95 % at 99 %.
    """
    fraction(percentile, "percentile")
    return math.ceil(math.log(1 - fraction(confidence, "confidence")) / math.log(percentile))
