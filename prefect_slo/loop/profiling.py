"""Measuring a flow at different settings until its models are identified, under a cap of time and money."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from prefect import Flow
from prefect.logging import get_logger
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE, temporary_settings

from prefect_slo.blocks import SLOProfile, fold_in
from prefect_slo.decorators import director_of
from prefect_slo.errors import InvalidValue
from prefect_slo.loop import background, sweep
from prefect_slo.loop.director import Following, LoopDirector, following
from prefect_slo.loop.ended import unpickled_stages
from prefect_slo.loop.knowledge import Knowledge, forget, knowledge
from prefect_slo.loop.learning import learn
from prefect_slo.loop.menus import moving_much, with_menus
from prefect_slo.observation import StageRuns
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.planner.bundles import bundled
from prefect_slo.resources import Option
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.telemetry.learned import observations_of
from prefect_slo.workflow import Workflow

FAILURES = 4
"""A sweep ends after so many failed runs."""

PASSES = 3
"""What failed or came from a cache is measured again, in a second and a third pass."""


@dataclass(frozen=True)
class Measurement:
    """One run of a sweep, as it ended.

    Attributes:
        number: 1 for the first.
        planned: Runs that the sweep means to make, this one included.
        settings: Options by stage; empty for the run that shows the graph.
        latency_s: What it took; ``nan`` where it failed.
        cost_usd: Its cost.
        error: Why it failed; empty where it didn't.
    """

    number: int
    planned: int
    settings: Mapping[str, Option]
    latency_s: float
    cost_usd: float
    error: str = ""


@dataclass(frozen=True)
class SweepReport:
    """What a sweep did.

    Attributes:
        runs: Every run, in order.
        seconds: How long it took.
        cost_usd: What it cost at the price list.
        stopped: Why it ended.
        known: What is known of the flow now.
    """

    runs: tuple[Measurement, ...]
    seconds: float
    cost_usd: float
    stopped: str
    known: Knowledge

    @property
    def identified(self) -> bool:
        """Whether the flow can be planned."""
        return not self.known.missing()


def profile(
    flow: Flow[Any, Any],
    inputs: Sequence[Mapping[str, Any]] = ({},),
    *,
    max_seconds: float = 600.0,
    max_usd: float = math.inf,
    repeats: int = 2,
    most_repeats: int | None = None,
    seed: int = 0,
    heard: Callable[[Measurement], None] | None = None,
) -> SweepReport:
    """Run a decorated flow at different settings until its models are identified.

    Every stage is measured at a spread of its menu's settings, ``repeats`` times each; all stages change in every run.
    Settings that were measured before, in this flow or for the same task in another one, are not measured again; one
    run always shows what the flow looks like now. Failed runs are counted and don't train. Results that come from a
    cache say nothing, so once one does the remaining runs refresh the cache. What was measured is kept, however the
    sweep ends: the next one goes on from there. Blocks; call it from a thread where an event loop is running.

    Args:
        flow: A flow decorated with ``@slo``.
        inputs: Parameters of the runs, taken in turn.
        max_seconds: No run is begun that would end after this, by the time of the slowest so far.
        max_usd: No run is begun that would cost more than is left, by the cost of the dearest so far.
        repeats: Rows per setting.
        most_repeats: Rows per setting at most, where runs of one setting differ by more than 5 %: noisy runs promise
            little until there are more of them. By default no more than ``repeats``.
        seed: Of the order of settings.
        heard: Called after every run.

    Raises:
        InvalidValue: The flow isn't decorated, no input is given, or a cap isn't positive.
        httpx.HTTPError: The API cannot be reached.
        KeyboardInterrupt: Ctrl-C, after what was measured has been folded into the profile.
    """
    director = director_of(flow)
    if not inputs:
        raise InvalidValue("inputs", inputs, "at least one set of parameters")
    if not max_seconds > 0 or not max_usd > 0 or repeats < 1:
        raise InvalidValue("caps", (max_seconds, max_usd, repeats), "positive limits and at least one repeat")
    most = max(repeats, most_repeats or repeats)
    return _Sweep(flow, director, inputs, max_seconds, max_usd, (repeats, most), seed, heard).run()


class _Sweep:
    def __init__(
        self,
        flow: Flow[Any, Any],
        director: LoopDirector,
        inputs: Sequence[Mapping[str, Any]],
        max_seconds: float,
        max_usd: float,
        repeats: tuple[int, int],
        seed: int,
        heard: Callable[[Measurement], None] | None,
    ) -> None:
        self._flow, self._director, self._inputs = flow, director, inputs
        self._max_seconds, self._max_usd = max_seconds, max_usd
        (self._repeats, self._most), self._seed, self._heard = repeats, seed, heard
        self._runs: list[Measurement] = []
        self._begun = time.monotonic()
        self._slowest_s = self._dearest_usd = self._spent_usd = 0.0
        self._item_s: dict[str, float] = {}
        self._on_threads: dict[str, str] = {}
        self._cached = False

    def run(self) -> SweepReport:
        background.settle()  # what runs of before have left to learn
        try:
            stopped = self._sweep()
        except KeyboardInterrupt:
            self._learn()
            raise
        known = self._learn()
        return SweepReport(tuple(self._runs), time.monotonic() - self._begun, self._spent_usd, stopped, known)

    def _sweep(self) -> str:
        """Run the flow once to see it, then at what is to be measured; returns why it ended."""
        shown = self._run_once({}, planned=1)
        if shown is None:
            return "the first run failed"
        workflow = self._workflow(shown)
        for _ in range(PASSES):
            fold_in(self._flow.name)  # the first time, this brings rows of tasks that other flows have profiled, too
            rows = self._known_rows(workflow)
            workflow = self._workflow(shown, rows)
            repeats = sweep.wanted_repeats(workflow, rows, repeats=self._repeats, most=self._most)
            design = sweep.design(workflow, rows, repeats=repeats, seed=self._seed)
            if not design.runs:
                return "every setting was measured" if len(self._runs) > 1 else "every setting had been measured before"
            if why := self._measure(workflow, design):
                return why
        return f"some settings could not be measured in {PASSES} passes"

    def _learn(self) -> Knowledge:
        forget(self._flow.name)
        return learn(self._flow.name, self._director.slo, seed=self._director.seed, refit=True)

    def _measure(self, workflow: Workflow, design: sweep.Design) -> str:
        """Run the design; returns why it ended early, or nothing."""
        plan = knowledge(self._flow.name).plan
        preferred = {name: stage.option for name, stage in plan.stages.items()} if plan is not None else {}
        usual = sweep.fallback_options(workflow, preferred)
        planned = len(self._runs) + design.runs
        for number in range(design.runs):
            if why := self._capped():
                return why
            self._run_once(design.setting(number, usual), planned=planned, workflow=workflow)
            if sum(bool(run.error) for run in self._runs) == FAILURES:
                return f"{FAILURES} runs failed"
        return ""

    def _known_rows(self, workflow: Workflow) -> StageRuns | None:
        profile = SLOProfile.of_flow(self._flow.name)
        if profile is None:
            return None
        return observations_of(profile.ledger(), workflow).stage_runs

    def _capped(self) -> str:
        if time.monotonic() - self._begun + self._slowest_s > self._max_seconds:
            return f"the time cap of {self._max_seconds:g} s"
        if self._spent_usd + self._dearest_usd > self._max_usd:
            return f"the money cap of ${self._max_usd:g}"
        return ""

    def _run_once(
        self, settings: Mapping[str, Option], *, planned: int, workflow: Workflow | None = None
    ) -> ObservedRun | None:
        seen: list[ObservedRun] = []
        plan = self._plan(settings, workflow) if workflow is not None else None
        recipe = Recipe(prices=self._director.prices, pool=self._director.usual.pool) if plan is None else None
        names: dict[str, Any] = {"flow_name": self._flow.name, "on_threads": self._on_threads}
        told = Following(plan, recipe, heard=seen.append, **names)
        parameters = dict(self._inputs[len(self._runs) % len(self._inputs)])
        begun, error = time.monotonic(), ""
        try:
            with ExitStack() as stack:
                stack.enter_context(following(told))
                if self._cached:
                    stack.enter_context(temporary_settings({PREFECT_TASKS_REFRESH_CACHE: True}))
                _call(self._flow, parameters)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            get_logger("slo").warning("A run of the sweep failed (%s).", error)
        took = time.monotonic() - begun
        observed = seen[-1] if seen and seen[-1].completed and not error else None
        cost = seen[-1].cost_usd if seen else 0.0
        self._spent_usd += cost
        self._slowest_s, self._dearest_usd = max(self._slowest_s, took), max(self._dearest_usd, cost)
        if observed is not None:
            self._note_items(observed)
            self._cached |= observed.cached
        latency_s = observed.latency_s if observed is not None else math.nan
        measurement = Measurement(len(self._runs) + 1, planned, settings, latency_s, cost, error)
        self._runs.append(measurement)
        if self._heard is not None:
            self._heard(measurement)
        return observed

    def _plan(self, settings: Mapping[str, Option], workflow: Workflow) -> Plan:
        stages = {}
        for name, option in settings.items():
            stage = StagePlan.of(option)
            items = workflow[name].items or 1
            stages[name] = bundled(stage, self._item_s[name], items) if name in self._item_s and items > 1 else stage
        return Plan(workflow.name, None, stages)

    def _note_items(self, run: ObservedRun) -> None:
        """Time of an item by stage, for bundles and record levels like those of a plan."""
        for row in (row for row in run.stage_runs if not run.stages[row.stage].failed):
            busy = (row.wall_s - row.overhead_s) * row.workers
            self._item_s.setdefault(row.stage, busy / max(row.items, 1))

    def _workflow(self, run: ObservedRun, rows: StageRuns | None = None) -> Workflow:
        if run.workflow is None:
            raise InvalidValue("flow", run.flow_name, "a flow that submits tasks: there is nothing to size")
        self._on_threads = unpickled_stages(run, {})
        director = self._director
        on_threads = frozenset(self._on_threads)
        menus = (director.menu, run.declarations, on_threads, director.pools)
        return with_menus(run.workflow, *menus, or_threads=moving_much(rows) if rows is not None else frozenset())


def _call(flow: Flow[Any, Any], parameters: Mapping[str, Any]) -> None:
    """Run a flow of any kind to its end."""
    result = flow(**parameters)
    if inspect.isawaitable(result):
        asyncio.run(_awaited(result))
    elif inspect.isasyncgen(result):
        asyncio.run(_exhausted(result))
    elif inspect.isgenerator(result):
        for _ in result:
            pass


async def _awaited(result: Awaitable[Any]) -> None:
    await result


async def _exhausted(result: AsyncIterator[Any]) -> None:
    async for _ in result:
        pass
