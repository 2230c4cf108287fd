"""Three deadlines worth asking a flow for: what its fastest plan can promise, what its cheapest can, one between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefect_slo.errors import InfeasibleSlo, Nearest
from prefect_slo.objective import Latency, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner.make import make_plan
from prefect_slo.planner.sampling import TableSource

TIGHT, LOOSE = 1.05, 1.02
"""The tightest deadline is 5 % over the nearest that can be kept, the loosest 2 % over what the cheapest plan keeps."""

MOSTLY = 0.5
"""A deadline of which more than half is there because few runs leave much open says more of these than of the flow."""

NEVER_S, EVER_S = 0.001, 3600.0
"""What no plan keeps, and what any does."""


@dataclass(frozen=True)
class Deadlines:
    """Deadlines that a model can promise.

    Attributes:
        bounds_s: The tightest, one halfway, and one that the cheapest plan keeps.
        confidence: With which they are promised.
        unsure: Share of the tightest that is there because few runs leave much open, in [0, 1).
    """

    bounds_s: tuple[float, float, float]
    confidence: float
    unsure: float

    @property
    def tell(self) -> bool:
        """Whether they say more of the flow than of how little is known of it."""
        return self.unsure <= MOSTLY


def deadlines(model: TableSource, *, seed: int, confidence: float = 0.99) -> Deadlines:
    """Three deadlines that differ in what they need.

    Args:
        model: Of the flow.
        seed: Of the planner's draws.
        confidence: That of a promise.
    """
    cheapest = make_plan(model, Slo(latency=Latency(EVER_S, confidence=confidence)), seed=seed)
    nearest = _nearest(model, seed, confidence)
    tight = TIGHT * nearest.bound
    loose = max(LOOSE * _nearest(model, seed, confidence, cheapest).bound, tight)
    low, middle, high = (math.ceil(100 * bound) / 100 for bound in (tight, (tight + loose) / 2, loose))
    return Deadlines((low, middle, high), confidence, nearest.unsure)


def telling(model: TableSource, *, seed: int, confidences: Sequence[float]) -> Deadlines:
    """Deadlines with the first of some confidences, largest first, with which they tell much; else with the last."""
    for confidence in confidences:
        found = deadlines(model, seed=seed, confidence=confidence)
        if found.tell:
            break
    return found


def _nearest(model: TableSource, seed: int, confidence: float, plan: Plan | None = None) -> Nearest:
    """The nearest deadline that can be promised, by any plan or by this one."""
    try:
        make_plan(model, Latency(NEVER_S, confidence=confidence), seed=seed, pins=_pins(plan) if plan else None)
    except InfeasibleSlo as error:
        if error.nearest is None:
            raise
        return error.nearest
    return Nearest(NEVER_S, NEVER_S, 0.0)


def _pins(plan: Plan) -> Mapping[str, Mapping[str, object]]:
    return {
        name: {
            "workers": stage.workers,
            "size": stage.size,
            "pool": stage.pool,
            "batch": stage.batch,
            **dict(stage.knobs),
        }
        for name, stage in plan.stages.items()
    }
