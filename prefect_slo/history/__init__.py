"""Learning from runs that Prefect has recorded anyway."""

from __future__ import annotations

from prefect_slo.history.importing import History, import_history
from prefect_slo.history.timing import submitted_at

__all__ = ["History", "import_history", "submitted_at"]
