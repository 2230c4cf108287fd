"""Everything that can go wrong and that a user can do something about.

Each error carries its data as fields; its message says the value, the limit and the next step.
"""

from __future__ import annotations

import copyreg
import math
from dataclasses import dataclass
from reprlib import Repr


class SloError(Exception):
    """Base of every error that prefect_slo raises on purpose. Crosses process borders with its fields as they are."""

    def __reduce__(self) -> tuple[object, ...]:
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class InvalidValue(SloError, ValueError):
    """A value outside what its field may hold.

    Args:
        field: Name of the field, e.g. ``"percentile"``.
        value: What was given.
        expected: What it may be, in words, e.g. ``"a fraction in (0, 1), such as 0.95"``.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field, self.value, self.expected = field, value, expected
        super().__init__(f"{field} is {_shown(value)}; expected {expected}.")


class InvalidWorkflow(InvalidValue):
    """A workflow that is not a DAG of well-named stages, or a menu that offers nothing."""


class InvalidPlan(InvalidValue):
    """A plan file or pin that does not fit the workflow or its menu."""


class InvalidObservation(InvalidValue):
    """A row of a stage-run table that cannot be a measurement."""


class UnknownStage(InvalidValue):
    """A stage name that the workflow does not have."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        self.known = known
        super().__init__("stage", name, f"one of {', '.join(known) or 'none: the workflow is empty'}")


class UnknownPool(InvalidValue):
    """A pool that a task, a menu or a plan names and that the flow does not have.

    Args:
        name: The pool.
        known: Pools that there are.
        stage: Stage that was to run there, where one was.
    """

    def __init__(self, name: str, known: tuple[str, ...], stage: str = "") -> None:
        self.name, self.known, self.stage = name, known, stage
        where = f" for stage {stage!r}" if stage else ""
        super().__init__("pool", name, f"one of {', '.join(known)}{where}; others are given by pools=[...]")


class UnknownPrices(InvalidValue):
    """A price list that does not exist."""


class NotEnoughObservations(SloError):
    """A model that cannot be identified from what was measured so far.

    Args:
        stage: The stage that lacks observations.
        have: How many usable rows there are.
        need: How many are needed.
        hint: What to do next.
    """

    def __init__(self, stage: str, have: int, need: int, hint: str) -> None:
        self.stage, self.have, self.need, self.hint = stage, have, need, hint
        super().__init__(f"stage {stage!r} has {have} usable observations of {need} needed. {hint}")


class UnknownFlow(NotEnoughObservations):
    """A flow of which nothing was measured yet: it has never run, or its name is another one.

    Args:
        flow_name: The name.
        hint: What to do next.
    """

    def __init__(self, flow_name: str, hint: str) -> None:
        super().__init__(f"any of flow {flow_name}", 0, 1, hint)
        self.flow_name = flow_name
        self.args = (f"nothing was measured of flow {flow_name!r} yet. {hint}",)


_MUCH = 0.05
"""Share of what a plan reaches that is worth telling to be uncertainty."""


@dataclass(frozen=True)
class Nearest:
    """The nearest bound that can be met, and what it takes.

    Attributes:
        bound: In the unit of the objective that failed (seconds or US dollars).
        latency_s: Percentile latency that this plan surely keeps, under the model.
        cost_usd: Mean cost of that plan for a latency bound, its percentile for a budget.
        unsure: Share of it that is there because few runs leave much open, in [0, 1).
    """

    bound: float
    latency_s: float
    cost_usd: float
    unsure: float = 0.0


class InfeasibleSlo(SloError):
    """No plan on the menu keeps the bound.

    Args:
        objective: The bound in words, e.g. ``"p95 latency <= 12 s"``.
        nearest: The nearest bound that can be met; ``None`` when nothing on the menu can run at all.
        bottleneck: The stage that holds the bound up.
        share: That stage's mean share of the critical path (or of the cost), in [0, 1].
    """

    def __init__(self, objective: str, nearest: Nearest | None, bottleneck: str, share: float) -> None:
        self.objective, self.nearest, self.bottleneck, self.share = objective, nearest, bottleneck, share
        if nearest is None:
            message = f"{objective} cannot be met: no combination on the menu fits the capacity. Widen the menu."
        else:
            kind = "latency" if "latency" in objective else "cost"
            bound = _rounded_up(nearest.bound)
            raise_to = f"{bound:.4g} s" if kind == "latency" else f"${bound:.4g}"
            message = (
                f"{objective} cannot be met: the best plan reaches {nearest.latency_s:.4g} s at "
                f"${nearest.cost_usd:.4g}, and {bottleneck!r} is {share:.0%} of its {kind}. "
                f"Raise the bound to {raise_to} or widen the menu of {bottleneck!r}."
            )
            if nearest.unsure > _MUCH:
                message += (
                    f" Of what it reaches, {nearest.unsure:.0%} is for what the runs so far leave open: "
                    "profile more, or ask for less confidence."
                )
        super().__init__(message)


