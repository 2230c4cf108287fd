"""What every worker has imported before it is asked for: importing Prefect takes most of a second."""

from __future__ import annotations

PRELOAD = ("prefect", "prefect.main", "prefect.task_engine", "prefect_slo.runner.program")
"""Names of modules."""
