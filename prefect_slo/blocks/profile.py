"""The profile of one flow: everything that is known of it, in one block of less than 100 kB."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast
from uuid import UUID

from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound
from pydantic import Field, HttpUrl

from prefect_slo.blocks.documents import DOCUMENTATION, LOGO
from prefect_slo.plan import Plan
from prefect_slo.telemetry.api import api_client
from prefect_slo.telemetry.columns import ledger_document, read_ledger
from prefect_slo.telemetry.fold import Observations
from prefect_slo.telemetry.learned import Coverage, coverage, observations_of, workflow_of
from prefect_slo.telemetry.ledger import Ledger
from prefect_slo.telemetry.packing import canonical, digest, pack, unpack
from prefect_slo.telemetry.records import RunRecord
from prefect_slo.telemetry.store import Stored, slug
from prefect_slo.workflow import Workflow

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

MAX_BYTES = 100_000  # saving takes 0.1 s at 10 kB, 0.23 s at 100 kB, 1.5 s at 1 MB
WINDOW = timedelta(minutes=10)
"""How much later than its own time stamp an artifact may become visible."""
COVERED = 600
HISTORY = 20


_SCHEMAS: dict[type[Block], dict[str, Any]] = {}


class SLOProfile(Block):
    """What is known of one flow: objective, stage graph with menus, measurements, fitted model and the plan in force.

    Profiles are written by the package itself, under a lease, so that concurrent runs lose nothing. Read one to see
    what has been learned; to change one, use ``update_profile``.

    Example:
        See what a flow's runs have taught:
        ```python
        from prefect_slo.blocks import SLOProfile

        profile = SLOProfile.load("BLOCK_NAME")
        print(profile.stages)
        ```
    """

    _block_type_name: ClassVar[str] = "SLO Profile"
    _block_type_slug: ClassVar[str] = "slo-profile"
    _logo_url: ClassVar[HttpUrl] = LOGO
    _documentation_url: ClassVar[HttpUrl] = DOCUMENTATION

    flow_name: str = Field(description="Name of the flow.")
    revision: int = Field(default=0, description="How many times the profile has been written.")
    objective: dict[str, Any] | None = Field(default=None, description="The bound, as in a plan file.")
    stages: list[str] = Field(default_factory=list, description="What is known of each stage, in words.")
    observations: str = Field(default="", description="Graph, sums and newest rows of every stage, packed.")
    model: str = Field(default="", description="The fitted workflow model, packed; empty when it isn't stored.")
    fit_note: str = Field(default="not fitted yet", description="Why no model is stored; empty when one is.")
    plan: dict[str, Any] | None = Field(default=None, description="The plan in force, as in a plan file.")
    plan_history: list[dict[str, Any]] = Field(
        default_factory=list, description="Plans in force so far, newest last: digest, revision, reason and artifact."
    )
    proposal: dict[str, Any] | None = Field(
        default=None, description="A plan that waits for approval: plan, reason, and the name of its choices."
    )
    declined: list[str] = Field(
        default_factory=list,
        description="Names of choices that somebody rolled back from: none is taken again unasked.",
    )
    cursor: str = Field(default="", description="When the newest run that is covered was stored.")
    covered: str = Field(default="", description="Digests of the runs that are covered, packed.")

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The schema of the block, made once: saving a block asks for it some 70 times, at 5 ms each."""
        if args or kwargs:
            return super().model_json_schema(*args, **kwargs)
        if cls not in _SCHEMAS:
            _SCHEMAS[cls] = super().model_json_schema()
        return deepcopy(_SCHEMAS[cls])

    @classmethod
    def block_name(cls, flow_name: str) -> str:
        """Name of the flow's block document."""
        return slug(flow_name)

    @classmethod
    def of_flow(cls, flow_name: str, client: SyncPrefectClient | None = None) -> Self | None:
        """The stored profile of a flow, ``None`` where there is none; synchronous in any context."""
        with ExitStack() as stack:
            api = client or stack.enter_context(api_client())
            try:
                document = api.read_block_document_by_name(cls.block_name(flow_name), cls.get_block_type_slug())
            except ObjectNotFound:
                return None
        return cls(**document.data)

    def store(self) -> UUID:
        """Write the profile, replacing the stored one; synchronous in any context. Only for the holder of the lease."""
        # without _sync a call from a running event loop returns a coroutine that nobody awaits
        return cast(UUID, self.save(self.block_name(self.flow_name), overwrite=True, _sync=True))  # type: ignore[call-arg]

    def ledger(self) -> Ledger:
        """What the runs have taught."""
        return _ledger(self.observations, self.covered)

    def workflow(self) -> Workflow | None:
        """The flow's graph as its runs showed it, with the menus of its stages; ``None`` before the first."""
        return workflow_of(self.ledger(), self.flow_name)

    def training(self) -> Observations | None:
        """The rows that the workflow's model is fitted to, ``None`` before the first completed run."""
        workflow = self.workflow()
        return None if workflow is None else observations_of(self.ledger(), workflow)

    def coverage(self) -> Mapping[str, Coverage]:
        """How well each stage is known; empty before the first completed run."""
        workflow = self.workflow()
        return {} if workflow is None else coverage(self.ledger(), workflow)

    def model_document(self) -> dict[str, Any] | None:
        """The fitted workflow model as a document; ``None`` when ``fit_note`` says why it isn't stored."""
        return dict(unpack(self.model)) if self.model else None

    def plan_in_force(self) -> Plan | None:
        """The plan that runs follow."""
        return Plan.from_document(self.plan) if self.plan else None

    @property
    def proposed(self) -> str:
        """Names the plan that waits for approval; empty where none does."""
        return str(self.proposal["name"]) if self.proposal is not None else ""

    @property
    def content_digest(self) -> str:
        """Names what is known, whatever the way it was learned: equal for equal observations and models."""
        ledger = unpack(self.observations) if self.observations else None
        return digest([ledger, self.model_document(), self.fit_note])

    @property
    def since(self) -> datetime | None:
        """Runs that were stored before this are covered."""
        return datetime.fromisoformat(self.cursor) - WINDOW if self.cursor else None

    @property
    def size_bytes(self) -> int:
        """Size of the block document as JSON."""
        return len(canonical(self.model_dump(mode="json")))

    def new_among(self, stored: Iterable[Stored]) -> tuple[RunRecord, ...]:
        """Records that aren't covered yet, each once, oldest first."""
        covered = set(self._bookkeeping()["covered"])
        fresh: dict[str, RunRecord] = {}
        for entry in sorted(stored, key=lambda entry: entry.created):
            for record in entry.records:
                if _name(record) not in covered:
                    fresh.setdefault(_name(record), record)
        return tuple(fresh.values())

    def absorbed(self, stored: Iterable[Stored]) -> Self:
        """A copy that covers these runs, too; its model is that of before."""
        stored = tuple(stored)
        if not stored:
            return self
        ledger = self.ledger().absorb(self.new_among(stored))
        books = self._bookkeeping()
        seen = {_name(record): entry.created.timestamp() for entry in stored for record in entry.records}
        covered = {**seen, **books["covered"]}
        newest = max([entry.created for entry in stored] + [datetime.fromisoformat(at) for at in (self.cursor,) if at])
        horizon = (newest - 2 * WINDOW).timestamp()
        by_age = sorted(covered, key=lambda name: (covered[name], name))
        keep = {name: int(covered[name]) for name in by_age if covered[name] >= horizon}
        keep |= {name: int(covered[name]) for name in by_age[-COVERED:]}
        return self._with_ledger(ledger, keep, newest.isoformat())

    def with_row_budget(self, rows: int) -> Self:
        """A copy that keeps fewer rows."""
        return self._with_ledger(self.ledger().with_budget(rows), self._bookkeeping()["covered"], self.cursor)

    def with_model(self, document: Mapping[str, Any] | None, note: str = "") -> Self:
        """A copy with another fitted model, or with the reason why there is none."""
        return self.model_copy(update={"model": pack(document) if document is not None else "", "fit_note": note})

    def _with_ledger(self, ledger: Ledger, covered: Mapping[str, int], cursor: str) -> Self:
        books = {"covered": covered, "retired": sorted(ledger.retired)}
        changed = self.model_copy(
            update={"observations": pack(ledger_document(ledger)), "covered": pack(books), "cursor": cursor}
        )
        changed.stages = [
            f"{name}: {known.rows} rows at {known.settings} settings"
            + (f", {known.borrowed} of them from elsewhere" if known.borrowed else "")
            for name, known in changed.coverage().items()
        ]
        return changed

    def _bookkeeping(self) -> dict[str, Any]:
        return _books(self.covered)


def _books(covered: str) -> dict[str, Any]:
    return dict(unpack(covered)) if covered else {"covered": {}, "retired": []}


@lru_cache(maxsize=16)
def _ledger(observations: str, covered: str) -> Ledger:
    """Reading one of 30 stages takes 20 ms, and a fold asks for it many times."""
    return read_ledger(unpack(observations), _books(covered)["retired"]) if observations else Ledger()


def _name(record: RunRecord) -> str:
    """Twelve hex digits (48 bits) that stand for a run."""
    return digest(record.run_id)[:12]