class WorkerLost(SloError):
    """A worker process died while it ran an item.

    Args:
        stage: Stage of the item.
        reason: How it ended, e.g. ``"killed by signal 9"``.
        attempts: How many times the item was started.
    """

    def __init__(self, stage: str, reason: str, attempts: int = 1) -> None:
        self.stage, self.reason, self.attempts = stage, reason, attempts
        super().__init__(
            f"a worker of stage {stage!r} was lost ({reason}) on attempt {attempts}. "
            "Declare the task idempotent with slo_task(idempotent=True) to have it run again elsewhere."
        )


class OutOfMemory(WorkerLost):
    """An item needed more memory than its worker may hold; the worker was replaced.

    Args:
        stage: Stage of the item.
        peak_mb: Memory that it was seen to use; 0 where nobody looked.
        limit_mb: Memory that its worker may hold.
        attempts: How many times the item was started.
        detail: How it ended, in words.
        on_batch: Whether its worker was a job on AWS Batch, whose memory is its pool's to say.
    """

    def __init__(
        self,
        stage: str,
        peak_mb: float,
        limit_mb: float,
        attempts: int = 1,
        detail: str = "",
        on_batch: bool = False,
    ) -> None:
        self.peak_mb, self.limit_mb, self.detail, self.on_batch = peak_mb, limit_mb, detail, on_batch
        super().__init__(stage, f"out of memory: {peak_mb:.0f} MB used of {limit_mb:.0f} MB", attempts)
        enough = _next_power(peak_mb, limit_mb)
        used = f"used {peak_mb:.0f} MB" if peak_mb > 0 else "ran out of memory"
        here = f"slo_task(memory_mb={enough}) or a larger size on its menu"
        more = f"BatchJobs(memory_mb={enough})" if on_batch else here
        message = f"stage {stage!r} {used} and its worker may hold {limit_mb:.0f} MB. Give it more with {more}."
        self.args = (message + _told(detail),)


class TaskTimedOut(WorkerLost):
    """An item ran past its task's ``timeout_seconds`` and did not stop by itself."""

    def __init__(self, stage: str, timeout_s: float, attempts: int = 1, detail: str = "") -> None:
        self.timeout_s, self.detail = timeout_s, detail
        super().__init__(stage, f"timed out after {timeout_s:g} s", attempts)
        message = f"stage {stage!r} exceeded its timeout of {timeout_s:g} s and its worker was ended."
        self.args = (message + _told(detail),)


class ResultLost(SloError):
    """A result that stayed where it was made is gone: with its worker on a cluster, or from S3.

    Args:
        stage: Stage that made it.
        size_bytes: Its size, pickled.
        why: What is known of its loss.
    """

    def __init__(self, stage: str, size_bytes: int, why: str) -> None:
        self.stage, self.size_bytes, self.why = stage, size_bytes, why
        super().__init__(
            f"a result of stage {stage!r} ({size_bytes / 2**20:.1f} MB), which stayed where it was made, is lost "
            f"({why}). Say that its task may run again (slo_task(idempotent=True), or retries=), run the flow again "
            "(retries= on the flow), or have results brought to it as they are made: keep_mb=None of a cluster's pool."
        )


class WorkPoolUnusable(SloError):
    """A Prefect work pool that cannot run what a flow would send to it.

    Args:
        pool: Its name.
        why: What is wrong with it.
        then: What to do next.
    """

    def __init__(self, pool: str, why: str, then: str) -> None:
        self.pool, self.why, self.then = pool, why, then
        super().__init__(f"work pool {pool!r} {why}. {then}")


class NothingProposed(SloError):
    """There is no plan to approve, to roll back to, or to pin.

    Args:
        flow_name: Name of the flow.
        reason: What is missing, in words.
        then: What to do.
    """

    def __init__(self, flow_name: str, reason: str, then: str) -> None:
        self.flow_name, self.reason, self.then = flow_name, reason, then
        super().__init__(f"Flow {flow_name!r}: {reason}. {then}".rstrip())


