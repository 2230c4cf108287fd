"""What a plan says of its stages, and what a run made of it: the values that the views show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageForecast:
    """What a plan predicts of one stage, under the model.

    Attributes:
        mean_s: Mean wall time.
        p95_s: 95th percentile of wall time.
        cost_usd: Mean cost; ``nan`` where unknown.
        critical: Probability that the stage lies on the longest path.
    """

    mean_s: float
    p95_s: float
    cost_usd: float = math.nan
    critical: float = 0.0


@dataclass(frozen=True)
class RunActual:
    """What one run of a plan took.

    Attributes:
        latency_s: Latency of the run.
        cost_usd: Its cost; ``nan`` where unknown.
        stages: Wall time of every stage that ran, in seconds.
    """

    latency_s: float
    cost_usd: float = math.nan
    stages: Mapping[str, float] = field(default_factory=dict)
