"""Values that pass through Prefect's engine here while they lie elsewhere: what stands for them there.

Where Prefect's engine runs in the flow's process and only functions travel, a result that has stayed on its pool's
storage is a ``KeptRecord`` outside the engine and an ``Elsewhere`` inside it. That is only so for tasks whose engine
needs no values (``needs_no_values``): else arguments come here first, and results at once.
"""

from __future__ import annotations

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State
from prefect.results import ResultRecord, ResultRecordMetadata  # type: ignore[attr-defined]
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection

from prefect_slo.declaration import batched_names
from prefect_slo.runner.backends.protocol import Kept
from prefect_slo.runner.calls import Raised, Returned, Several
from prefect_slo.runner.deposits import Deposit, KeptRecord, plain_record


class Elsewhere:
    """Stands for a value that lies where it was made."""

    __slots__ = ("__weakref__", "kept")  # Prefect links results by id, and sees by a weak reference which are gone

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __reduce__(self) -> tuple[Any, ...]:  # for keys of caches: equal for one value, and never for two
        return str, (str(self.kept),)


def needs_no_values(task: Task[Any, Any], *, persisted: bool) -> bool:
    """Whether Prefect's engine looks at no argument and no result of a task: it stores, hashes, names and tells none.

    Args:
        task: The task.
        persisted: Whether its results are persisted, by itself or by default.
    """
    told = task.on_completion_hooks + task.on_commit_hooks + task.on_rollback_hooks
    looks = (told, task.task_run_name, task.cache_expiration, task.cache_key_fn, task.result_storage_key)
    return not (persisted or any(looks) or task.isgenerator or batched_names(task))


def referred(parameters: dict[str, Any], place: object) -> dict[str, Any]:
    """Parameters in which results that lie at a place are stood for.

    Raises:
        ResultLost: One can't be had any more.
    """

    def replace(found: Any, context: dict[str, Any]) -> Any:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        if isinstance(found, State) and isinstance(found.data, KeptRecord):
            if (kept := found.data.at(place)) is None:
                return found
            record = plain_record(Elsewhere(kept), found.data.metadata, persisted=False)
            return found.model_copy(update={"data": record})
        return found

    return {
        name: visit_collection(value, replace, return_data=True, max_depth=-1, context={})
        for name, value in parameters.items()
    }


def deposited(result: State[Any] | Returned | Raised | Several) -> Any:
    """What came of a call; a value that has stayed elsewhere comes when its record is first read."""
    if isinstance(result, Returned) and isinstance(result.value, Elsewhere):
        return Returned(_record(result.value, ResultRecordMetadata()))
    if isinstance(result, State) and isinstance(result.data, ResultRecord):
        value = result.data.result
        if isinstance(value, Elsewhere):
            return result.model_copy(update={"data": _record(value, result.data.metadata)})
    return result


def _record(value: Elsewhere, metadata: ResultRecordMetadata) -> KeptRecord:
    return KeptRecord.of(Deposit(value.kept), metadata, persisted=False)