class OtherPlanProposed(NothingProposed):
    """The plan that somebody has seen and approves is not the one that waits for approval by now.

    Args:
        flow_name: Name of the flow.
        seen: Name of the plan that was seen, or what was given for it.
        waits: Name of the plan that waits; empty where none does.
    """

    def __init__(self, flow_name: str, seen: str, waits: str) -> None:
        self.seen, self.waits = seen, waits
        does = f"plan {waits} does" if waits else "none does"
        then = f"Look at it (prefect-slo report {flow_name}), and approve it by its name." if waits else ""
        super().__init__(flow_name, f"plan {seen} does not wait for approval (any more); {does}", then)


class SpendLimitReached(SloError):
    """Work that was not started because a run has spent what it may.

    Args:
        most_usd: The cap.
        spent_usd: What was spent when it was asked.
    """

    def __init__(self, most_usd: float, spent_usd: float) -> None:
        self.most_usd, self.spent_usd = most_usd, spent_usd
        super().__init__(
            f"this run has spent ${spent_usd:.6g} of ${most_usd:.6g} and starts nothing more on AWS. "
            "Raise max_spend_usd of the pool, or ask for less."
        )


class AwsRefused(SloError):
    """AWS could not be asked, or did not do what it was asked to.

    Args:
        asked: The operation, such as ``CreateFunction``; empty where none was reached.
        why: In AWS's words, or those of boto3.
        then: What to do next.
    """

    def __init__(self, asked: str, why: str, then: str = "") -> None:
        self.asked, self.why, self.then = asked, why, then
        super().__init__(f"AWS{f', asked for {asked}' if asked else ''}: {why}. {then}".strip())


class GpuShareTooLarge(SloError):
    """A share of a GPU that no device could hold, even with nothing else on it.

    Args:
        share: What was asked for, in words.
        devices: Devices that there are, in words.
        where: Pool or stage that asked, where that is known.
    """

    def __init__(self, share: str, devices: tuple[str, ...], where: str = "") -> None:
        self.share, self.devices, self.where = share, devices, where
        asker = f"{where} asks" if where else "a worker asks"
        if devices:
            there = f"the devices here are {'; '.join(devices)}"
            then = "Ask for less in the size, or run it on a pool with larger devices."
        else:
            there = "there is no GPU here"
            then = (
                "Add a size without a GPU to its menu, run it on a pool that has some, or name the devices in "
                "PREFECT_INTEGRATIONS_SLO_GPU_DEVICES where the probe does not find them."
            )
        super().__init__(f"{asker} for {share}, and {there}. {then}")


class Unpicklable(SloError):
    """An argument or a result that cannot travel to or from a worker process.

    Args:
        stage: Stage of the item.
        what: ``"argument"``, ``"result"`` or ``"task"``.
        cause: The pickling error in words.
    """

    def __init__(self, stage: str, what: str, cause: str) -> None:
        self.stage, self.what, self.cause = stage, what, cause
        super().__init__(
            f"the {what} of stage {stage!r} cannot be pickled ({cause}), and the stage is pinned to worker "
            "processes. Unpin it (isolation='auto') to run it on threads, or return something that pickles."
        )


class UnsupportedTaskRunner(SloError):
    """The flow's own task runner has no matching backend.

    Args:
        name: Class name of the flow's runner.
        supported: Names of runners that map to a backend.
    """

    def __init__(self, name: str, supported: tuple[str, ...]) -> None:
        self.name, self.supported = name, supported
        super().__init__(
            f"@slo cannot take over {name}; it can replace {', '.join(supported)}. "
            "Remove task_runner= from the flow, or use one of these."
        )


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def _shown(value: object) -> str:
    """``repr(value)``, cut where it is long: a message must stay readable when a whole table was passed."""
    try:
        return _SHORT.repr(value)
    except Exception:  # a broken __repr__, or an int past Python's limit of digits, must not hide the error
        return f"a value of type {type(value).__name__}"


def _rounded_up(bound: float) -> float:
    """``bound`` to four significant digits, never below it: a bound rounded down could not be met either."""
    if not (math.isfinite(bound) and bound > 0):
        return bound
    unit = 10.0 ** (math.floor(math.log10(bound)) - 3)
    return math.ceil(bound / unit * (1 - 1e-12)) * unit


def _told(detail: str) -> str:
    """What is known beside, at the end of a message."""
    return f" What was said of it: {detail}" if detail else ""


def _next_power(*megabytes: float) -> int:
    """The next power of two at or above 1.25 times the largest of ``megabytes``, at least 256."""
    largest = max((size for size in megabytes if math.isfinite(size)), default=0.0)
    return 1 << max(8, math.ceil(math.log2(max(1.0, 1.25 * largest))))
