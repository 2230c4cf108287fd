"""How flows stand, as artifacts: bound, plan in force, how often it was kept; deploy it, or run it once.

``python flows/report.py`` reports every flow that has telemetry.
"""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from prefect_slo.artifacts.publishing import key
from prefect_slo.loop.maintenance import for_each
from prefect_slo.loop.reporting import report as report_of


@flow(name="slo-report")
def report(flow_name: str | None = None) -> dict[str, str]:
    """Publish ``slo-report-<flow>`` for each flow.

    Args:
        flow_name: Name of a flow; all that have telemetry where it is missing.

    Returns:
        The report by flow name.
    """

    def publish(name: str) -> str:
        text = "\n\n".join(report_of(name).lines())
        create_markdown_artifact(text, key=key("report", name), description=f"How {name} stands.")
        return text

    return for_each(flow_name, publish)


if __name__ == "__main__":
    for text in report().values():
        print(text)
