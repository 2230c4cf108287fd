"""How long and how dear a run of the whole workflow is, learned from its stage runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from prefect_slo.columns import refuse
from prefect_slo.errors import InvalidObservation, InvalidPlan, InvalidValue, NotEnoughObservations, UnknownStage
from prefect_slo.models.design import Floats
from prefect_slo.models.drawing import Shared, cost_of, draw_options, points_of, requests_of, waves_of
from prefect_slo.models.driver import Driver
from prefect_slo.models.history import History, knob_label, read
from prefect_slo.models.identification import Identification, identify
from prefect_slo.models.learning import KINDS, Learned, learn
from prefect_slo.models.makespan import makespan, stages_run
from prefect_slo.models.protocol import Response, StageModel
from prefect_slo.models.stage_time import StageTime
from prefect_slo.models.tables import SampleTables, StageTable, upstream_sums
from prefect_slo.models.transfer import THREAD, on_threads
from prefect_slo.observation import StageRuns
from prefect_slo.plan import Plan, Prediction, Quantiles, StagePlan
from prefect_slo.pricing import price_list
from prefect_slo.resources import Option, Size
from prefect_slo.units import positive, whole
from prefect_slo.workflow import Workflow

SCHEMA = 1
_ROWS = 1200
_LEAST_ROWS = 48
_LEAST_WEIGHT = 0.01
_MB_PER_VCPU = 1769.0
_PRIOR_RUNS = 2.0
_SHORTEST_S, _LONGEST_S = 1e-9, 1e9


@dataclass(frozen=True)
class PlanSamples:
    """Draws of runs of one plan, all arrays of shape ``(n_samples,)``.

    Attributes:
        latency_s: Of the run.
        cost_usd: Of the run, over all stages.
        stage_latency_s: By stage.
        stage_cost_usd: By stage.
        ran: Whether each stage ran.
    """

    latency_s: Floats
    cost_usd: Floats
    stage_latency_s: Mapping[str, Floats]
    stage_cost_usd: Mapping[str, Floats]
    ran: Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class PlanPrediction(Prediction):
    """A prediction together with the draws that it summarises."""

    samples: PlanSamples = field(repr=False, compare=False, kw_only=True)


class WorkflowModel:
    """Joint distribution of latency and cost of a workflow.

    Args:
        workflow: Its graph and menus.
        kind: Stage model: ``white-box`` (default), or for comparison ``empirical``, ``analytic`` or ``regression``.
        features: Columns that hold the size of a run's input. They are used where they vary between runs of one
            setting; ``bytes_in`` is one of them by default.
        half_life_runs: A run weighs half as much as one that many runs later; ``None`` weighs all alike.

    Example:
        ``WorkflowModel(workflow).fit(table).predict(plan).latency_s.p95``
    """

    def __init__(
        self, workflow: Workflow, *, kind: str = "white-box", features: Sequence[str] = ("bytes_in",),
        half_life_runs: float | None = 500.0,
    ) -> None:  # fmt: skip
        self.workflow = workflow
        self.kind = kind
        self.features = tuple(features)
        self.half_life_runs = half_life_runs

    def fit(self, stage_runs: Any, run_latency_s: Mapping[str, float] | None = None) -> Self:
        """Learn from a stage-run table: a pandas table, a mapping of columns, or ``StageRuns``.

        Args:
            stage_runs: The table.
            run_latency_s: Latency of whole runs by run id: what exceeds the longest path of their stages is the time
                of the flow function itself.

        Raises:
            InvalidObservation: A column is missing, a value can't be a measurement, or there is no row.
            UnknownStage: A row of a stage that the workflow doesn't have.
        """
        if self.kind not in KINDS:
            raise InvalidValue("kind", self.kind, f"one of {', '.join(KINDS)}")
        if self.half_life_runs is not None:
            positive(self.half_life_runs, "half_life_runs")
        self._histories: dict[str, History] = {}
        self._branches = {stage.name: (0, 0) for stage in self.workflow.stages}
        self._driver = Driver()
        self._runs = 0
        return self.update(stage_runs, run_latency_s)

    def update(self, stage_runs: Any, run_latency_s: Mapping[str, float] | None = None) -> Self:
        """Learn from more runs. Equals, to the last bit, a fit on the old rows followed by the new ones.

        Args:
            stage_runs: Rows of whole runs that came after those learned so far.
            run_latency_s: As in ``fit``.
        """
        runs = self._table(stage_runs)
        fresh, numbers = read(self.workflow, runs, self.features, first_run=self._runs)
        self._runs += len(numbers)
        self._count_branches(fresh)
        self._driver = self._driver.followed_by(self.workflow, runs, run_latency_s or {})
        for name, history in fresh.items():
            known = self._histories.get(name, history.take(np.zeros(0, dtype=np.int64)))
            self._histories[name] = known.followed_by(history, self._limit)
        return self._learn()

    def to_document(self) -> dict[str, Any]:
        """Everything that predictions depend on, JSON-able: the rows kept, and the settings."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "features": list(self.features),
            "half_life_runs": self.half_life_runs,
            "runs": self._runs,
            "branches": {name: list(counts) for name, counts in self._branches.items() if counts != (0, 0)},
            "driver_s": self._driver.to_document(),
            "stages": {name: history.to_document() for name, history in self._histories.items()},
        }

    @classmethod
    def from_document(cls, workflow: Workflow, document: Mapping[str, Any]) -> Self:
        """The model that wrote the document; stages that the workflow no longer has are left out.

        Raises:
            InvalidValue: A document of another schema.
        """
        if not isinstance(document, Mapping):
            raise InvalidValue("model", document, "what to_document() returns")
        if document.get("schema") != SCHEMA:
            raise InvalidValue("model.schema", document.get("schema"), f"{SCHEMA}; fit the model again")
        for name in ("kind", "features", "half_life_runs", "runs", "branches", "driver_s", "stages"):
            if name not in document:
                raise InvalidValue(f"model.{name}", None, "what to_document() wrote there; fit the model again")
        model = cls(
            workflow, kind=document["kind"], features=document["features"], half_life_runs=document["half_life_runs"]
        )
        model._runs = document["runs"]
        model._branches = {stage.name: (0, 0) for stage in workflow.stages}
        model._branches |= {n: (int(c[0]), int(c[1])) for n, c in document["branches"].items() if n in workflow}
        model._driver = Driver.from_document(document["driver_s"])
        model._histories = {
            name: History.from_document(rows) for name, rows in document["stages"].items() if name in workflow
        }
        return model._learn()

    def identified(self, stage: str) -> Identification:
        """Whether a stage was measured at enough settings to plan it: true or false, with the reason."""
        return identify(stage, self.workflow[stage].menu, self._histories.get(stage))

    def require_identified(self) -> None:
        """Do nothing when every stage can be planned.

        Raises:
            NotEnoughObservations: Of the first stage that can't.
        """
        for stage in self.workflow.stages:
            self.identified(stage.name).require()

    def history(self, stage: str) -> History:
        """The rows kept of a stage.

        Raises:
            NotEnoughObservations: None was measured.
        """
        if stage not in self._histories:
            self._refuse(stage)
        return self._histories[stage]

    def stage_model(self, stage: str, *, hardware: str | None = None) -> StageModel:
        """The fitted model of a stage on one kind of hardware; the kind measured most by default."""
        return self._learned(stage, hardware).model

    def memory_needed(self, stage: str) -> float:
        """Memory in MB that a worker needs for the largest input seen, with margins; 0 where it was not measured."""
        learned = [known for known in self._known.get(stage, {}).values() if known.memory is not None]
        sizes = [float(k.inputs.features[:, 0].max()) if k.inputs.features.shape[1] else 1.0 for k in learned]
        return max((k.memory.at(size) for k, size in zip(learned, sizes, strict=True) if k.memory), default=0.0)

    def stage_time(
        self, stage: str, *, workers: int = 1, memory_mb: float | None = None, vcpus: float | None = None,
        hardware: str | None = None, batch: int = 1, items: int | None = None, upstream: int | None = None,
        knobs: Mapping[str, object] | None = None,
    ) -> StageTime:  # fmt: skip
        """Wall time of a stage at any setting, on the menu or off it.

        Args:
            stage: Its name.
            workers: Workers that run it at once.
            memory_mb: Memory of each; gives the vCPUs by the price list where they are tied.
            vcpus: vCPUs of each.
            hardware: Kind of machine; the one measured most by default.
            batch: Items in one call.
            items: Items of the run; the typical number by default.
            upstream: Workers of its parents, summed; as measured by default.
            knobs: Values of the task's knobs.

        Raises:
            UnknownStage: No such stage.
            NotEnoughObservations: Nothing was measured of it.
        """
        return self._time(stage, "wall", workers, memory_mb, vcpus, hardware, batch, items, upstream, knobs)

    def busy_time(
        self, stage: str, *, workers: int = 1, memory_mb: float | None = None, vcpus: float | None = None,
        hardware: str | None = None, batch: int = 1, items: int | None = None, upstream: int | None = None,
        knobs: Mapping[str, object] | None = None,
    ) -> StageTime:  # fmt: skip
        """Mean busy time of a stage's workers: what a function service bills. Arguments as in ``stage_time``."""
        return self._time(stage, "busy", workers, memory_mb, vcpus, hardware, batch, items, upstream, knobs)

    def tables(self, n_samples: int, rng: np.random.Generator, *, cold: bool | float = False) -> SampleTables:
        """Draws of every option that the menus offer and the models know.

        Args:
            n_samples: Draws per option.
            rng: Spawns one independent stream per stage, by position, so that names don't matter.
            cold: Whether workers have to start, or the share of runs in which they do.

        Raises:
            NotEnoughObservations: A stage of which no option can be predicted.
        """
        streams, shared = self._shared(n_samples, rng, cold)
        stages = {}
        for name, stream in streams.items():
            options = self._options(name)
            needs_sums = any(learned.model.depends_on_upstream for learned in self._known[name].values())
            sums = upstream_sums(self.workflow, name) if needs_sums else (0,)
            latency, cost = self._draw(name, options, sums, shared, stream, None)
            stages[name] = StageTable(name, options, sums, latency, cost, waves_of(self._known[name], options))
        driver = self._driver.sample(n_samples, rng.spawn(1)[0]).astype(np.float32)
        return SampleTables(self.workflow, stages, driver, shared.ran)

    def sample_plan(
        self, plan: Plan | Mapping[str, Option], n_samples: int, rng: np.random.Generator, *,
        cold: bool | float = False, blocks: int | None = None,
    ) -> PlanSamples:  # fmt: skip
        """Draws of runs of one plan.

        Every sample draws its own parameters, so that the percentile of all is a prediction of the next run. A
        *promise* with confidence γ needs the percentile of each possible truth by itself: with ``blocks``, samples come
        in that many consecutive blocks, each under one draw of all parameters, and at least γ of the blocks must keep
        the bound at the percentile.

        Args:
            plan: Plan, or options by stage.
            n_samples: Draws; a multiple of ``blocks``.
            rng: As in ``tables``.
            cold: As in ``tables``.
            blocks: Number of parameter draws; ``None`` is one per sample.

        Raises:
            InvalidValue: ``n_samples`` is not a multiple of ``blocks``.
            UnknownStage: The plan lacks a stage.
            NotEnoughObservations: A stage that was never measured.
        """
        if blocks is not None and (blocks < 1 or n_samples % blocks):
            raise InvalidValue("n_samples", n_samples, f"a multiple of blocks={blocks}")
        chosen = self._chosen(plan)
        streams, shared = self._shared(n_samples, rng, cold)
        latency: dict[str, Floats] = {}
        cost: dict[str, Floats] = {}
        waves: dict[str, float] = {}
        for name, stream in streams.items():
            self._learned(name, chosen[name].size.hardware)
            sums = (sum(chosen[parent].workers for parent in self.workflow[name].parents),)
            planned = plan[name] if isinstance(plan, Plan) else None
            drawn = self._draw(name, (chosen[name],), sums, shared, stream, blocks, planned)
            latency[name], cost[name] = (values[0, 0].astype(float) for values in drawn)
            waves[name] = float(waves_of(self._known[name], (chosen[name],))[0])
        driver = self._driver.sample(n_samples, rng.spawn(1)[0])
        total = makespan(self.workflow, latency, waves=waves, driver_s=driver)
        return PlanSamples(total, sum(cost.values(), np.zeros(n_samples)), latency, cost, shared.ran)

    def sample_truths(
        self, plan: Plan | Mapping[str, Option], truths: int, runs: int, rng: np.random.Generator, *,
        cold: bool | float = False,
    ) -> PlanSamples:  # fmt: skip
        """Draws of ``runs`` runs under each of ``truths`` draws of the parameters, one truth after the other.

        What a promise with a confidence is tested on: it must hold under that share of the truths.
        """
        return self.sample_plan(plan, truths * runs, rng, cold=cold, blocks=truths)

    def predict(
        self, plan: Plan | Mapping[str, Option], *, n_samples: int = 20_000, seed: int = 0, cold: bool | float = False
    ) -> PlanPrediction:
        """Latency and cost of runs of a plan, under the model; see ``sample_plan``."""
        samples = self.sample_plan(plan, whole(n_samples, "n_samples"), np.random.default_rng(seed), cold=cold)
        at = plan.objective.percentile if isinstance(plan, Plan) and plan.objective else 0.95
        return PlanPrediction(
            _quantiles(samples.latency_s), _quantiles(samples.cost_usd), float(np.quantile(samples.latency_s, at)),
            float(np.quantile(samples.cost_usd, at)), samples=samples,
        )  # fmt: skip

    def given(self, features: Mapping[str, float]) -> Self:
        """The model of a run whose input is known: its stages as they are for these features.

        Args:
            features: Values of columns named in ``features``, in their own units. Those that the model hasn't seen
                vary, and those that are not given, change nothing.

        Raises:
            InvalidValue: A feature that isn't a finite number above 0.
        """
        if not isinstance(features, Mapping):
            raise InvalidValue("features", features, "a mapping of columns to their values")
        known = {name: positive(value, f"features.{name}") for name, value in features.items()}
        model = copy(self)
        model._known = {
            stage: {hardware: learned.given(known) for hardware, learned in kinds.items()}
            for stage, kinds in self._known.items()
        }
        return model

    # --- learning -----------------------------------------------------------------------------------------------

    def _table(self, stage_runs: Any) -> StageRuns:
        tie = price_list(self.workflow.stages[0].menu.prices).mb_per_vcpu or _MB_PER_VCPU
        if isinstance(stage_runs, StageRuns):
            stage_runs = {**stage_runs.columns, **stage_runs.extra}
        if not hasattr(stage_runs, "keys"):
            raise InvalidObservation("stage_runs", type(stage_runs).__name__, "a table: a mapping of columns")
        runs = StageRuns.from_table(stage_runs, mb_per_vcpu=tie)
        if not len(runs):
            raise InvalidObservation("stage_runs", 0, "at least one row")
        wall_s = runs["wall_s"]
        refuse("wall_s", (wall_s < _SHORTEST_S) | (wall_s > _LONGEST_S), wall_s, "between 1e-9 and 1e9 seconds")
        return runs

    def _learn(self) -> Self:
        self._known: dict[str, dict[str, Learned]] = {}
        for name, history in self._histories.items():
            kinds, counts = np.unique(history.hardware, return_counts=True)
            self._known[name] = {}
            for kind in kinds[np.argsort(-counts, kind="stable")].tolist():
                rows = history.take(history.hardware == kind)
                self._known[name][kind] = learn(
                    self.workflow[name], rows, kind=self.kind, features=self.features, weights=self._weights(rows)
                )
            offered = {option.size.hardware for option in self.workflow[name].menu.options()}
            if THREAD in offered - set(kinds.tolist()) and (derived := on_threads(history)) is not None:
                weights = self._weights(derived)
                self._known[name][THREAD] = learn(
                    self.workflow[name], derived, kind=self.kind, features=self.features, weights=weights
                )
        return self

    def _weights(self, rows: History) -> Floats:
        if self.half_life_runs is None:
            return np.ones(len(rows))
        age = self._runs - 1 - rows.run
        return np.maximum(0.5 ** (age / self.half_life_runs), _LEAST_WEIGHT)

    def _count_branches(self, fresh: Mapping[str, History]) -> None:
        runs = {name: set(history.run.tolist()) for name, history in fresh.items()}
        every = set().union(*runs.values())
        for stage in self.workflow.stages:
            reached = set().union(*(runs.get(parent, set()) for parent in stage.parents)) if stage.after else every
            ran, of = self._branches[stage.name]
            self._branches[stage.name] = (ran + len(runs.get(stage.name, set()) & reached), of + len(reached))

    @property
    def _limit(self) -> int:
        return max(_LEAST_ROWS, _ROWS // len(self.workflow.stages))

    # --- drawing ------------------------------------------------------------------------------------------------

    def _shared(
        self, n_samples: int, rng: np.random.Generator, cold: bool | float
    ) -> tuple[dict[str, np.random.Generator], Shared]:
        """One stream per stage, and what the stages of a run share."""
        whole(n_samples, "n_samples")
        if not isinstance(cold, (bool, int, float)) or not 0.0 <= cold <= 1.0:
            raise InvalidValue("cold", cold, "true, false, or the share of cold runs in [0, 1]")
        first, *others = rng.spawn(1 + len(self.workflow.order))
        streams = dict(zip(self.workflow.order, others, strict=True))
        ranks, chill = first.random(n_samples), first.random(n_samples)
        uniforms = {name: first.random(n_samples) for name in self.workflow.order}
        ran = stages_run(self.workflow, {name: self._chance(name) for name in streams}, uniforms)
        return streams, Shared(ranks, chill < float(cold), ran)

    def _draw(
        self, name: str, options: Sequence[Option], sums: Sequence[int], shared: Shared, stream: np.random.Generator,
        blocks: int | None, planned: StagePlan | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """Latency and cost, shape ``(len(sums), len(options), n_samples)``; 0 in runs that skip the stage."""
        wall, busy = draw_options(self._known[name], options, sums, shared, stream, blocks=blocks)
        requests = requests_of(self._known[name], self.workflow[name], options, wall, shared, planned)
        cost = cost_of(self.workflow[name].menu, options, wall, busy, requests)
        ran = shared.ran[name]
        return (wall, cost) if ran.all() else (wall * ran, cost * ran)

    def _chance(self, name: str) -> float:
        """Chance of a stage given its parents: as declared, moved by what runs showed (two runs' worth of prior)."""
        declared = self.workflow[name].probability
        ran, of = self._branches[name]
        return declared if declared == 1.0 else (ran + _PRIOR_RUNS * declared) / (of + _PRIOR_RUNS)

    def _options(self, name: str) -> tuple[Option, ...]:
        """Menu options on hardware and with knobs that were measured, and with memory enough for the largest input."""
        learned, menu = self._known.get(name, {}), self.workflow[name].menu
        known = tuple(
            option
            for option in menu.options()
            if option.size.hardware in learned
            and (not menu.knobs or knob_label(option.knobs) in learned[option.size.hardware].knobs)
        )
        if not known:
            self._refuse(name)
        need = self.memory_needed(name)
        safe = tuple(option for option in known if option.memory_mb >= need)
        return safe or tuple(option for option in known if option.memory_mb == max(o.memory_mb for o in known))

    def _learned(self, stage: str, hardware: str | None) -> Learned:
        if stage not in self.workflow:
            raise UnknownStage(stage, tuple(s.name for s in self.workflow.stages))
        learned = self._known.get(stage)
        if not learned or (hardware is not None and hardware not in learned):
            self._refuse(stage)
        assert learned is not None  # _refuse raises
        return learned[hardware] if hardware is not None else next(iter(learned.values()))

    def _refuse(self, stage: str) -> None:
        verdict = self.identified(stage)
        verdict.require()
        raise NotEnoughObservations(
            stage, 0, 1, "Nothing was measured on any hardware or knob of its menu: profile it."
        )

    def _chosen(self, plan: Plan | Mapping[str, Option]) -> dict[str, Option]:
        if isinstance(plan, Plan):
            return {name: plan[name].option for name in self.workflow.order}
        if not isinstance(plan, Mapping):
            raise InvalidPlan("plan", plan, "a plan, or options by stage")
        for name in self.workflow.order:
            if name not in plan:
                raise UnknownStage(name, tuple(plan))
        return {name: plan[name] for name in self.workflow.order}

    def _time(
        self, stage: str, response: Response, workers: int, memory_mb: float | None, vcpus: float | None,
        hardware: str | None, batch: int, items: int | None, upstream: int | None, knobs: Mapping[str, object] | None,
    ) -> StageTime:  # fmt: skip
        learned = self._learned(stage, hardware)
        size = Size(self._vcpus(stage, memory_mb, vcpus), max(round(memory_mb or 1024), 1), hardware=hardware or "cpu")
        named = tuple(sorted((knobs or {}).items()))
        option = Option(whole(workers, "workers"), size, batch=whole(batch, "batch"), knobs=named)
        given_above = self._usual_upstream(stage, workers) if upstream is None else upstream
        above = (whole(given_above, "upstream", least=0),)
        inputs = learned.inputs
        if items is None:
            levels = [points_of(learned, [option], above, level) for level in range(len(inputs))]
            return StageTime.of(learned.model, levels, inputs.weights, response)
        typical = points_of(learned, [option], above, inputs.typical)
        given = replace(typical, items=np.full(1, float(whole(items, "items"))))
        return StageTime.of(learned.model, [given], np.ones(1), response)

    def _vcpus(self, stage: str, memory_mb: float | None, vcpus: float | None) -> float:
        if memory_mb is not None:
            positive(memory_mb, "memory_mb")
        if vcpus is not None:
            return positive(vcpus, "vcpus")
        if memory_mb is None:
            raise InvalidValue("memory_mb", None, "memory_mb or vcpus of a worker")
        menu = self.workflow[stage].menu
        tied = [size.vcpus for size in menu.sizes if size.memory_mb == memory_mb]
        return tied[0] if tied else memory_mb / (price_list(menu.prices).mb_per_vcpu or _MB_PER_VCPU)

    def _usual_upstream(self, stage: str, workers: int) -> int:
        rows = self.history(stage)
        same = rows["workers"] == workers
        return int(np.median(rows["upstream"][same] if same.any() else rows["upstream"]))


def _quantiles(values: Floats) -> Quantiles:
    p50, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99)).tolist()
    return Quantiles(float(values.mean()), p50, p95, p99)
