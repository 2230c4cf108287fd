"""What real runs say about predictions: claims *in your runs*, apart from claims *under the model*.

The score of a run is actual over predicted, at the percentile that was promised. Scores of past runs of the same plan
are exchangeable with the next one's, so that order statistics of them bound it without any model (split conformal
prediction; Vovk et al. 2005, Lei et al. 2018): the ⌈(n+1)·q⌉-th smallest keeps the next run with chance q, and the k-th
smallest bounds the q-quantile with confidence γ when P(Binomial(n, q) ≤ k − 1) ≥ γ. The second takes 90 runs for a P95
at 99 %. Choosing a plan by its scores breaks exchangeability, so a calibration belongs to the plan that was run.

Under drift the level adapts (Gibbs and Candès 2021): after a miss the next quantile is taken further out, after a hit a
little nearer. Misses in the long run are then as many as promised, unless scores keep growing: the level is clipped at
0, where the factor is the largest score kept, and that too is exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from scipy.stats import binom

from prefect_slo.errors import InvalidValue
from prefect_slo.units import finite, fraction, positive

_KEPT = 500
_STEP = 0.02
_HIGHEST = 0.5
_RECENT = 40
_ALARM = 0.01


@dataclass(frozen=True)
class Claim:
    """What real runs allow to be claimed.

    Attributes:
        factor: Multiply the prediction by it to have a bound; ``None`` when there are too few runs for any.
        runs: Runs behind it.
        needed: Runs that the claim takes at least.
    """

    factor: float | None
    runs: int
    needed: int

    @property
    def holds(self) -> bool:
        """Whether the prediction itself, without a factor, is such a bound."""
        return self.factor is not None and self.factor <= 1.0


@dataclass(frozen=True)
class Calibration:
    """Scores of the runs of one plan.

    Attributes:
        percentile: Quantile that was predicted, *q*.
        scores: Actual over predicted, oldest first; the latest 500.
        level: Share of misses that the adaptive factor aims at now; ``None`` means 1 − q.
    """

    percentile: float = 0.95
    scores: tuple[float, ...] = field(default=())
    level: float | None = None

    def __post_init__(self) -> None:
        fraction(self.percentile, "percentile")

    def observe(self, actual: float, predicted: float) -> Calibration:
        """With one more run: what it took, and what was predicted at the percentile.

        Raises:
            InvalidValue: Either is not a positive, finite number.
        """
        score = positive(actual, "actual") / positive(predicted, "predicted")
        target, level = 1.0 - self.percentile, self._level
        missed = float(score > self.adaptive_factor)
        moved = float(np.clip(level + _STEP * (target - missed), 0.0, _HIGHEST))
        return replace(self, scores=(*self.scores, score)[-_KEPT:], level=moved)

    @property
    def adaptive_factor(self) -> float:
        """Factor for the next run, under drift; 1 until there are scores enough for the level."""
        n = len(self.scores)
        rank = int(np.ceil((n + 1) * (1.0 - self._level) - 1e-9))
        if n < runs_needed(self.percentile):
            return 1.0
        return float(np.sort(self.scores)[min(rank, n) - 1])

    @property
    def planning_factor(self) -> float:
        """What to divide a bound by when planning: the adaptive factor where it is above 1.

        Runs that stay below the prediction loosen nothing: a plan made for a larger bound is another plan.
        """
        return max(self.adaptive_factor, 1.0)

    def next_run(self) -> Claim:
        """Bound that the next run keeps with chance q, on average over calibrations."""
        n, needed = len(self.scores), runs_needed(self.percentile)
        if n < needed:
            return Claim(None, n, needed)
        rank = int(np.ceil((n + 1) * self.percentile - 1e-9))
        return Claim(float(np.sort(self.scores)[rank - 1]), n, needed)

    def quantile(self, confidence: float = 0.99) -> Claim:
        """Bound of the q-quantile of future runs, with this confidence."""
        n, needed = len(self.scores), runs_needed(self.percentile, confidence)
        if n < needed:
            return Claim(None, n, needed)
        below = binom.cdf(np.arange(n), n, self.percentile)
        rank = int(np.argmax(below >= confidence)) + 1
        return Claim(float(np.sort(self.scores)[rank - 1]), n, needed)

    @property
    def drifting(self) -> bool:
        """Whether the latest 40 runs missed the prediction too often to be chance (binomial test at 1 %)."""
        recent = self.scores[-_RECENT:]
        misses = sum(score > 1.0 for score in recent)
        return bool(recent) and bool(binom.sf(misses - 1, len(recent), 1.0 - self.percentile) < _ALARM)

    def to_document(self) -> dict[str, Any]:
        """JSON-able; ``from_document`` reads it back."""
        return {"percentile": self.percentile, "scores": list(self.scores), "level": self.level}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """Read what ``to_document`` wrote.

        Raises:
            InvalidValue: A field is missing, a score is no positive, finite number, or the level lies outside [0, 0.5].
        """
        if not isinstance(document, dict):
            raise InvalidValue("calibration", document, "what to_document() returns")
        try:
            percentile, scores, level = (document[name] for name in ("percentile", "scores", "level"))
        except KeyError as error:
            raise InvalidValue("calibration", sorted(document), f"the field {error}") from None
        if not isinstance(scores, Sequence) or isinstance(scores, str):
            raise InvalidValue("calibration.scores", scores, "a list of numbers above 0")
        checked = tuple(positive(score, f"calibration.scores[{i}]") for i, score in enumerate(scores))
        if level is not None and not 0.0 <= finite(level, "calibration.level") <= _HIGHEST:
            raise InvalidValue("calibration.level", level, f"a share of misses from 0 to {_HIGHEST:g}, or null")
        return cls(fraction(percentile, "calibration.percentile"), checked, level)

    @property
    def _level(self) -> float:
        return 1.0 - self.percentile if self.level is None else self.level


def runs_needed(percentile: float, confidence: float | None = None) -> int:
    """Runs that a claim takes at least: 19 for the next run at 95 %, 90 for the P95 with confidence 99 %."""
    fraction(percentile, "percentile")
    if confidence is None:
        return int(np.ceil(percentile / (1.0 - percentile) - 1e-9))
    fraction(confidence, "confidence")
    return int(np.ceil(np.log(1.0 - confidence) / np.log(percentile) - 1e-9))
