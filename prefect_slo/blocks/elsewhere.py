"""What other flows' profiles know of a task: its rows, so that nothing is profiled twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

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
    """Ledgers of all other profiles, in the order of their names: what is written meanwhile hides none of them."""
    wanted = {"block_types": {"slug": {"any_": [SLOProfile.get_block_type_slug()]}}, "include_secrets": True}
    for page in count():
        # the client's own read_block_documents_by_type sends limit and offset where the server doesn't look for them
        answer = client.request(
            "POST", "/block_documents/filter", json={**wanted, "sort": "NAME_ASC", "limit": PAGE, "offset": page * PAGE}
        )
        documents = answer.json()
        for document in documents:
            profile = SLOProfile(**document["data"])
            if profile.flow_name != flow_name:
                yield profile.flow_name, profile.ledger()
        if len(documents) < PAGE:
            return
