r"""The test that alone may say "feasible": many fresh samples against exact binomial thresholds.

A plan whose true chance of breaking the bound exceeds ε shows at most *k* violations in *N* fresh samples with
probability at most ``P(Bin(N, ε) ≤ k)``, so the largest *k* with that probability ≤ δ decides (exact one-sided binomial
test). The samples must be fresh: those of the search were used to pick the plan. Several tests share the error
budget δ by Bonferroni: attempt *r* spends δ/2ʳ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from prefect_slo.errors import InvalidValue
from prefect_slo.units import fraction, whole

CERTIFY_SAMPLES = 100_000
"""Fresh samples of the test: at ε = 0.05 the threshold lies 0.16–0.21 percentage points under ε."""

SEARCH_SHARE = 0.9
"""The search keeps the bound in all but this share of ε, which leaves room for its samples' luck (about 2σ at 4,000
samples), so that the first test almost never fails."""


@dataclass(frozen=True)
class Verdict:
    """Result of one test.

    Attributes:
        passed: Whether every bound holds at the confidence.
        samples: Fresh samples.
        violations: Samples that broke the worse-kept bound.
        allowed: The most violations that pass.
        error: Probability that a plan which truly breaks its percentile passes.
    """

    passed: bool
    samples: int
    violations: int
    allowed: int
    error: float


def allowed_violations(samples: int, risk: float, error: float) -> int:
    """The most violations of ``samples`` that show a risk below ``risk`` with error probability ``error``.

    The largest *k* with ``P(Bin(samples, risk) ≤ k) ≤ error``; −1 when even none would not show it.

    >>> allowed_violations(100_000, 0.05, 1e-3), allowed_violations(1_000, 0.05, 1e-3)
    (4787, 29)
    """
    whole(samples, "samples")
    fraction(risk, "risk")
    fraction(error, "error")
    k = int(binom.ppf(error, samples, risk))
    return k if binom.cdf(k, samples, risk) <= error else k - 1


def samples_needed(risk: float, error: float) -> int:
    """Fewest samples with which a plan without any violation passes: ``⌈ln error / ln(1 − risk)⌉``.

    >>> samples_needed(0.05, 0.01)
    90
    """
    return int(np.ceil(np.log(fraction(error, "error")) / np.log1p(-fraction(risk, "risk")) - 1e-12))


def hoeffding_samples(risk: float, error: float, log_plans: float, slack: float = 0.0) -> int:
    """Samples that Hoeffding's inequality asks for over a finite set of plans, as published planners use it.

    ``⌈(ln|X| + ln 1/error) / (2 (risk − slack)²)⌉`` (Luedtke and Ahmed 2008, theorem 5; Jolteon, NSDI 2024, section 4).

    >>> import math; hoeffding_samples(0.05, 0.001, 8 / 2 * math.log(28))
    4048
    """
    return int(np.ceil((log_plans - np.log(error)) / (2 * (risk - slack) ** 2)))


def judge(bounds: list[tuple[NDArray[np.floating], float]], percentile: float, error: float) -> Verdict:
    """Test fresh samples of one plan.

    Args:
        bounds: Pairs of samples ``(n_samples,)`` and the bound that they must keep.
        percentile: Fraction of runs that must keep each bound.
        error: Probability of passing a plan that does not.

    Raises:
        InvalidValue: No bound to test.
    """
    if not bounds:
        raise InvalidValue("bounds", bounds, "at least one bound to test")
    samples = len(bounds[0][0])
    allowed = allowed_violations(samples, 1 - percentile, error)
    violations = max(int(np.count_nonzero(values > bound)) for values, bound in bounds)
    return Verdict(violations <= allowed, samples, violations, allowed, error)
