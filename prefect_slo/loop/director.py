"""The director of a decorated flow: decides how each run is run, keeps what it shows, and learns from it.

Decorating a flow imports none of what deciding and learning take; ``ready`` does, before the clock of a run starts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefect_slo.declaration import Declaration
from prefect_slo.errors import GpuShareTooLarge, InfeasibleSlo
from prefect_slo.loop.menus import MenuSettings
from prefect_slo.loop.saying import say_once
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan
from prefect_slo.pricing import PriceList, price_list
from prefect_slo.runner.pools import Pools
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.settings import Mode, SLOSettings

if TYPE_CHECKING:
    from prefect_slo.loop.planning import Decision
    from prefect_slo.observation import Invocation
    from prefect_slo.telemetry import RunLog

Features = Callable[[Mapping[str, Any]], Mapping[str, float]]


@dataclass(frozen=True)
class Following:
    """Plans that runs are told to follow, whatever is known: how a sweep measures settings.

    Attributes:
        plan: The plan; ``None`` runs by ``recipe``.
        recipe: In place of a plan.
        heard: Gets what each run shows.
        learn: Whether the runs are folded into the profile as they end.
        flow_name: The flow that is told; by default the one that the plan is for. Other decorated flows, which this one
            may call, decide for themselves.
        on_threads: Stages that are known not to pickle, with the hash of their code.
    """

    plan: Plan | None = None
    recipe: Recipe | None = None
    heard: Callable[[ObservedRun], None] | None = None
    learn: bool = False
    mode: str = "profile"
    flow_name: str = ""
    on_threads: Mapping[str, str] = field(default_factory=dict)

    def concerns(self, flow_name: str) -> bool:
        """Whether a flow is told by this."""
        named = self.flow_name or (self.plan.workflow if self.plan is not None else flow_name)
        return named == flow_name


@cache
def ready() -> None:
    """Import, once, what the first run of a process would otherwise import while it is timed."""
    for name in (
        "loop.knowledge",
        "loop.learning",
        "loop.planning",
        "runner.backends.processes",
        "runner.session",
        "telemetry",
    ):
        import_module(f"prefect_slo.{name}")
    import_module("networkx")


_FOLLOWING: ContextVar[Following | None] = ContextVar("prefect_slo_following", default=None)


@contextmanager
def following(told: Following) -> Iterator[None]:
    """Inside, decorated flows of this context run as told."""
    token = _FOLLOWING.set(told)
    try:
        yield
    finally:
        _FOLLOWING.reset(token)


@dataclass
class _Active:
    """A run under way."""

    log: RunLog | None
    decision: Decision
    told: Following | None


@dataclass(eq=False)
class LoopDirector:
    """Decides about the runs of one decorated flow. Picklable; what is under way stays in its process.

    Attributes:
        slo: What is asked.
        mode: ``None``: enforce once the models are identified, observe before.
        usual: How runs are run that change nothing: what the flow's own task runner stands for.
        menu: What the decorator says of menus.
        stages: Declarations by task name.
        pools: Pools beyond this machine's, by name.
        features: Input size from the flow's parameters.
        explore: Fraction of runs that may try something unmeasured, within the bound.
        seed: Of every draw.
    """

    slo: Slo
    mode: Mode | None = None
    usual: Recipe = field(default_factory=lambda: Recipe(isolation="thread", record="full"))
    menu: MenuSettings = field(default_factory=MenuSettings)
    stages: Mapping[str, Declaration] = field(default_factory=dict)
    pools: Pools = field(default_factory=dict)
    features: Features | None = None
    explore: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        self._active: dict[str, _Active] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    # ---- Director ---------------------------------------------------------------------------------------------------

    def recipe(self, flow_name: str, run_id: str, parameters: Mapping[str, Any]) -> Recipe:
        """How to run the run that starts now; see ``runner.recipe.Director``."""
        from prefect_slo.loop.planning import Decision
        from prefect_slo.telemetry import RunLog

        told = _FOLLOWING.get()
        if told is not None and told.concerns(flow_name):
            decision = Decision(told.plan, told.mode, on_threads=told.on_threads)
        else:
            told, decision = None, self._decide(flow_name, run_id, parameters)
        settings = SLOSettings()
        log = None
        if settings.telemetry:
            log = RunLog(flow_name, run_id, settings.telemetry_directory, facts=self._facts(decision))
        with self._lock:
            self._active[run_id] = _Active(log, decision, told)
        if decision.note:
            say_once(flow_name, decision.note, level=logging.WARNING if decision.lacking else logging.INFO)
        if told is not None and told.recipe is not None:
            return told.recipe
        if decision.followed is None:
            return replace(self.usual, prices=self.prices)
        return Recipe(
            plan=decision.followed,
            on_threads=frozenset(decision.on_threads),
            ladders=decision.ladders,
            prices=self.prices,
            pool=self.usual.pool,
        )

    def heard(self, invocation: Invocation, run_id: str) -> None:
        """Write down one bundle."""
        active = self._active.get(run_id)
        if active is not None and active.log is not None:
            active.log.invocation(invocation)

    def observed(self, run: ObservedRun) -> None:
        """Write down the run, compare it with its plan, and learn when it is time."""
        with self._lock:
            active = self._active.pop(run.run_id, None)
        if active is None:
            return
        from prefect_slo.loop.ended import Learner

        Learner(self, active.decision).take(run, active.log, learn=active.told is None or active.told.learn)
        if active.told is not None and active.told.heard is not None:
            active.told.heard(run)

    def features_of(self, flow_name: str, parameters: Mapping[str, Any]) -> dict[str, float]:
        """Size of a run's input; nothing where none is declared, or where the declared function fails."""
        if self.features is None:
            return {}
        try:
            return {name: float(value) for name, value in self.features(parameters).items()}
        except Exception as error:
            message = f"features= failed ({type(error).__name__}: {error}); runs count as if it weren't there."
            say_once(flow_name, message, level=logging.WARNING, about="features")
            return {}

    # ---- private ----------------------------------------------------------------------------------------------------

    def _decide(self, flow_name: str, run_id: str, parameters: Mapping[str, Any]) -> Decision:
        """Never raises: what can't be decided is observed, and the reason said."""
        import numpy as np

        from prefect_slo.loop import hosts
        from prefect_slo.loop.knowledge import Knowledge, knowledge
        from prefect_slo.loop.planning import Decision, decide

        mode = SLOSettings().mode or self.mode
        if (pinned := self._pinned(flow_name, parameters, mode)) is not None:
            return pinned
        known = Knowledge(flow_name)
        try:
            known = hosts.seen_from_here(knowledge(flow_name), self.pools)
            rng = np.random.default_rng([self.seed, *run_id.encode()])
            features = self.features_of(flow_name, parameters)
            return decide(known, self.slo, mode=mode, seed=self.seed, explore=self.explore, rng=rng, features=features)
        except (GpuShareTooLarge, InfeasibleSlo) as error:  # the menus have nothing else
            made, without = (None, "") if known.plan is None else hosts.for_here(known, known.plan, self.pools)
            if without:
                return Decision(made, mode or "enforce", without, known.on_threads, lacking=True)
            return Decision(None, "observe", f"runs as it is: there is no plan ({error})")
        except Exception as error:
            return Decision(None, "observe", f"runs as it is: there is no plan ({type(error).__name__}: {error}).")

    def _pinned(self, flow_name: str, parameters: Mapping[str, Any], mode: Mode | None) -> Decision | None:
        """What a run does that is pinned to a plan; ``None`` where it is free, or its plan can't be read."""
        from prefect_slo.loop import hosts
        from prefect_slo.loop.knowledge import Knowledge, knowledge
        from prefect_slo.loop.pinning import pinned
        from prefect_slo.loop.planning import told

        try:
            plan = pinned(flow_name, parameters)
        except Exception as error:
            message = (
                f"the plan that it is pinned to can't be followed ({type(error).__name__}: {error}): this run goes as "
                "it would without. Pin a plan that there is (prefect-slo pin), or none (prefect-slo unpin)."
            )
            say_once(flow_name, message, level=logging.WARNING, about="pinned plan")
            return None
        if plan is None:
            return None
        try:
            known = hosts.seen_from_here(knowledge(flow_name), self.pools)
        except Exception:  # the plan is all that it takes
            known = Knowledge(flow_name)
        made, without = hosts.for_here(known, plan, self.pools)
        decision = told(known, made, mode)
        return replace(decision, note=f"{decision.note} {without}".strip(), lacking=bool(without))

    def _facts(self, decision: Decision) -> dict[str, Any]:
        slo = self.slo
        facts: dict[str, Any] = {
            "mode": decision.mode,
            "bound_s": slo.latency.bound_s if slo.latency else None,
            "bound_usd": slo.budget.bound_usd if slo.budget else None,
            "plan_digest": decision.digest,
            "predicted_s": None,
        }
        if decision.followed is not None and decision.followed.predicted is not None:
            predicted = decision.followed.predicted
            facts["predicted_s"] = predicted.latency_s.mean
            facts["predicted_at_percentile_s"] = predicted.latency_at_percentile_s
        return facts

    @property
    def prices(self) -> PriceList:
        """What reserved time costs; the package's own list where a stored menu can't be read."""
        try:
            return price_list(self.menu.resolved().prices)
        except Exception as error:
            message = f"its prices are unknown, local ones count ({type(error).__name__}: {error})."
            say_once(f"menu {self.menu.block!r}", message, level=logging.WARNING, about="prices")
            return price_list("local")
