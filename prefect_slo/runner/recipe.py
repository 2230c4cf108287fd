"""What the task runner is told about a run (a recipe), and what it tells back (an observed run).

Whoever decides implements ``Director``; the runner only obeys, and works without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from prefect_slo.declaration import Declaration
from prefect_slo.plan import Plan, Record
from prefect_slo.pricing import PriceList, price_list
from prefect_slo.resources import Size
from prefect_slo.workflow import Workflow

if TYPE_CHECKING:
    from prefect_slo.observation import Invocation, StageRun
    from prefect_slo.telemetry.records import Status

Isolation = Literal["auto", "process", "thread"]
"""Where a stage's items run: worker processes, threads, or processes as long as everything pickles."""


@dataclass(frozen=True)
class Recipe:
    """How to run one flow run.

    Attributes:
        plan: Stage plans by stage name; stages without one run by the fields below.
        isolation: ``process`` pins worker processes (a typed error where something doesn't pickle), ``auto`` prefers
            them, ``thread`` pins threads.
        workers: Workers of a stage without a plan; ``None`` means as many as there are vCPUs in processes, and no
            limit in threads.
        record: Record level of stages without a plan; ``auto`` goes by measured item times.
        bundle: Items per dispatch of stages without a plan; ``None`` goes by measured item times.
        on_threads: Stages that are known not to pickle.
        ladders: Larger sizes by stage, for items that run out of memory.
        prices: What reserved time costs.
        pool: Pool of stages without a plan that declare none; ``None`` means worker processes.
    """

    plan: Plan | None = None
    isolation: Isolation = "auto"
    workers: int | None = None
    record: Record | Literal["auto"] = "auto"
    bundle: int | None = None
    on_threads: frozenset[str] = frozenset()
    ladders: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)
    prices: PriceList = field(default_factory=lambda: price_list("local"))
    pool: str | None = None


@dataclass(frozen=True)
class StageSeen:
    """A stage as one run has shown it: what its model is stored under, and where it ran.

    Attributes:
        key: Task key without the hash of its code.
        source: Hash of its code: the model's version.
        pickles: Whether its arguments and results travel between processes; ``None`` where it was not tried.
        pool: Pool that it ran on at the end.
        cached: How many of its results came from a cache: its row says nothing of its work.
        failed: How many of its items did not end well, or lost a worker: likewise.
    """

    key: str
    source: str
    pickles: bool | None
    pool: str
    cached: int = 0
    failed: int = 0


@dataclass(frozen=True)
class ObservedRun:
    """What one flow run has shown.

    Attributes:
        run_id: The flow run's id; with ``#2``, ``#3``, … behind it for later attempts of the same flow run.
        flow_name: The flow's name.
        recipe: How it was run.
        workflow: Its stage graph, with empty menus; ``None`` where it submitted nothing.
        stages: By stage name.
        stage_runs: One row per stage that ran; those of stages with cached or failed items never train a model.
        invocations: One per bundle.
        latency_s: Flow function entry to return; ``nan`` where the flow wasn't timed.
        cost_usd: Reserved vCPU-seconds and GB-seconds at the price list; what metered services bill.
        status: How the flow itself ended, by its own final state: a flow may do without a task that failed.
        started_at: Unix time.
        parameters: The flow's parameters.
        declarations: What was declared of the tasks, by stage name.
        untold: Invocations and jobs whose bills nobody has told; what they cost is not in ``cost_usd``.
    """

    run_id: str
    flow_name: str
    recipe: Recipe
    workflow: Workflow | None
    stages: Mapping[str, StageSeen]
    stage_runs: tuple[StageRun, ...]
    invocations: tuple[Invocation, ...]
    latency_s: float
    cost_usd: float
    status: Status
    started_at: float
    parameters: Mapping[str, Any]
    declarations: Mapping[str, Declaration] = field(default_factory=dict)
    untold: int = 0

    @property
    def completed(self) -> bool:
        """Whether the flow completed: other runs never train a model."""
        return self.status == "completed"

    @property
    def cached(self) -> bool:
        """Whether any result came from a cache."""
        return any(seen.cached for seen in self.stages.values())

    @property
    def queue_s(self) -> float:
        """How long its stages waited for capacity that other runs held, summed over them."""
        return sum(row.queue_s for row in self.stage_runs if row.queue_s > 0)


class Director(Protocol):
    """Decides how a run is run, and hears how it went. Must be picklable: it travels with the flow.

    Neither method may fail the flow: what they raise is logged and the flow goes on by the default recipe.
    """

    def recipe(self, flow_name: str, run_id: str, parameters: Mapping[str, Any]) -> Recipe:
        """How to run the flow run that submits its first task now."""
        ...

    def heard(self, invocation: Invocation, run_id: str) -> None:
        """One bundle has ended."""
        ...

    def observed(self, run: ObservedRun) -> None:
        """The flow run has ended."""
        ...
