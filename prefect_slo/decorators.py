"""``@slo``: what a user puts above an existing flow."""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Flow
from prefect.context import FlowRunContext
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from prefect_slo.declaration import Declaration
from prefect_slo.errors import InvalidValue, UnsupportedTaskRunner
from prefect_slo.loop.director import Features, LoopDirector, ready
from prefect_slo.loop.menus import MenuSettings
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.runner.flow_run import FlowClock
from prefect_slo.runner.pools import PoolDefinition, Pools, by_name, resolved
from prefect_slo.runner.recipe import Recipe
from prefect_slo.runner.task_runner import SLOTaskRunner
from prefect_slo.settings import Mode
from prefect_slo.units import fraction, items, text, whole

P = ParamSpec("P")
R = TypeVar("R")
SUPPORTED = ("ThreadPoolTaskRunner", "ProcessPoolTaskRunner", "DaskTaskRunner", "RayTaskRunner", "SLOTaskRunner")
CLUSTERS = {("prefect_dask", "DaskTaskRunner"): "DaskPool", ("prefect_ray", "RayTaskRunner"): "RayPool"}
"""Task runners of Prefect's integrations, and the pools that stand for them."""

TIMED = "__slo_timed__"


def slo(
    latency: float | str | timedelta | None = None,
    *,
    budget_usd: float | str | None = None,
    percentile: float = 0.95,
    confidence: float = 0.99,
    mode: Mode | None = None,
    stages: Mapping[str, Declaration | Mapping[str, Any]] | None = None,
    menu: Mapping[str, Any] | MenuSettings | str | None = None,
    pools: Sequence[PoolDefinition] = (),
    features: Features | str | tuple[str, ...] | None = None,
    explore: float = 0.05,
    seed: int = 0,
) -> Callable[[Flow[P, R]], Flow[P, R]]:
    """Give a flow a deadline, a budget, or both; it sizes itself.

    The flow stays a Prefect flow: name, parameters, hooks, ``serve`` and ``deploy`` are what they were. Until its tasks
    have been measured it runs as it would without the decorator, and is observed.

    Args:
        latency: Bound on the percentile of a run's latency: seconds, ``"30s"``, ``"2m"`` or a ``timedelta``.
        budget_usd: Bound on the percentile of a run's cost, in US dollars.
        percentile: Fraction of runs that must keep the bound.
        confidence: How sure a plan must be that they do.
        mode: ``observe`` changes nothing; ``advise`` plans and shows; ``enforce`` runs by the plan. By default observe
            until the flow's tasks have been measured well enough, then enforce.
        stages: Declarations by task name, as an alternative to ``slo_task``.
        menu: What may be chosen for every stage: ``workers``, ``vcpus``, ``memory_mb``, ``batch``, ``prices``, or the
            name of a stored ``slo-menu`` block; by default what this machine has. ``pools``: names of those that stages
            run on which declare none.
        pools: Pools beyond worker processes and threads, which tasks and the menu may then name.
        features: Size of a run's input from its parameters: a function of the parameters, or names of numeric ones.
        explore: Fraction of runs that may try a setting that was never measured, as long as the bound holds under
            the model.
        seed: Of every draw; the same observations and seed give the same plan.

    Raises:
        InvalidValue: A value that an argument may not hold, or something that is not a flow.
        UnsupportedTaskRunner: The flow has a task runner of its own that has no matching backend.

    Example:
        ```python
        from prefect import flow, task
        from prefect_slo import slo

        @task
        def square(x: int) -> int:
            return x * x

        @slo(latency="30s")
        @flow
        def squares(n: int = 10) -> int:
            return sum(square.map(range(n)).result())
        ```
    """
    if callable(latency) or isinstance(latency, Flow):
        raise InvalidValue("slo", latency, "to be called with a bound: @slo(latency='30s')")
    objective = Slo(
        Latency(latency, percentile, confidence) if latency is not None else None,
        Budget(budget_usd, percentile, confidence) if budget_usd is not None else None,
    )
    if mode not in (None, "observe", "advise", "enforce"):
        raise InvalidValue("mode", mode, "'observe', 'advise' or 'enforce'")
    declarations = {name: Declaration.of(value, f"stages[{name!r}]") for name, value in (stages or {}).items()}
    settings, given = MenuSettings.of(menu), by_name(pools)
    explored = 0.0 if explore == 0 else fraction(explore, "explore")
    seed = whole(seed, "seed", least=0)

    def decorate(flow: Flow[P, R]) -> Flow[P, R]:
        if not isinstance(flow, Flow):
            raise InvalidValue("slo", flow, "a Prefect flow: put @slo(...) above @flow")
        own: TaskRunner[Any] = flow.task_runner
        if isinstance(own, SLOTaskRunner) and isinstance(own.director, LoopDirector):
            own = own.stock or ThreadPoolTaskRunner()  # decorated before: this decorator takes the other's place
        usual, declared, elsewhere = _stands_for(own)
        elsewhere = {**elsewhere, **given}
        offered = settings if settings.pools or usual.pool is None else replace(settings, pools=(usual.pool,))
        for name in (*(settings.pools or ()), *(name for one in declarations.values() for name in one.pools)):
            resolved(name, elsewhere)
        director = LoopDirector(
            slo=objective,
            mode=mode,
            usual=usual,
            menu=offered,
            stages={**declared, **declarations},
            pools=elsewhere,
            features=_features(features, flow),
            explore=explored,
            seed=seed,
        )
        runner = SLOTaskRunner(stages=director.stages, director=director, pools=tuple(elsewhere.values()))
        runner.stock, runner.recipe = own, usual
        decorated = flow.with_options(task_runner=cast("TaskRunner[Any]", runner))
        decorated.fn = timed(flow.fn)
        return decorated

    return decorate


