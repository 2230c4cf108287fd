"""What may be done to a plan beside sizing: how data passes from stage to stage."""

from __future__ import annotations

from prefect_slo.transform.edge_plans import with_passing
from prefect_slo.transform.passing import DataStage, Links, Passing, Transfer, best_passing, direct_until, slots_of

__all__ = ["DataStage", "Links", "Passing", "Transfer", "best_passing", "direct_until", "slots_of", "with_passing"]
