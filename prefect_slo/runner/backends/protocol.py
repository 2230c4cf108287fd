"""What a backend is: ``open`` a lease on a worker, ``submit`` bundles to it, ``cancel``, ``close``; a sink hears of it.

A backend knows nothing of Prefect. A bundle's ``program`` is a pickled ``Program``: the worker unpickles it once, opens
it, and calls what it gets for every item. Payloads and outcomes are opaque: bytes where the backend is isolated
(``Capabilities.isolated``), objects that are passed as they are where it is not.

Ids are chosen by the runner and unique within one sink. Every method returns at once and may be called from any thread;
reports are posted from the backend's own threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple, Protocol, runtime_checkable

from prefect_slo.control.events import LossReason
from prefect_slo.control.need import Need
from prefect_slo.resources import Size


@dataclass(frozen=True)
class Outcome:
    """What running one item gave.

    Attributes:
        payload: The result, for the runner to make sense of.
        failed: Whether the item ended in anything but success.
        unpicklable: Why its result cannot travel, where it cannot; ``payload`` is then empty.
        read_s: Seconds spent unpickling its arguments.
        write_s: Seconds spent pickling its result.
        parts: What the payload refers to by number and may come later than it: bytes, or ``Kept`` where they stay.
        mapped: Bytes of its arguments that did not come with its payload.
    """

    payload: Any
    failed: bool = False
    unpicklable: str = ""
    read_s: float = 0.0
    write_s: float = 0.0
    parts: tuple[Any, ...] = ()
    mapped: int = 0


class Kept(Protocol):
    """A part of an outcome that stays where it was made, for as long as this stands for it."""

    @property
    def place(self) -> object:
        """The backend that keeps it, and takes it among the parts of a bundle; or what several have in common."""
        ...

    @property
    def size(self) -> int:
        """Its bytes."""
        ...

    @property
    def fetch_usd(self) -> Decimal:
        """What bringing it here costs, in US dollars."""
        ...

    def gone(self) -> str:
        """In words why it can't be had any more, as far as that is known; empty where it can."""
        ...

    def fetch(self) -> bytes:
        """Bring it here; from any thread. Raises ``LookupError`` where it is gone, or what the place raises."""
        ...


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Apart:
    """A value of this process, pickled apart from the arguments that refer to it.

    Attributes:
        sha: SHA-256 of its content, in hexadecimal digits.
        content: The pickle.
    """

    sha: str
    content: bytes


RunItem = Callable[[int, Any], Outcome]
"""Runs one item: ``(item id, payload) -> outcome``. Never raises for what the user's code does."""


class Program(Protocol):
    """Something picklable that opens, inside a worker, into a function that runs items.

    ``open`` is called once per worker and ``Bundle.program_key``; ``emit`` sends a ``Chatter`` report, from any thread.
    """

    def open(self, emit: Callable[[bytes], None]) -> RunItem: ...


class Carried(NamedTuple):
    """How a function that was sent out ended, for one set of arguments.

    Attributes:
        value: What it returned, or the exception that it raised.
        failed: Whether it raised.
        unpicklable: Why its result cannot travel, where it cannot.
        read_s: Seconds spent unpickling its arguments, there.
        write_s: Seconds spent pickling its result, there.
        started: When it started (monotonic, on this machine's clock as well as that can be known).
        ended: When it ended.
        kept: Where its value is, in place of ``value``, where it has stayed there.
    """

    value: Any
    failed: bool
    unpicklable: str
    read_s: float
    write_s: float
    started: float
    ended: float
    kept: Kept | None = None


class Carry(Protocol):
    """Sends a pickled function out with pickled ``(args, kwargs)`` of some items, in one go.

    Arguments refer to ``parts`` by persistent ids, ``(number of a part, which value of it)``: values pickled apart, and
    such as the backend keeps. Results stay where they are made as far as ``Bundle.keep`` says.

    Raises ``NotSent`` where they are too large to travel, ``Overran`` where an item ran longer than ``limit_s``, and
    ``WorkerGone`` where the worker was lost: let that pass, it ends the bundle. An ``SloError`` refuses the work.
    """

    def __call__(
        self,
        function: bytes,
        arguments: Sequence[tuple[int, bytes]],
        *,
        limit_s: float | None = None,
        parts: Sequence[Apart | Kept] = (),
    ) -> list[Carried]: ...


class NotSent(Exception):
    """Arguments or a function that cannot travel; nothing has run."""


class WorkerGone(BaseException):
    """What a backend raises through ``carry`` where the worker was lost: it ends the bundle, past all code between."""


class Overran(Exception):
    """An item ran longer than its limit, and was ended."""


