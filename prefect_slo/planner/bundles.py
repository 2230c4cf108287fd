"""What is recorded of each item and how many items travel together, from predicted item time and fan-out."""

from __future__ import annotations

from dataclasses import replace

from prefect_slo.granularity import bundle_size, record_level
from prefect_slo.plan import StagePlan
from prefect_slo.units import finite, whole


def bundled(stage: StagePlan, item_s: float, items: int) -> StagePlan:
    """A stage plan with its record level and bundle size chosen.

    Args:
        stage: The plan of the stage.
        item_s: Predicted seconds of one item (of one call, where items are batched).
        items: Predicted fan-out, in calls.

    Raises:
        InvalidValue: A negative time or fan-out.
    """
    items = whole(items, "items", least=0)
    item_s = max(0.0, finite(item_s, "item_s"))
    bundle = bundle_size(items, stage.workers, item_s) if items else None
    return replace(stage, record=record_level(items, item_s), bundle=bundle)
