"""What other flows' profiles know of a task: its rows, so that nothing is profiled twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx

from prefect_slo.blocks.profile import SLOProfile
from prefect_slo.telemetry.ledger import Code, Ledger, row_order
from prefect_slo.telemetry.records import RunRecord, StageRecord

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

PAGE = 50
MOST_ROWS = 200  # of one task in one other flow
ELSEWHERE = "flow:"


def known_elsewhere(
    flow_name: str, codes: Iterable[tuple[str, str]], client: SyncPrefectClient
) -> tuple[RunRecord, ...]:
    """Rows of these tasks, at these versions of their code, in the profiles of other flows.

    Args:
        flow_name: The flow that asks.
        codes: Pairs of task key and source hash.
        client: Client for reading.
    """
    wanted, records = set(codes), []
    for other, ledger in _other_ledgers(flow_name, client):
        for code, group in ledger.groups.items():
            if code[1:] in wanted and not code.stage.startswith(ELSEWHERE):
                rows = sorted((row for m in group.values() for row in m.rows), key=row_order)[-MOST_ROWS:]
                records += [_lent(flow_name, other, code, row) for row in rows]
    return tuple(records)


def _lent(flow_name: str, other: str, code: Code, stage: StageRecord) -> RunRecord:
    """One row as a record of its own, under the name of the flow that it was measured in."""
    place = f"{ELSEWHERE}{other}/{code.stage}"
    return RunRecord(
        flow=flow_name,
        run_id=f"{stage.row.run_id}@{place}",
        status="completed",
        started_at=stage.row.started_at,
        stages=(replace(stage, row=replace(stage.row, stage=place)),),
        source=f"{ELSEWHERE}{other}",
    )


def _other_ledgers(flow_name: str, client: SyncPrefectClient) -> Iterator[tuple[str, Ledger]]:
    offset = 0
    while True:
        try:
            page = client.read_block_documents_by_type(SLOProfile.get_block_type_slug(), offset=offset, limit=PAGE)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.NOT_FOUND:  # no profile was ever stored
                return
            raise
        for document in page:
            profile = SLOProfile(**document.data)
            if profile.flow_name != flow_name:
                yield profile.flow_name, profile.ledger()
        offset += len(page)
        if len(page) < PAGE:
            return
