"""Runs in the Prefect API: one append-only artifact a run, which any machine can read.

Artifacts are appended because nothing else in the API is safe under concurrent writers: a block has no version, so that
of 40 concurrent load-change-save updates 30 are lost, while 40 of 40 artifacts arrive.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    ArtifactCollectionFilter,
    ArtifactCollectionFilterType,
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    ArtifactFilterType,
)
from prefect.client.schemas.sorting import ArtifactCollectionSort, ArtifactSort

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import Invocation
from prefect_slo.telemetry import locks
from prefect_slo.telemetry.api import api_client
from prefect_slo.telemetry.impatience import impatient
from prefect_slo.telemetry.log import SUFFIX, RunLog, read_log
from prefect_slo.telemetry.records import RunRecord

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Artifact

TYPE = "slo-telemetry"
MAX_INVOCATIONS = 5_000  # ≈ 200 kB packed; an artifact of 1 MB takes 0.13 s to write, one of 5 MB 0.45 s
PAGE = 50
_logger = logging.getLogger("prefect.slo")


@dataclass(frozen=True)
class Stored:
    """Runs of one artifact.

    Attributes:
        created: When the server stored it.
        records: Its runs; usually one.
    """

    created: datetime
    records: tuple[RunRecord, ...]


@dataclass(frozen=True)
class Swept:
    """What a sweep of left-over logs did.

    Attributes:
        published: Run ids that are in the API now.
        busy: Logs whose writers still live.
        kept: Logs that could not be published; a later sweep tries again.
    """

    published: tuple[str, ...] = ()
    busy: int = 0
    kept: int = 0


def slug(flow_name: str) -> str:
    """The flow's name in lower-case letters, digits and dashes; different names have different slugs."""
    plain = re.sub(r"[^a-z0-9]+", "-", flow_name.lower()).strip("-")
    if plain == flow_name and len(plain) <= 60:
        return plain
    return f"{plain[:60]}-{hashlib.blake2b(flow_name.encode(), digest_size=3).hexdigest()}".strip("-")


def flow_run_of(run_id: str) -> UUID | None:
    """The flow run of a run (later attempts of one carry ``#2``, ``#3``, … behind its id); ``None`` for other names."""
    try:
        return UUID(run_id.partition("#")[0])
    except ValueError:
        return None


def artifact_key(flow_name: str) -> str:
    """Key of the artifacts that hold the flow's runs."""
    return f"{TYPE}-{slug(flow_name)}"


def publish(flow_name: str, records: Sequence[RunRecord], client: SyncPrefectClient | None = None) -> UUID:
    """Append runs as one artifact, and return its id.

    Raises:
        httpx.HTTPError: The API cannot be reached, or refuses.
    """
    documents = [_thinned(record).to_document() for record in records]
    statuses = ", ".join(sorted({record.status for record in records}))
    request = ArtifactCreate(
        key=artifact_key(flow_name),
        type=TYPE,
        description=f"Observations of {len(records)} run(s) of {flow_name} ({statuses}).",
        data={"runs": documents},
        flow_run_id=flow_run_of(records[0].run_id) if len(records) == 1 else None,
    )
    with ExitStack() as stack:
        api = client or stack.enter_context(api_client())
        return api.create_artifact(request).id


def publish_log(log: RunLog, client: SyncPrefectClient | None = None) -> bool:
    """Turn an ended log into an artifact and remove its file; whether that worked.

    Never raises: where the API cannot be reached the file stays for ``sweep_orphans``, and one warning says so.
    """
    try:
        with impatient():
            publish(log.flow_name, [log.record()], client)
    except Exception as error:
        log.close()
        _logger.warning(
            "Telemetry of run %s is kept in %s until the API can be reached (%s: %s).",
            log.run_id, log.path or "no file: it is lost", type(error).__name__, error,
        )  # fmt: skip
        return False
    log.discard()
    return True


