"""Pilots' jobs as Prefect's API knows them: their deployment, their flow runs, and the state of their work pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, StateType, WorkPool, WorkPoolStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Cancelling, Crashed

from prefect_slo.errors import WorkPoolUnusable
from prefect_slo.runner.workpool.job import ENTRYPOINT, FLOW
from prefect_slo.runner.workpool.pilot import VERSION, Order
from prefect_slo.telemetry.api import api_client

TAG = "prefect-slo"
_PAGE = 200

Found = Literal["unbegun", "starting", "running", "over"]
"""How far a job had come that is wanted no more: one that nobody has begun to start never runs, one that its worker
starts is ended by it, and one that runs may go on until it reads that it is to go home."""


def work_pool(client: SyncPrefectClient, name: str) -> WorkPool:
    """A work pool as the server has it.

    Args:
        client: Asks it.
        name: Of the pool.

    Raises:
        WorkPoolUnusable: There is none of that name.
    """
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        then = f"Create it (prefect work-pool create {name!r}) or name another one."
        raise WorkPoolUnusable(name, "does not exist", then) from None


class Jobs:
    """Jobs in one work pool.

    Args:
        pool: Its name.
        address: Of the API; ``None`` as the settings say.
        queue: Work queue of the pool; ``None`` for its default.
    """

    def __init__(self, pool: str, address: str | None, queue: str | None = None) -> None:
        self._pool, self._address, self._queue = pool, address, queue
        self._deployment: UUID | None = None
        self._stale = False
        self._client: SyncPrefectClient | None = None

    def work_pool(self) -> WorkPool:
        """The pool as the server has it.

        Raises:
            WorkPoolUnusable: There is none of that name.
        """
        with self._api() as client:
            return work_pool(client, self._pool)

    def prepare(self) -> None:
        """Make the deployment of pilots in the pool, or bring it up to date; changes nothing that is right."""
        wanted: dict[str, Any] = {
            "version": VERSION,
            "entrypoint": ENTRYPOINT,
            "work_pool_name": self._pool,
            "work_queue_name": self._queue,
        }
        with self._api() as client:
            try:
                found = client.read_deployment_by_name(f"{FLOW}/{self._pool}")
            except ObjectNotFound:
                found = None
            told = {name: value for name, value in wanted.items() if value is not None}
            if found is None or any(getattr(found, name) != value for name, value in told.items()):
                self._deployment = client.create_deployment(
                    client.create_flow_from_name(FLOW),
                    self._pool,
                    description="Runs bundles of flows that prefect-slo sizes. Made and kept up to date by it.",
                    tags=[TAG],
                    enforce_parameter_schema=False,
                    **wanted,
                )
            else:
                self._deployment = found.id
        self._stale = False

    def start(self, name: str, order: Order, job_variables: Mapping[str, Any]) -> UUID:
        """Ask for a pilot; its flow run.

        Raises:
            WorkPoolUnusable: The pool was deleted meanwhile.
        """
        if self._stale:
            self.work_pool()
            self.prepare()
        assert self._deployment is not None, "prepared before"
        with self._api() as client:
            return client.create_flow_run_from_deployment(
                self._deployment,
                name=name,
                parameters={"order": order.document},
                job_variables=dict(job_variables),
                tags=[TAG],
                idempotency_key=order.box,
            ).id

    def states(self, flow_runs: Iterable[UUID]) -> dict[UUID, State[Any] | None]:
        """States of flow runs; those that are not there any more are left out.

        So are those that no pool has any more: somebody has deleted it, and no worker will ever take them, be there
        another one of its name by now or not.
        """
        ids, found = list(flow_runs), {}
        with self._api() as client:
            for at in range(0, len(ids), _PAGE):
                chosen = FlowRunFilter(id=FlowRunFilterId(any_=ids[at : at + _PAGE]))
                for run in client.read_flow_runs(flow_run_filter=chosen, limit=_PAGE):
                    if run.work_queue_id is None and run.state is not None and run.state.is_scheduled():
                        self._stale = True
                    else:
                        found[run.id] = run.state
        return found

    def cancel(self, flow_run: UUID) -> Found:
        """Want a job no more; how far it had come."""
        with self._api() as client:
            state = client.read_flow_run(flow_run).state
            if state is None or state.is_final():
                return "over"
            scheduled = state.type == StateType.SCHEDULED
            client.set_flow_run_state(flow_run, Cancelled() if scheduled else Cancelling())
            if scheduled:
                return "unbegun"
            return "starting" if state.is_pending() else "running"

    def crashed(self, flow_run: UUID, why: str) -> None:
        """Write down that a job is gone that could not say so itself."""
        with self._api() as client:
            state = client.read_flow_run(flow_run).state
            if state is None or not state.is_final():
                client.set_flow_run_state(flow_run, Crashed(message=why), force=True)

    def trouble(self) -> str:
        """Why jobs of the pool may not start, and what to do; empty where nothing is known."""
        found = self.work_pool()
        if found.is_paused:
            return f"is paused. Let it go on: prefect work-pool resume {self._pool!r}"
        if found.status == WorkPoolStatus.NOT_READY and not found.is_push_pool:
            return f"has no worker online. Start one: prefect worker start --pool {self._pool!r}"
        if found.concurrency_limit is not None:
            return f"runs {found.concurrency_limit} jobs at once at most. Raise its limit or wait"
        return ""

    def blocked(self) -> bool:
        """Whether the pool can start no job now: it is paused, has no worker, or runs all that it may."""
        found = self.work_pool()
        if found.is_paused or (found.status == WorkPoolStatus.NOT_READY and not found.is_push_pool):
            return True
        if found.concurrency_limit is None:
            return False
        taken = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}
        asked = {"work_pools": {"name": {"any_": [self._pool]}}, "flow_runs": {"state": taken}}
        with self._api() as client:
            return int(client.request("POST", "/flow_runs/count", json=asked).json()) >= found.concurrency_limit

    def close(self) -> None:
        """Let go of the connection."""
        if self._client is not None:
            self._client.__exit__(None, None, None)
            self._client = None

    @contextmanager
    def _api(self) -> Iterator[SyncPrefectClient]:
        """A client, kept from call to call: making one takes 20 ms. For one thread at a time."""
        if self._client is None:
            chosen = {PREFECT_API_URL: self._address} if self._address is not None else {}
            with temporary_settings(chosen):
                self._client = api_client(own=True).__enter__()
        yield self._client
