"""What happens to a run (events) and what is to be done about it (actions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefect_slo.resources import Size

LossReason = Literal["died", "memory", "timeout", "start", "cancelled"]
Ending = Literal["done", "died", "memory", "timeout", "start", "cancelled", "unpicklable"]


@dataclass(frozen=True, slots=True)
class StageRule:
    """How the scheduler treats a stage: its stage plan, as far as dispatching goes.

    Attributes:
        pool: Pool its leases are opened on.
        size: Size of each lease.
        workers: Leases at once; ``None`` opens as many as there is work that blocks.
        bundle: Items per dispatch; ``None`` grows bundles from measured item times.
        batch: Items that run as one: bundles hold whole batches where there is enough for one.
        priority: Stages with a higher one are served first (the longest path to the end of the flow).
        loss_retries: How often an item may run again after its worker was lost while it ran.
        ladder: Larger sizes to move to, in order, after running out of memory.
        fallback: Pool for items that cannot travel to an isolated worker; ``None`` where isolation is pinned.
        rerun_unpicklable: Whether an item whose *result* can't travel may run again on the fallback.
        task: The task that it is a stage of.
        together: Leases at once of all stages of that task; ``None`` for no limit.
    """

    pool: str
    size: Size = Size(1, 1024)
    workers: int | None = None
    bundle: int | None = None
    batch: int = 1
    priority: float = 0.0
    loss_retries: int = 0
    ladder: tuple[Size, ...] = ()
    fallback: str | None = None
    rerun_unpicklable: bool = True
    task: str = ""
    together: int | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """What is special about items of a stage whose task object is not the one that the stage's rule was made for.

    Attributes:
        id: Bundles hold items of one kind.
        batch: In place of the rule's.
        loss_retries: In place of the rule's.
        rerun_unpicklable: In place of the rule's.
    """

    id: int
    batch: int = 1
    loss_retries: int = 0
    rerun_unpicklable: bool = True


# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanChanged:
    """A stage has a rule, for the first time or anew. Leases of the old rule are given back as they get free."""

    stage: str
    rule: StageRule


@dataclass(frozen=True, slots=True)
class Submitted:
    """Items of one kind were submitted to a stage; those that wait for upstream results are not ready yet."""

    stage: str
    items: tuple[int, ...]
    ready: bool = True
    kind: Kind | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """Submitted items whose upstream results are all there."""

    items: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaseUp:
    """A lease has its worker."""

    lease: int


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """A lease's worker is gone. Of its bundle, ``untouched`` items were certainly never started.

    ``inputs_gone``: what the bundle takes is lost, and nothing is known against the worker.
    """

    lease: int
    reason: LossReason
    untouched: tuple[int, ...] = ()
    inputs_gone: bool = False


@dataclass(frozen=True, slots=True)
class ItemDone:
    """Items of a lease's bundle have ended, well or not; the runner holds their outcomes."""

    lease: int
    items: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BundleDone:
    """A lease has nothing more to do; its bundle took ``busy_s`` seconds of work."""

    lease: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class Rejected:
    """Items whose arguments (``ran`` false) or results (``ran`` true) cannot travel between processes."""

    lease: int
    items: tuple[int, ...]
    ran: bool


@dataclass(frozen=True, slots=True)
class Postponed:
    """Items that were dispatched to a lease and can't be sent yet; ``Ready`` or ``Barred`` follows."""

    lease: int
    items: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Barred:
    """Items that wait, and can never run: what they take is lost; the runner holds why."""

    items: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Timer:
    """The instant that ``SetTimer`` asked for has come."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Items are no longer wanted; ``None`` means every one."""

    items: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Closed:
    """The flow function has returned. What was submitted runs to its end; with ``now`` it is cancelled instead."""

    now: bool = False


Event = (
    PlanChanged
    | Submitted
    | Ready
    | LeaseUp
    | LeaseLost
    | ItemDone
    | BundleDone
    | Rejected
    | Postponed
    | Barred
    | Timer
    | Cancel
    | Closed
)

# ---- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenLease:
    """Ask a pool for a worker."""

    lease: int
    stage: str
    pool: str
    size: Size


@dataclass(frozen=True, slots=True)
class CloseLease:
    """Give an idle worker back."""

    lease: int


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send items to a lease's worker, to be run in this order."""

    bundle: int
    lease: int
    stage: str
    items: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CancelBundle:
    """End what a lease is running."""

    lease: int


@dataclass(frozen=True, slots=True)
class Settle:
    """Complete the futures of items: with their outcomes (``done``), or with the error that the ending stands for."""

    items: tuple[int, ...]
    ending: Ending
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Send ``Timer`` after this many seconds (an earlier one may be dropped)."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should hear once: the stage moved to another pool or size."""

    stage: str
    what: Literal["fallback", "grown", "retried"]
    detail: str


Action = OpenLease | CloseLease | Dispatch | CancelBundle | Settle | SetTimer | Notice