def sweep_orphans(directory: str | Path, client: SyncPrefectClient | None = None) -> Swept:
    """Publish the logs that crashed or offline runs have left behind, each once.

    Never raises for a bad log or an API that is down: what can't be published stays for the next sweep.
    """
    published: list[str] = []
    busy = kept = 0
    with ExitStack() as stack:
        stack.enter_context(impatient())
        api = client
        for path in sorted(Path(directory).glob(f"*{SUFFIX}")):
            try:
                with path.open("rb+") as file:
                    if not locks.hold(file.fileno()):
                        busy += 1
                        continue
                    record = read_log(path)
                    if record is not None:
                        api = api or stack.enter_context(api_client())
                        if not _is_stored(record, api):
                            publish(record.flow, [record], api)
                        published.append(record.run_id)
                path.unlink(missing_ok=True)
            except FileNotFoundError:  # another sweep was quicker
                continue
            except Exception as error:
                kept += 1
                _logger.warning("Telemetry is kept in %s (%s: %s).", path, type(error).__name__, error)
                if not isinstance(error, (httpx.HTTPStatusError, OSError)):
                    break  # nobody answers: the next log would fare no better
    return Swept(tuple(published), busy, kept)


def read_runs(
    flow_name: str, *, since: datetime | None = None, client: SyncPrefectClient | None = None
) -> Iterator[Stored]:
    """The flow's stored runs, newest first; what was stored before ``since`` is left out.

    A damaged artifact, or one of a newer version of this package, is skipped with a warning.
    """
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key(flow_name)]), type=ArtifactFilterType(any_=[TYPE]))
    seen: set[UUID] = set()
    with ExitStack() as stack:
        api = client or stack.enter_context(api_client())
        while True:
            # artifacts that arrive meanwhile push older ones to a later page: seen twice, never missed
            page = api.read_artifacts(
                artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC, limit=PAGE, offset=len(seen)
            )
            fresh = [artifact for artifact in page if artifact.id not in seen]
            for artifact in fresh:
                created = artifact.created
                assert created is not None  # the server sets it
                if since is not None and created < since:
                    return
                seen.add(artifact.id)
                yield Stored(created, _records(artifact))
            if len(page) < PAGE or not fresh:
                return


def observed_flows(client: SyncPrefectClient | None = None) -> tuple[str, ...]:
    """Names of the flows that have stored runs, sorted."""
    names: set[str] = set()
    wanted = ArtifactCollectionFilter(type=ArtifactCollectionFilterType(any_=[TYPE]))
    with ExitStack() as stack:
        api = client or stack.enter_context(api_client())
        offset = 0
        while page := api.read_latest_artifacts(
            artifact_filter=wanted, sort=ArtifactCollectionSort.KEY_ASC, limit=PAGE, offset=offset
        ):
            offset += len(page)
            names |= {str(entry["flow"]) for artifact in page for entry in _entries(artifact.data) if "flow" in entry}
    return tuple(sorted(names))


def _records(artifact: Artifact) -> tuple[RunRecord, ...]:
    try:
        return tuple(RunRecord.from_document(entry) for entry in _entries(artifact.data))
    except InvalidObservation as error:
        _logger.warning("Artifact %s of %s is left out: %s", artifact.id, artifact.key, error)
        return ()


def _entries(data: object) -> list[dict[str, object]]:
    runs = data.get("runs") if isinstance(data, dict) else None
    return [entry for entry in runs if isinstance(entry, dict)] if isinstance(runs, list) else []


def _is_stored(record: RunRecord, api: SyncPrefectClient) -> bool:
    """Whether an earlier attempt to publish did arrive, though its answer didn't."""
    flow_run_id = flow_run_of(record.run_id)
    if flow_run_id is None:
        return any(
            record.run_id == other.run_id for stored in read_runs(record.flow, client=api) for other in stored.records
        )
    wanted = ArtifactFilter(
        key=ArtifactFilterKey(any_=[artifact_key(record.flow)]),
        flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]),
    )
    found = api.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC, limit=PAGE)
    return any(entry.get("run_id") == record.run_id for artifact in found for entry in _entries(artifact.data))


def _thinned(record: RunRecord) -> RunRecord:
    """The record with evenly chosen invocations where there are too many; stage runs are always whole."""
    total = len(record.invocations)
    if total <= MAX_INVOCATIONS:
        return record
    chosen: tuple[Invocation, ...] = tuple(
        record.invocations[i * total // MAX_INVOCATIONS] for i in range(MAX_INVOCATIONS)
    )
    return replace(record, invocations=chosen, facts={**record.facts, "invocations_seen": total})