@runtime_checkable
class HostedProgram(Protocol):
    """A program that stays in the flow's process and sends out only the work: see ``Capabilities.hosted``."""

    def host(self, items: Sequence[tuple[int, Any]], carry: Carry, report: Callable[[ItemReport], None]) -> None:
        """Run items in order, with ``carry`` for the work, and report each."""
        ...


@dataclass(frozen=True)
class Bundle:
    """Items for one worker, run one after another in order.

    Attributes:
        id: Chosen by the runner.
        program_key: Names ``program``; a worker that has it already isn't sent it again.
        program: A ``Program``, pickled where the backend is isolated; or a ``HostedProgram`` where it hosts.
        items: ``(item id, payload)`` pairs.
        timeout_s: A single item that runs longer than this has its worker killed; ``None`` for no limit.
        parts: What payloads refer to by number, once for all: bytes, or ``Kept`` by this backend. Where there are any,
            the program gets ``(payload, parts)`` for a payload.
        keep: Parts of outcomes of at least so many bytes may stay where they are made; ``None`` for none.
    """

    id: int
    program_key: str
    program: Any
    items: tuple[tuple[int, Any], ...]
    timeout_s: float | None = None
    parts: tuple[Any, ...] = ()
    keep: int | None = None

    @property
    def weight(self) -> int:
        """Bytes that its worker needs for it: payloads, and parts wherever they lie."""
        payloads = sum(len(payload) for _, payload in self.items if isinstance(payload, bytes))
        return payloads + sum(len(part) if isinstance(part, bytes) else part.size for part in self.parts)


@dataclass(frozen=True)
class Opened:
    """A lease has its worker.

    Attributes:
        lease: Which.
        cold: Whether a worker had to be started for it; where they start with the work, its reports tell (``init_s``).
        start_s: How long that took (0 when warm), from asking for the process to its first report.
        wait_s: How long the lease waited for capacity of the machine.
        pid: The worker's process.
        held_s: How long its machine was paid for before, for nobody: while it started, and while it idled.
        no_gpu: Whether it has no GPU, though its size has: its machine has none.
    """

    lease: int
    cold: bool
    start_s: float
    wait_s: float
    pid: int
    held_s: float = 0.0
    no_gpu: bool = False


@dataclass(frozen=True)
class Lost:
    """A lease's worker is gone, and with it what it had not reported. The lease is closed.

    Attributes:
        lease: Which.
        reason: Why.
        detail: In words, e.g. ``"killed by signal 9"``.
        running: The item that was running, where there was one.
        untouched: Items of its bundle that had certainly not been started.
        peak_mb: Resident memory when it was last seen, in MB.
        limit_mb: Memory it was allowed, in MB.
        bundle: The bundle it had when it was lost. One that was submitted to the lease after that is untouched: no
            further report speaks of it.
        billed_usd: What it is billed all the same, where it is metered.
        requests: Invocations and jobs that this is for.
        storage_usd: Of it, what reading and writing objects cost.
        on_batch: Whether the worker was a job on AWS Batch.
        untold: Invocations and jobs for it that may be billed beside, by bills that nobody has told.
        inputs_gone: Whether the bundle was dropped because parts that it takes are lost, and are made or stored again;
            nothing ran.
        held: As in ``Finished``; ``None`` where that isn't known, and for a lease without a bundle.
    """

    lease: int
    reason: LossReason
    detail: str
    running: int | None = None
    untouched: tuple[int, ...] = ()
    peak_mb: float = 0.0
    limit_mb: float = 0.0
    bundle: int | None = None
    billed_usd: Decimal | None = None
    requests: int = 0
    storage_usd: Decimal = Decimal()
    on_batch: bool = False
    inputs_gone: bool = False
    held: tuple[float, float] | None = None
    untold: int = 0


@dataclass(frozen=True)
class ItemReport:
    """One item has ended. Instants are on the machine's monotonic clock (``time.monotonic``)."""

    item: int
    outcome: Outcome
    started: float
    ended: float


@dataclass(frozen=True)
class Progress:
    """Some items of a bundle have ended; workers send them at once, or gathered over a few milliseconds."""

    lease: int
    bundle: int
    items: tuple[ItemReport, ...]


