"""One flow run as its task runner sees it: places calls in stages, makes the rule of each, tells what was seen."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextvars import copy_context
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from prefect import Task
from prefect.client.schemas.objects import FlowRun, RunInput
from prefect.context import FlowRunContext, TagsContext, TaskRunContext
from prefect.futures import PrefectConcurrentFuture
from prefect.logging import get_run_logger
from prefect.transactions import get_transaction

from prefect_slo.control.events import Kind
from prefect_slo.declaration import Declaration, batched_names, declared
from prefect_slo.granularity import record_level
from prefect_slo.plan import Record
from prefect_slo.pricing import price_list
from prefect_slo.resources import Capacity, Size
from prefect_slo.runner.backends.local import FlowBackends, usable_gpus, usable_memory_mb, usable_vcpus
from prefect_slo.runner.calls import Call
from prefect_slo.runner.flow_state import raised, status
from prefect_slo.runner.futures import CallFuture
from prefect_slo.runner.graph import StageGraph
from prefect_slo.runner.ids import uuid7
from prefect_slo.runner.inputs import find_inputs, run_ids
from prefect_slo.runner.pools import PROCESS, THREAD, lacks_gpus
from prefect_slo.runner.recipe import ObservedRun, Recipe, StageSeen
from prefect_slo.runner.rules import loss_retries, stage_rule
from prefect_slo.runner.shelf import MEMORY_SHARE
from prefect_slo.runner.variants import Variant, Variants

if TYPE_CHECKING:
    from prefect_slo.observation import Invocation
    from prefect_slo.runner.task_runner import SLOTaskRunner

FLUSH = 256
"""Items of a ``.map`` handed over at a time: enough to bundle, soon enough to start."""


@dataclass
class FlowClock:
    """When the flow function was entered and left (monotonic), and whether by raising.

    The runner's own entry where nobody says. Only the function itself knows that it raised: Prefect's engine has
    turned the exception into a state before the runner ends.
    """

    entered: float = 0.0
    returned: float | None = None
    raised: bool = False

    @property
    def latency_s(self) -> float:
        return self.returned - self.entered if self.returned is not None else float("nan")


class Run:
    """What a runner holds while its flow run submits."""

    def __init__(self, runner: SLOTaskRunner) -> None:
        from prefect_slo.runner.measure import Measure
        from prefect_slo.runner.session import Session

        context = FlowRunContext.get()
        self.flow_name = context.flow.name if context is not None and context.flow is not None else "flow"
        self._flow_run = context.flow_run if context is not None else None
        self._of_flow = context is not None and context.task_runner is runner
        self.run_id = _name_of_run(self._flow_run) if self._flow_run is not None else str(uuid7())
        self.parameters = dict(context.parameters or {}) if context is not None else {}
        self.started_at = time.time()
        self._director, self._stages, self._elsewhere = runner.director, runner.stages, runner.pools
        self._said: set[str] = set()
        self._flow_context = copy_context()
        self.recipe = self._ask_director() or runner.recipe
        self._graph = StageGraph()
        self._variants = Variants()
        self._ruled: dict[str, Variant] = {}  # the variant that a stage's rule was made for
        self._items = count(1)
        self._lock = threading.Lock()
        self._gathered = threading.local()
        self._ineligible: set[str] = set()
        self._batch: dict[str, int] = {}
        self._declared: dict[str, Declaration] = {}
        edges = self.recipe.plan.passing if self.recipe.plan is not None else ()
        self._mapped = {(edge.source, edge.sink) for edge in edges if edge.method == "machine"}
        self._brought = {edge.source for edge in edges} - {edge.source for edge in edges if edge.method == "direct"}
        self._pools: dict[str, str] = {}
        self._fallen: set[str] = set()
        self._invocations: list[Invocation] = []
        self.backends = FlowBackends(context.client if context is not None else None, self._elsewhere)
        offers = {name: definition.pool for name, definition in self._elsewhere.items()}
        self._prices = {name: price_list(pool.prices) for name, pool in offers.items() if pool.prices is not None}
        self.measure = Measure(
            self.recipe.prices,
            self._heard,
            self._prices,
            machine=Size(usable_vcpus(), usable_memory_mb()),
            planned=frozenset(self.recipe.plan.stages) if self.recipe.plan is not None else (),
        )
        self.session = Session(
            self.run_id,
            self.backends,
            context=self._flow_context,
            measure=self.measure,
            notice=self._notice,
            level=self._level,
            capacity={
                PROCESS: self._here(),
                **{name: definition.capacity for name, definition in self._elsewhere.items()},
            },
            items=self._items,
            shelf_bytes=MEMORY_SHARE * usable_memory_mb() * 2**20,
            stays=lambda stage: stage not in self._brought,
        )

    def submit(
        self,
        task: Task[Any, Any],
        parameters: dict[str, Any],
        wait_for: list[Any] | None,
        dependencies: dict[str, set[RunInput]] | None,
    ) -> PrefectConcurrentFuture[Any]:
        inputs, has_inputs = find_inputs(parameters, dependencies)
        task_run_id = uuid7()
        tags = frozenset(TagsContext.get().current_tags)
        with self._lock:
            stage = self._graph.place(task, task_run_id, run_ids(inputs, wait_for))
            variant = self._variants.of(task)
            if stage not in self._ruled:  # before any of its calls, whichever thread hands those over first
                self.session.submit(stage, self._first_call(stage, task), [])
                self._ruled[stage] = variant
            kind = None if self._ruled[stage] is variant else self._kind(stage, variant)
        parent = _parent()
        if tags or parent is not None:
            self._ineligible.add(stage)
        if parent is not None and (submits := self._graph.stage_of(parent)) is not None:
            self._ineligible.add(submits)  # from now on: nobody knows that a task submits before it does
        parameters = self._with_knobs(stage, parameters)
        call = Call(
            item=next(self._items),
            stage=stage,
            task=task,
            variant=variant,
            kind=kind,
            task_run_id=task_run_id,
            parameters=parameters,
            wait_for=wait_for,
            dependencies=inputs or None,
            context=copy_context(),
            tags=tags,
            has_inputs=has_inputs or bool(wait_for),
            submitted=time.monotonic(),
            mapped=self._mapped_into(stage, inputs) if self._mapped else frozenset(),
        )
        buffer: list[Call] | None = getattr(self._gathered, "calls", None)
        if buffer is None:
            self.session.submit(stage, None, [call])
        else:
            buffer.append(call)
            if len(buffer) >= FLUSH:
                self._flush(buffer)
        return CallFuture(task_run_id, call.future, self.session.callbacks)

    def gathering(self) -> _Gathering:
        """While inside, calls of this thread are handed over together."""
        return _Gathering(self)

    @property
    def raised(self) -> bool:
        """Whether the function of a flow with this runner has raised, once its engine has ended it."""
        return self._of_flow and self._flow_run is not None and raised(self._flow_run)

    def close(self, *, at_once: bool, failed: bool = False) -> None:
        """End it; see ``Session.close``."""
        try:
            self.session.close(at_once=at_once, failed=failed)
        finally:
            self.backends.close()

    def report(self, clock: FlowClock, *, failed: bool, cut_short: bool) -> None:
        """Tell the director how it went, and the flow's log what is not known of its cost."""
        if untold := self.measure.untold:
            self._notice(
                f"This run cost more than the ${float(self.measure.cost_usd):.4g} that are known: "
                f"{untold} {'invocation or job' if untold == 1 else 'invocations and jobs'} may have been billed "
                "whose reply or report was lost, or which went on unheard. AWS's own bill has them."
            )
        if self._director is None:
            return
        planned = self.recipe.plan.stages if self.recipe.plan is not None else {}
        observed = ObservedRun(
            run_id=self.run_id,
            flow_name=self.flow_name,
            recipe=self.recipe,
            workflow=self._graph.workflow(self.flow_name),
            stages={name: self._seen(name) for name in self._graph.stages},
            stage_runs=self.measure.stage_runs(
                self.run_id, lambda stage: planned[stage].workers if stage in planned else self.recipe.workers
            ),
            invocations=tuple(self._invocations),
            latency_s=clock.latency_s,
            cost_usd=self.measure.cost_usd,
            untold=self.measure.untold,
            status=status(self._flow_run, failed=failed, cut_short=cut_short),
            started_at=self.started_at,
            parameters=self.parameters,
            declarations=dict(self._declared),
        )
        try:
            self._flow_context.run(self._director.observed, observed)
        except Exception as error:
            self._notice(f"What this run has shown could not be kept ({type(error).__name__}: {error}).")

    # ---- private ----------------------------------------------------------------------------------------------------

    def _ask_director(self) -> Recipe | None:
        if self._director is None:
            return None
        try:
            return self._director.recipe(self.flow_name, self.run_id, self.parameters)
        except Exception as error:
            self._notice(f"No plan for this run ({type(error).__name__}: {error}); it runs by the default.")
            return None

    def _here(self) -> Capacity:
        """What worker processes of this run may hold together; of GPUs, where the plan gives it some here."""
        stages = self.recipe.plan.stages.values() if self.recipe.plan is not None else ()
        devices = usable_gpus() if any(s.size.gpu and s.pool not in self._elsewhere for s in stages) else ()
        return Capacity(usable_vcpus(), gpu_devices=devices or None)

    def _mapped_into(self, stage: str, inputs: Mapping[str, set[RunInput]]) -> frozenset[UUID]:
        """Upstream task runs whose results the plan passes to a stage through shared memory."""
        ids = run_ids(inputs, None)
        return frozenset(id_ for id_ in ids if (self._graph.stage_of(id_), stage) in self._mapped)

    def _with_knobs(self, stage: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """The arguments with the plan's choices for those that were declared as knobs."""
        planned = self.recipe.plan.stages.get(stage) if self.recipe.plan is not None else None
        if planned is None or not planned.knobs:
            return parameters
        return {**parameters, **{name: value for name, value in planned.knobs if name in parameters}}

    def _first_call(self, stage: str, task: Task[Any, Any]) -> Any:
        declaration = self._declared[stage] = self._declaration(task)
        rule = stage_rule(
            stage,
            task,
            self.recipe,
            declaration,
            processes=self.backends.processes_available(),
            pools=self._elsewhere,
            priority=self._graph.depth_first().get(stage, 0.0),
            lacks_gpus=self._lacks_gpus,
        )
        planned = self.recipe.plan.stages.get(stage) if self.recipe.plan is not None else None
        if not rule.size.gpu and rule.pool != THREAD:
            offered = self._elsewhere[rule.pool].pool.sizes if rule.pool in self._elsewhere else ()
            wanted = planned.size if planned is not None else min(offered, key=lambda size: size.gpu, default=rule.size)
            if wanted.gpu:
                self._say_on_cpu(stage, wanted, rule.size, rule.pool)
        free = THREAD not in (self.recipe.isolation, declaration.isolation)
        if free and get_transaction() is not None and TaskRunContext.get() is None:  # a task run has one of its own
            self._notice(f"Stage {stage!r} runs on threads: it is submitted inside a transaction.")
        if rule.pool in self._elsewhere:
            _ = self.backends[rule.pool]  # one that cannot be used says so here, in the flow
        self._batch[stage] = rule.batch
        self._pools[stage] = rule.pool
        return rule

    def _lacks_gpus(self, pool: str) -> str:
        """Why workers of a pool can have no GPU now; empty where they may."""
        if pool == PROCESS:
            return "" if usable_gpus() else "there is no GPU here"
        return lacks_gpus(pool, self._elsewhere)

    def _say_on_cpu(self, stage: str, wanted: Size, size: Size, pool: str) -> None:
        """That a stage does without the GPU that its plan gives it, and what that changes."""
        prices = self._prices.get(pool, self.recipe.prices)
        was, now = (3600 * prices.rate(s.vcpus, s.memory_mb, s.gpu, s.hardware) for s in (wanted, size))
        price = f"${now:.3g} an hour a worker" if now else f"a price that the list {prices.name!r} does not have"
        self._notice(
            f"Stage {stage!r} was to have {wanted.share}, and {self._lacks_gpus(pool)}: it runs on the CPU "
            f"({size}), at {price} in place of ${was:.3g}. A plan's prediction does not hold for it."
        )

    def _kind(self, stage: str, variant: Variant) -> Kind:
        """How calls of a variant differ from those of the one that its stage's rule was made for."""
        task, declaration = variant.task, self._declaration(variant.task)
        planned = self.recipe.plan.stages.get(stage) if self.recipe.plan is not None else None
        batch = planned.batch if planned is not None and batched_names(task) else 1
        return Kind(variant.ordinal, batch, loss_retries(task, declaration), declaration.idempotent is not False)

    def _declaration(self, task: Task[Any, Any]) -> Declaration:
        return self._stages.get(task.name, declared(task))

    def _level(self, call: Call) -> Record:
        stage = call.stage
        eligible = call.variant.eligible and stage not in self._ineligible
        wanted: Record | Literal["auto"] | None = self._declaration(call.task).record
        if wanted is None:
            planned = self.recipe.plan.stages.get(stage) if self.recipe.plan is not None else None
            wanted = planned.record if planned is not None else self.recipe.record
        if wanted == "auto":
            return record_level(self.measure.submitted_items(stage), self.measure.mean_item_s(stage), eligible=eligible)
        if not eligible:
            return "full"
        batch = call.kind.batch if call.kind is not None else self._batch[stage]
        return "summary" if wanted == "full" and batch > 1 else wanted

    def _seen(self, stage: str) -> StageSeen:
        key, source = self._graph.key_of(stage)
        pool = self._pools[stage]
        spoilt = (self.measure.cached_items(stage), self.measure.failed_items(stage))
        if pool == THREAD:
            return StageSeen(key, source, None, THREAD, *spoilt)
        fallen = stage in self._fallen
        return StageSeen(key, source, not fallen, THREAD if fallen else pool, *spoilt)

    def _heard(self, invocation: Invocation) -> None:
        self._invocations.append(invocation)
        if self._director is not None:
            try:
                self._director.heard(invocation, self.run_id)
            except Exception as error:
                self._notice(f"Telemetry of this run is incomplete ({type(error).__name__}: {error}).")

    def _notice(self, message: str, stage: str | None = None) -> None:
        if stage is not None:
            self._fallen.add(stage)
        if message not in self._said:
            self._said.add(message)
            self._flow_context.copy().run(_log, message)

    def _flush(self, buffer: list[Call]) -> None:
        by_stage: dict[str, list[Call]] = {}
        for call in buffer:
            by_stage.setdefault(call.stage, []).append(call)
        buffer.clear()
        for stage, calls in by_stage.items():
            self.session.submit(stage, None, calls)


class _Gathering:
    """Collects the calls of one ``.map``."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._run._gathered.calls = []

    def __exit__(self, *_: object) -> None:
        buffer = self._run._gathered.calls
        self._run._gathered.calls = None
        self._run._flush(buffer)


def _parent() -> UUID | None:
    """The task run of this flow run that this code is part of."""
    flow, task = FlowRunContext.get(), TaskRunContext.get()
    if flow is None or flow.flow_run is None or task is None or task.task_run.flow_run_id != flow.flow_run.id:
        return None  # in a flow that a task has called, say
    return task.task_run.id


def _name_of_run(flow_run: FlowRun) -> str:
    """The flow run's id; a flow's own retries are runs of their own, with ``#2``, ``#3``, … behind it."""
    return str(flow_run.id) if flow_run.run_count <= 1 else f"{flow_run.id}#{flow_run.run_count}"


def _log(message: str) -> None:
    get_run_logger(FlowRunContext.get()).warning(message)
