"""When to learn, when to change plans, when to go back: pure rules, with their numbers and reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prefect_slo.objective import Slo

if TYPE_CHECKING:
    from prefect_slo.models.calibration import Calibration

MARGIN = 0.05
"""A new plan replaces the one in force when it is 5 % better: less is within what the model's noise turns over."""

LEARN_EACH = 8
LEARN_SHARE = 0.25
"""The first runs are learned from one by one; later, when a quarter more has come than the model has seen."""

SUSPICION = 0.01
"""A plan is distrusted when so many misses, or more, had a chance below 1 %."""

PROOF = 3
"""Runs that a plan must have had before it can be gone back to: fewer would say nothing against two misses."""

DRIFT_RUNS = 5
DRIFT_FACTOR = 1.25
"""Five runs in a row whose latency is a quarter off what was predicted on average: the work has changed."""


@dataclass(frozen=True)
class PastRun:
    """What the rules look at of a run that completed or timed out.

    Attributes:
        plan: Digest of the plan that it followed; empty where it followed none.
        latency_s: What it took.
        predicted_s: Mean latency that its plan predicted; ``nan`` where it followed none.
        cost_usd: What it cost.
        timed_out: Whether it ended by the flow's own timeout: then it took ``latency_s`` at least, and missed.
    """

    plan: str
    latency_s: float
    predicted_s: float = math.nan
    cost_usd: float = math.nan
    timed_out: bool = False

    def met(self, slo: Slo) -> bool:
        """Whether it kept a bound, be it the one that held then or another; what is unknown kept it."""
        late = slo.latency is not None and self.latency_s > slo.latency.bound_s
        dear = slo.budget is not None and self.cost_usd > slo.budget.bound_usd
        return not (late or dear or self.timed_out)


def due(new_runs: int, learned_runs: int, *, drifting: bool = False) -> bool:
    """Whether it is time to fold new runs in, fit and plan again."""
    if new_runs <= 0:
        return False
    return drifting or learned_runs < LEARN_EACH or new_runs >= LEARN_SHARE * learned_runs


def keep(in_force: float, candidate: float, margin: float = MARGIN) -> bool:
    """Whether a plan stays in force beside a candidate that is not better by ``margin``; both are minimised."""
    return not candidate < (1 - margin) * in_force


def distrusted(runs: Sequence[PastRun], plan: str, slo: Slo) -> bool:
    """Whether a plan misses the bound more often than its percentile allows for.

    The misses among the runs that followed it are compared with Binomial(n, 1 − percentile), one-sided.
    """
    followed = [run for run in runs if run.plan == plan]
    misses = sum(not run.met(slo) for run in followed)
    if misses <= 1:
        return False
    from scipy.stats import binom

    return float(binom.sf(misses - 1, len(followed), 1 - slo.percentile)) < SUSPICION


def trusted(runs: Sequence[PastRun], plan: str, slo: Slo) -> bool:
    """Whether a plan was tried and may be gone back to: followed by ``PROOF`` runs, and not distrusted."""
    return sum(run.plan == plan for run in runs) >= PROOF and not distrusted(runs, plan, slo)


def drifting(runs: Sequence[PastRun]) -> bool:
    """Whether the newest runs are all off their prediction to the same side by more than ``DRIFT_FACTOR``."""
    ratios = [run.latency_s / run.predicted_s for run in runs if math.isfinite(run.predicted_s)][-DRIFT_RUNS:]
    if len(ratios) < DRIFT_RUNS:
        return False
    return min(ratios) > DRIFT_FACTOR or max(ratios) < 1 / DRIFT_FACTOR


def calibration(runs: Sequence[PastRun], plan: str, slo: Slo, predicted: float) -> Calibration:
    """What the runs that followed a plan took (under a budget: cost), over the percentile that is predicted."""
    from prefect_slo.models.calibration import Calibration

    found = Calibration(slo.percentile)
    for run in runs:
        value = run.latency_s if slo.latency is not None else run.cost_usd
        if run.plan == plan and math.isfinite(value) and value > 0 and predicted > 0:
            found = found.observe(value, predicted)
    return found


def correction(runs: Sequence[PastRun], plan: str, slo: Slo, predicted: float) -> float:
    """What to divide the leading bound by so that a plan that missed too often would have kept it; at least 1.

    With runs enough it is the conformal factor that adapts to drift; before, the largest score so far.
    """
    from prefect_slo.models.calibration import runs_needed

    found = calibration(runs, plan, slo, predicted)
    if len(found.scores) >= runs_needed(slo.percentile):
        return found.planning_factor
    return max(1.0, *found.scores) if found.scores else 1.0


def proven(calibration: Calibration, confidence: float, room: float) -> int:
    """Real runs behind the claim that a plan keeps its bound: all of them, 0 where they are enough and disprove it.

    Args:
        calibration: Scores of the plan's runs.
        confidence: Of the claim.
        room: The bound over the percentile that is predicted.
    """
    claim = calibration.quantile(confidence)
    return claim.runs if claim.factor is None or claim.factor <= room else 0


def explores(budget: float, rng: np.random.Generator) -> bool:
    """Whether this run may try something that was never measured; ``budget`` is the fraction of runs that may."""
    return bool(rng.random() < budget)
