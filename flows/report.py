"""How flows stand, as artifacts: bound, plan in force, how often it was kept; deploy it, or run it once.

``python flows/report.py`` reports every flow that has telemetry.
"""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from prefect_slo.artifacts.publishing import key
from prefect_slo.loop.reporting import report as report_of
from prefect_slo.telemetry.store import observed_flows


@flow(name="slo-report")
def report(flow_name: str | None = None) -> dict[str, str]:
    """Publish ``slo-report-<flow>`` for each flow.

    Args:
        flow_name: Name of a flow; all that have telemetry where it is missing.

    Returns:
        The report by flow name.
    """
    found = {}
    for name in (flow_name,) if flow_name else observed_flows():
        found[name] = "\n\n".join(report_of(name).lines())
        create_markdown_artifact(found[name], key=key("report", name), description=f"How {name} stands.")
    return found


if __name__ == "__main__":
    for text in report().values():
        print(text)
