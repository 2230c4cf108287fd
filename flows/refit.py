"""Fold what runs have left in the API into profiles and fit their models again; deploy it, or run it once.

``python flows/refit.py`` refits every flow that has telemetry.
"""

from __future__ import annotations

from prefect import flow, get_run_logger

from prefect_slo.blocks import fold_in, rebuild_profile
from prefect_slo.settings import SLOSettings
from prefect_slo.telemetry.store import observed_flows, sweep_orphans


@flow(name="slo-refit")
def refit(flow_name: str | None = None, rebuild: bool = False) -> dict[str, int]:
    """Bring profiles up to date.

    Args:
        flow_name: Name of a flow; all that have telemetry where it is missing.
        rebuild: Learn everything anew from the API, instead of adding what is new.

    Returns:
        Revision of each profile by flow name.
    """
    logger = get_run_logger()
    swept = sweep_orphans(SLOSettings().telemetry_directory)
    if swept.published:
        logger.info("Published %d runs that crashed or were offline.", len(swept.published))
    revisions = {}
    for name in (flow_name,) if flow_name else observed_flows():
        profile = rebuild_profile(name) if rebuild else fold_in(name, refit=True)
        revisions[name] = profile.revision
        logger.info("%s, revision %d: %s", name, profile.revision, profile.fit_note or "; ".join(profile.stages))
    return revisions


if __name__ == "__main__":
    refit()