@dataclass(frozen=True)
class Finished:
    """Every item of a bundle has been reported; the worker is free.

    Attributes:
        lease: Which lease.
        bundle: Which bundle.
        received: When the worker got it (monotonic).
        ended: When it was done with it (monotonic).
        open_s: Seconds spent opening its program, where this was the first time.
        cpu_s: CPU seconds of the worker process over the bundle.
        peak_mb: High-water mark of its resident memory over the bundle, in MB.
        bytes_in: Bytes of payloads.
        bytes_out: Bytes of outcomes.
        init_s: Seconds spent starting workers for it, where the backend starts them with the work.
        billed_usd: What it is billed, where that is metered; ``None`` where leases are paid for while they are held.
        requests: Invocations and jobs that this is for.
        storage_usd: Of it, what reading and writing objects cost.
        waited_s: Of ``open_s``, until a service took it: throttled calls, the start of a job.
        read_s: Of ``open_s``, fetching function and arguments from storage.
        dump_s: Seconds spent pickling its outcomes together, beyond those of each.
        write_s: Seconds spent sending them, or leaving them on storage.
        billed_ms: Milliseconds that it is billed for.
        held: From when to when the bundle had what its size takes (monotonic), where the lease itself holds nothing
            (``Capabilities.queues``).
        on_new: Whether a machine that was not there when it was submitted had it then.
        untold: Invocations and jobs for it that may be billed beside, by bills that nobody has told.
    """

    lease: int
    bundle: int
    received: float
    ended: float
    open_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    init_s: float = 0.0
    billed_usd: Decimal | None = None
    requests: int = 0
    storage_usd: Decimal = Decimal()
    waited_s: float = 0.0
    read_s: float = 0.0
    dump_s: float = 0.0
    write_s: float = 0.0
    billed_ms: int = 0
    held: tuple[float, float] | None = None
    on_new: bool = False
    untold: int = 0


@dataclass(frozen=True)
class Chatter:
    """Something that a program emitted beside its outcomes (events, logs)."""

    lease: int
    payload: bytes


Report = Opened | Lost | Progress | Finished | Chatter
Sink = Callable[[Report], None]
"""Where reports go. Must be quick and never raise."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can promise.

    Attributes:
        isolated: Items run in another process: they need to pickle, and can be killed.
        hard_timeouts: ``Bundle.timeout_s`` is enforced.
        memory_limits: ``Size.memory_mb`` is enforced.
        vcpu_limits: ``Size.vcpus`` is enforced (affinity or a quota).
        vcpus: vCPUs that it has for all leases together.
        memory_mb: Memory that it has for all leases together.
        hardware: Kinds of machine it has.
        hosted: Takes a ``HostedProgram`` too: workers without Prefect, whose engine stays in the flow's process.
        streams: Reports items as they end; what ran is known when a worker is lost. Elsewhere a bundle is heard of when
            it is over.
        metered: Work is billed by what it took: its reports say how much.
        queues: A lease holds nothing: each bundle queues for what its size takes, and the last report of it says from
            when to when it had that (``held``).
        elsewhere: Workers may be on another machine, with what is installed there and nothing of the user's own: that
            travels by value.
        keeps: Parts of outcomes of at least so many bytes can stay where they are made, and go from there to the
            bundles that take them; ``None`` where none can.
        place: What ``Kept.place`` is of its parts, where several backends have it in common; else it is the backend.
        grows: Gets more machines as they are needed, and the sooner it hears of that the better: a ``GrowingBackend``.
    """

    isolated: bool
    hard_timeouts: bool
    memory_limits: bool
    vcpu_limits: bool
    vcpus: float
    memory_mb: float
    hardware: tuple[str, ...] = field(default=("cpu",))
    hosted: bool = False
    streams: bool = True
    metered: bool = False
    queues: bool = False
    elsewhere: bool = False
    keeps: int | None = None
    place: object | None = None
    grows: bool = False


class Backend(Protocol):
    """Where bundles run."""

    def capabilities(self) -> Capabilities:
        """What it can promise on this machine."""
        ...

    def open(self, lease: int, size: Size, sink: Sink) -> None:
        """Ask for a worker. Later: ``Opened``, or ``Lost`` with reason ``start``."""
        ...

    def submit(self, lease: int, bundle: Bundle) -> None:
        """Hand a bundle to an opened, idle lease. Later: ``Progress``…, then ``Finished`` or ``Lost``."""
        ...

    def cancel(self, lease: int) -> None:
        """End what the lease is running, by force where the backend can. Later: ``Lost`` with reason ``cancelled``."""
        ...

    def close(self, lease: int) -> None:
        """Give an idle lease back; its worker may serve the next one. No report follows."""
        ...

    def shutdown(self) -> None:
        """End every worker and wait for it. Idempotent."""
        ...


@runtime_checkable
class LendingBackend(Protocol):
    """A backend whose workers go from lease to lease, of other stages and flow runs, too: it expects some back."""

    def open_for(self, stage: str, lease: int, size: Size, sink: Sink) -> None:
        """``open`` for a stage, which gives its leases back once it has nothing left to run."""
        ...


@runtime_checkable
class GrowingBackend(Protocol):
    """A backend that gets more machines as they are needed."""

    def expect(self, need: Need) -> None:
        """Prepare for these workers; what was said before no longer holds. Returns at once, and never raises."""
        ...