def director_of(flow: Flow[Any, Any]) -> LoopDirector:
    """The director of a flow decorated with ``@slo``.

    Raises:
        InvalidValue: The flow isn't decorated.
    """
    director = getattr(flow.task_runner, "director", None)
    if not isinstance(director, LoopDirector):
        raise InvalidValue("flow", flow.name, "a flow decorated with @slo(...)")
    return director


def timed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A flow function that tells the task runner when it was entered and left; of the same kind as ``fn``."""
    if getattr(fn, TIMED, False):
        return fn
    wrapper = functools.wraps(fn)(_same_kind(fn))
    setattr(wrapper, TIMED, True)
    return wrapper


def _same_kind(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` under a ``_Timing``: a coroutine function stays one, a generator function too."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        with _Timing():
            return fn(*args, **kwargs)

    def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with _Timing():
            return (yield from fn(*args, **kwargs))

    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        with _Timing():
            return await fn(*args, **kwargs)

    async def async_generator(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        with _Timing():
            async for value in fn(*args, **kwargs):
                yield value

    if inspect.isasyncgenfunction(fn):
        return async_generator
    if inspect.iscoroutinefunction(fn):
        return coroutine
    return generator if inspect.isgeneratorfunction(fn) else plain


class _Timing:
    """Notes entry and exit on the clock of the running flow's task runner."""

    def __enter__(self) -> None:
        context = FlowRunContext.get()
        runner = context.task_runner if context is not None else None
        self._clock = FlowClock()
        if isinstance(runner, SLOTaskRunner):
            self._clock = runner.clock
            ready()
        self._clock.entered = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._clock.returned, self._clock.raised = time.monotonic(), kind is not None


def _stands_for(runner: TaskRunner[Any]) -> tuple[Recipe, Mapping[str, Declaration], Pools]:
    """How a flow with a task runner of its own is run where nothing is to change, what that declares, and its pools.

    Raises:
        UnsupportedTaskRunner: It has no matching backend.
    """
    if isinstance(runner, SLOTaskRunner):
        return runner.recipe, runner.stages, runner.pools
    if type(runner) is ThreadPoolTaskRunner:
        limit = runner._max_workers
        return Recipe(isolation="thread", workers=limit if limit < sys.maxsize else None, record="full"), {}, {}
    if type(runner) is ProcessPoolTaskRunner:
        # not pinned: its user has asked for nothing of us
        return Recipe(workers=runner._max_workers, record="full"), {}, {}
    kind = type(runner)
    if (stands_for := CLUSTERS.get((kind.__module__.partition(".")[0], kind.__name__))) is not None:
        from prefect_slo.runner import cluster_pools

        pool = getattr(cluster_pools, stands_for).of(runner)
        return Recipe(record="full", pool=pool.name), {}, {pool.name: pool}
    raise UnsupportedTaskRunner(kind.__name__, SUPPORTED)


def _features(features: Features | str | tuple[str, ...] | None, flow: Flow[Any, Any]) -> Features | None:
    if features is None or callable(features):
        return features
    names = (features,) if isinstance(features, str) else items(features, "features")
    for name in names:
        if text(name, "features") not in flow.parameters.properties:
            known = ", ".join(flow.parameters.properties) or "none"
            raise InvalidValue("features", name, f"a function, or parameters of the flow ({known})")
    return functools.partial(_parameters, names)


def _parameters(names: tuple[str, ...], parameters: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(parameters[name]) for name in names}
