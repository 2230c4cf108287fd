"""When to learn, when to change plans, when to go back: pure rules, with their numbers and reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

MARGIN = 0.05
"""A new plan replaces the one in force when it is 5 % better: less is within what the model's noise turns over."""

LEARN_EACH = 8
LEARN_SHARE = 0.25
"""The first runs are learned from one by one; later, when a quarter more has come than the model has seen."""

SUSPICION = 0.01
"""A plan is distrusted when so many misses, or more, had a chance below 1 %."""

DRIFT_RUNS = 5
DRIFT_FACTOR = 1.25
"""Five runs in a row whose latency is a quarter off what was predicted on average: the work has changed."""


@dataclass(frozen=True)
class PastRun:
    """What the rules look at of a run.

    Attributes:
        plan: Digest of the plan that it followed; empty where it followed none.
        latency_s: What it took.
        predicted_s: Mean latency that its plan predicted; ``nan`` where it followed none.
        met: Whether it kept the bound.
    """

    plan: str
    latency_s: float
    predicted_s: float = math.nan
    met: bool = True


def due(new_runs: int, learned_runs: int, *, drifting: bool = False) -> bool:
    """Whether it is time to fold new runs in, fit and plan again."""
    if new_runs <= 0:
        return False
    return drifting or learned_runs < LEARN_EACH or new_runs >= LEARN_SHARE * learned_runs


def keep(in_force: float, candidate: float) -> bool:
    """Whether a plan stays in force beside a candidate; both objectives are minimised."""
    return not candidate < (1 - MARGIN) * in_force


def distrusted(runs: Sequence[PastRun], plan: str, percentile: float) -> bool:
    """Whether a plan misses its bound more often than its percentile allows for.

    The misses among the runs that followed it are compared with Binomial(n, 1 − percentile), one-sided.
    """
    followed = [run for run in runs if run.plan == plan]
    misses = sum(not run.met for run in followed)
    return misses > 1 and float(binom.sf(misses - 1, len(followed), 1 - percentile)) < SUSPICION


def drifting(runs: Sequence[PastRun]) -> bool:
    """Whether the newest runs are all off their prediction to the same side by more than ``DRIFT_FACTOR``."""
    ratios = [run.latency_s / run.predicted_s for run in runs if math.isfinite(run.predicted_s)][-DRIFT_RUNS:]
    if len(ratios) < DRIFT_RUNS:
        return False
    return min(ratios) > DRIFT_FACTOR or max(ratios) < 1 / DRIFT_FACTOR


def correction(runs: Sequence[PastRun], plan: str, percentile: float, predicted_s: float) -> float:
    """What to divide the bound by so that a plan that missed too often would have kept it.

    The empirical percentile (rounded up in rank, as split conformal prediction does) of the latencies of the runs that
    followed the plan, over the percentile that was predicted; at least 1.
    """
    latencies = sorted(run.latency_s for run in runs if run.plan == plan)
    if not latencies or not predicted_s > 0:
        return 1.0
    rank = min(math.ceil((len(latencies) + 1) * percentile), len(latencies))
    return max(1.0, float(latencies[rank - 1] / predicted_s))


def explores(budget: float, rng: np.random.Generator) -> bool:
    """Whether this run may try something that was never measured; ``budget`` is the fraction of runs that may."""
    return bool(rng.random() < budget)
