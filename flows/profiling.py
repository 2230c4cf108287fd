"""Run a decorated flow at different settings until it can be planned; deploy it, or run it once.

``python flows/profiling.py examples/ml_pipeline/flow.py:ml_pipeline``
"""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow, get_run_logger

from prefect_slo.cli.flows import load_flow
from prefect_slo.loop.profiling import profile as sweep


@flow(name="slo-profile")
def profile(
    entrypoint: str,
    inputs: list[dict[str, Any]] | None = None,
    max_seconds: float = 600.0,
    max_usd: float | None = None,
    repeats: int = 2,
) -> bool:
    """Measure a flow.

    Args:
        entrypoint: ``package.module:flow`` or ``path/to/file.py:flow``, decorated with ``@slo``.
        inputs: Parameters of the runs, taken in turn; none by default.
        max_seconds: No run is begun that would end later than this.
        max_usd: No run is begun that would cost more than is left of this.
        repeats: Runs per setting.

    Returns:
        Whether the flow can be planned now.
    """
    cap = float("inf") if max_usd is None else max_usd
    found = sweep(load_flow(entrypoint), inputs or [{}], max_seconds=max_seconds, max_usd=cap, repeats=repeats)
    get_run_logger().info("%d runs in %.0f s; %s.", len(found.runs), found.seconds, found.stopped)
    return found.identified


if __name__ == "__main__":
    profile(sys.argv[1])
