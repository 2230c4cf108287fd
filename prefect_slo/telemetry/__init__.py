"""The store of observations: a log while a run goes on, one artifact when it has ended, a ledger of what is known."""

from __future__ import annotations

from prefect_slo.telemetry.log import RunLog, read_log
from prefect_slo.telemetry.records import RunRecord, StageKey, StageRecord, Status

__all__ = ["RunLog", "RunRecord", "StageKey", "StageRecord", "Status", "read_log"]
