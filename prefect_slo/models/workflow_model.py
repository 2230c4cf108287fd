"""How long and how dear a run of the whole workflow is, learned from its stage runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import InvalidObservation, InvalidValue, NotEnoughObservations, UnknownStage
from prefect_slo.models.analytic import Analytic
from prefect_slo.models.design import STEPS, Floats, Points, StageData
from prefect_slo.models.driver import Driver
from prefect_slo.models.empirical import Empirical
from prefect_slo.models.history import History, knob_label, read
from prefect_slo.models.identification import Identification, identify
from prefect_slo.models.inputs import Inputs
from prefect_slo.models.makespan import makespan, stages_run
from prefect_slo.models.protocol import StageModel
from prefect_slo.models.startup import Startup
from prefect_slo.models.tables import SampleTables, StageTable, upstream_sums
from prefect_slo.models.whitebox import WhiteBox
from prefect_slo.observation import StageRuns
from prefect_slo.plan import Plan, Prediction, Quantiles
from prefect_slo.pricing import price_list
from prefect_slo.resources import Option, Size
from prefect_slo.units import fraction, whole
from prefect_slo.workflow import Workflow

SCHEMA = 1
KINDS: dict[str, Callable[[], StageModel]] = {"white-box": WhiteBox, "empirical": Empirical, "analytic": Analytic}
"""Stage models by name, as documents store them."""

_ROWS = 1200
_LEAST_ROWS = 48
_LEAST_WEIGHT = 0.01
_MB_PER_VCPU = 1769.0
_FEATURE_SPREAD = 0.02
_PRIOR_RUNS = 2.0


@dataclass(frozen=True)
class StageTime:
    """Distribution of one stage's time at one setting.

    Attributes:
        mean: Expected seconds.
    """

    mean: float
    _sample: Callable[[int, np.random.Generator], Floats] = field(repr=False)

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        """Draws in seconds, shape ``(n,)``."""
        return self._sample(n, rng)

    def quantile(self, q: float) -> float:
        """The ``q``-quantile in seconds, ``q`` in (0, 1)."""
        fraction(q, "q")
        return float(np.quantile(self._sample(20_000, np.random.default_rng(0)), q))


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


@dataclass(frozen=True)
class _Fitted:
    """What is known of one stage on one kind of hardware."""

    model: StageModel
    startup: Startup
    inputs: Inputs
    knobs: frozenset[str]


class WorkflowModel:
    """Joint distribution of latency and cost of a workflow.

    Args:
        workflow: Its graph and menus.
        kind: Stage model: ``white-box`` (default), ``empirical`` or ``analytic``.
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
        if document.get("schema") != SCHEMA:
            raise InvalidValue("model.schema", document.get("schema"), f"{SCHEMA}; fit the model again")
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
        return self._fitted(stage, hardware).model

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
        return self._time(stage, "wall_s", workers, memory_mb, vcpus, hardware, batch, items, upstream, knobs)

    def busy_time(
        self, stage: str, *, workers: int = 1, memory_mb: float | None = None, vcpus: float | None = None,
        hardware: str | None = None, batch: int = 1, items: int | None = None, upstream: int | None = None,
        knobs: Mapping[str, object] | None = None,
    ) -> StageTime:  # fmt: skip
        """Mean busy time of a stage's workers: what a function service bills. Arguments as in ``stage_time``."""
        return self._time(stage, "busy_s", workers, memory_mb, vcpus, hardware, batch, items, upstream, knobs)

    def tables(self, n_samples: int, rng: np.random.Generator, *, cold: bool | float = False) -> SampleTables:
        """Draws of every option that the menus offer and the models know.

        Args:
            n_samples: Draws per option.
            rng: Spawns one independent stream per stage, by position, so that names don't matter.
            cold: Whether workers have to start, or the share of runs in which they do.

        Raises:
            NotEnoughObservations: A stage of which no option can be predicted.
        """
        streams, ranks, ran, is_cold = self._shared(n_samples, rng, cold)
        stages = {}
        for name, stream in streams.items():
            options = self._known_options(name)
            sums = upstream_sums(self.workflow, name) if self._uses_upstream(name) else (0,)
            latency, cost = self._draw(name, options, sums, ranks, ran[name], is_cold, stream)
            waves = self._waves(name, options)
            stages[name] = StageTable(name, options, sums, latency, cost, waves)
        driver = self._driver.sample(n_samples, rng.spawn(1)[0]).astype(np.float32)
        return SampleTables(self.workflow, stages, driver, ran)

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
        streams, ranks, ran, is_cold = self._shared(n_samples, rng, cold)
        latency: dict[str, Floats] = {}
        cost: dict[str, Floats] = {}
        waves: dict[str, float] = {}
        for name, stream in streams.items():
            option = chosen[name]
            upstream = sum(chosen[parent].workers for parent in self.workflow[name].parents)
            drawn = self._draw(name, (option,), (upstream,), ranks, ran[name], is_cold, stream, blocks)
            latency[name], cost[name] = (values[0, 0].astype(float) for values in drawn)
            waves[name] = float(self._waves(name, (option,))[0])
        driver = self._driver.sample(n_samples, rng.spawn(1)[0])
        total = makespan(self.workflow, latency, waves=waves, driver_s=driver)
        return PlanSamples(total, sum(cost.values(), np.zeros(n_samples)), latency, cost, ran)

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
        return runs

    def _learn(self) -> Self:
        self._models: dict[str, dict[str, _Fitted]] = {}
        for name, history in self._histories.items():
            kinds, counts = np.unique(history.hardware, return_counts=True)
            ordered = kinds[np.argsort(-counts, kind="stable")].tolist()
            self._models[name] = {
                kind: self._fit_stage(name, history.take(history.hardware == kind)) for kind in ordered
            }
        return self

    def _fit_stage(self, name: str, rows: History) -> _Fitted:
        cold = rows["cold"] > 0
        data = self._data(name, rows)
        if _settings(data, ~cold) < 0.5 * _settings(data, np.ones(len(rows), dtype=bool)):
            cold = np.zeros(len(rows), dtype=bool)
        model = KINDS[self.kind]().fit(data.take(~cold))
        startup = Startup(np.zeros(0), np.zeros(0))
        if cold.any():
            chilled = data.take(cold)
            warm = (model.mean(chilled.points, response) for response in ("wall", "busy"))
            startup = Startup.of(chilled.wall_s, chilled.busy_s, *warm)
        inputs = Inputs.of(data.points.items, data.points.features, data.weights)
        return _Fitted(model, startup, inputs, frozenset(rows.knobs.tolist()))

    def _data(self, name: str, rows: History) -> StageData:
        steps = np.stack([rows[step] for step in STEPS], axis=1)
        known = bool(np.isfinite(steps).all()) and bool((steps.sum(axis=1) > 0).all())
        points = Points.of(
            rows["workers"], rows["vcpus"], upstream=rows["upstream"], items=self._items(name, rows),
            batch=rows["batch"], features=self._features_of(rows), knobs=rows.knobs,
        )  # fmt: skip
        weights = np.ones(len(rows))
        if self.half_life_runs is not None:
            weights = np.maximum(0.5 ** ((self._runs - 1 - rows.run) / self.half_life_runs), _LEAST_WEIGHT)
        # Steps are means over the workers as busy time is; what they leave out of it belongs to computing.
        if known:
            steps = steps * (rows["busy_s"] / steps.sum(axis=1))[:, None]
        wall = self._own_wall(name, rows, points)
        return StageData(points, wall, rows["busy_s"], steps if known else np.zeros((len(rows), 0)), weights)

    def _own_wall(self, name: str, rows: History, points: Points) -> Floats:
        """Wall time without waiting for a parent that feeds items one by one.

        Such a stage's measured wall lasts as long as its parent's; what it needs by itself is its busy time, stretched
        to the busiest worker's share of the items.
        """
        if all(edge.kind == "all" for edge in self.workflow[name].after):
            return rows["wall_s"]
        own = rows["busy_s"] * np.where(points.items > 0, points.load / np.maximum(points.share, 1e-12), 1.0)
        return np.clip(own, rows["busy_s"], rows["wall_s"])

    def _items(self, name: str, rows: History) -> Floats:
        """Items of each row; 0 where the work is divided over the workers, one shard each."""
        items = rows["items"]
        sharded = bool((items == rows["workers"]).all()) and len(np.unique(items)) > 1
        return np.zeros(len(rows)) if sharded else items

    def _features_of(self, rows: History) -> Floats:
        columns = []
        settings = Points.of(rows["workers"], rows["vcpus"], upstream=rows["upstream"], batch=rows["batch"]).settings
        for name in self.features:
            values = rows.numbers.get(name)
            if values is None or not np.isfinite(values).all() or np.median(values) <= 0:
                continue
            typical = values / np.median(values)
            means = np.bincount(settings, typical) / np.bincount(settings)
            if np.sqrt(np.mean((typical - means[settings]) ** 2)) > _FEATURE_SPREAD:
                columns.append(typical)
        return np.stack(columns, axis=1) if columns else np.ones((len(rows), 0))

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
    ) -> tuple[dict[str, np.random.Generator], Floats, dict[str, NDArray[np.bool_]], NDArray[np.bool_]]:
        """One stream per stage, and what the stages of a run share: rank of its input, branches, cold or warm."""
        first, *others = rng.spawn(1 + len(self.workflow.order))
        streams = dict(zip(self.workflow.order, others, strict=True))
        ranks, chill = first.random(n_samples), first.random(n_samples)
        uniforms = {name: first.random(n_samples) for name in self.workflow.order}
        ran = stages_run(self.workflow, {name: self._chance(name) for name in streams}, uniforms)
        return streams, ranks, ran, chill < float(cold)

    def _chance(self, name: str) -> float:
        """Chance of a stage given its parents: as declared, moved by what runs showed (two runs' worth of prior)."""
        declared = self.workflow[name].probability
        ran, of = self._branches[name]
        return declared if declared == 1.0 else (ran + _PRIOR_RUNS * declared) / (of + _PRIOR_RUNS)

    def _known_options(self, name: str) -> tuple[Option, ...]:
        models = self._models.get(name, {})
        menu = self.workflow[name].menu
        known = tuple(
            option
            for option in menu.options()
            if option.size.hardware in models
            and (not menu.knobs or knob_label(option.knobs) in models[option.size.hardware].knobs)
        )
        if not known:
            self._refuse(name)
        return known

    def _draw(
        self, name: str, options: Sequence[Option], sums: Sequence[int], ranks: Floats, ran: NDArray[np.bool_],
        cold: NDArray[np.bool_], stream: np.random.Generator, blocks: int | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """Latency and cost, shape ``(len(sums), len(options), n_samples)``."""
        kinds = list(dict.fromkeys(option.size.hardware for option in options))
        parts = []
        for kind in kinds:
            mine = [option for option in options if option.size.hardware == kind]
            parts.append(self._draw_kind(self._fitted(name, kind), mine, sums, ranks, cold, stream, blocks))
        wall, busy = parts[0]
        if len(kinds) > 1:
            shape = (len(sums), len(options), len(ranks))
            wall, busy = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
            for kind, (own_wall, own_busy) in zip(kinds, parts, strict=True):
                at = [k for k, option in enumerate(options) if option.size.hardware == kind]
                wall[:, at], busy[:, at] = own_wall, own_busy
        cost = self._cost(name, options, wall, busy)
        if not ran.all():
            wall, cost = wall * ran, cost * ran
        return wall, cost

    def _draw_kind(
        self, fitted: _Fitted, options: Sequence[Option], sums: Sequence[int], ranks: Floats, cold: NDArray[np.bool_],
        stream: np.random.Generator, blocks: int | None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """Wall and busy time of options on one kind of hardware, shape ``(len(sums), len(options), n_samples)``."""
        shape = (len(sums), len(options), len(ranks))
        levels = fitted.inputs.levels(ranks)
        used = np.unique(levels)
        per_level = [self._points(fitted, options, sums, int(level)) for level in used]
        if len(used) == 1 or blocks is not None:
            # Blocks keep their parameters over levels of input: every level is drawn from the same stream.
            state = stream.bit_generator.state
            wall, busy = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
            for level, points in zip(used, per_level, strict=True):
                stream.bit_generator.state = state
                draws = fitted.model.sample(points, len(ranks), stream, blocks=blocks)
                if len(used) == 1:
                    wall = np.asarray(draws.wall_s, dtype=np.float32).reshape(shape)
                    busy = np.asarray(draws.busy_s, dtype=np.float32).reshape(shape)
                else:
                    at = levels == level
                    wall[:, :, at] = draws.wall_s.reshape(shape)[:, :, at]
                    busy[:, :, at] = draws.busy_s.reshape(shape)[:, :, at]
        else:
            wall, busy = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
            for level, points in zip(used, per_level, strict=True):
                at = np.flatnonzero(levels == level)
                draws = fitted.model.sample(points, len(at), stream)
                wall[:, :, at] = draws.wall_s.reshape(len(sums), len(options), len(at))
                busy[:, :, at] = draws.busy_s.reshape(len(sums), len(options), len(at))
        if cold.any():
            extra_wall, extra_busy = fitted.startup.sample(len(ranks), stream)
            wall += (extra_wall * cold).astype(np.float32)
            busy += (extra_busy * cold).astype(np.float32)
        return wall, busy

    def _cost(
        self, name: str, options: Sequence[Option], wall: NDArray[np.float32], busy: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """US dollars of all workers.

        A price list with a price per request is a function service and bills busy time; one without bills workers for
        as long as they are held.
        """
        menu = self.workflow[name].menu
        prices = {pool: menu.prices_of(pool) for pool in {option.pool for option in options}}
        cost = np.empty_like(wall)
        for k, option in enumerate(options):
            price = prices[option.pool]
            billed = busy[:, k] if price.request > 0 else wall[:, k]
            if price.granularity_s > 0:
                billed = np.ceil(billed / np.float32(price.granularity_s)) * np.float32(price.granularity_s)
            rate = price.rate(option.size.vcpus, option.size.memory_mb, option.size.gpu, option.size.hardware)
            cost[:, k] = billed * np.float32(option.workers * rate) + np.float32(option.workers * price.request)
        return cost

    def _points(self, fitted: _Fitted, options: Sequence[Option], sums: Sequence[int], level: int) -> Points:
        n = len(options)
        features = np.broadcast_to(fitted.inputs.features[level], (n * len(sums), fitted.inputs.features.shape[1]))
        return Points.of(
            np.tile([float(o.workers) for o in options], len(sums)),
            np.tile([o.size.vcpus for o in options], len(sums)),
            upstream=np.repeat(np.asarray(sums, dtype=float), n),
            items=fitted.inputs.items[level],
            batch=np.tile([float(o.batch) for o in options], len(sums)),
            features=features,
            knobs=np.tile([knob_label(o.knobs) for o in options], len(sums)),
        )

    def _waves(self, name: str, options: Sequence[Option]) -> NDArray[np.float32]:
        waves = np.ones(len(options), dtype=np.float32)
        for k, option in enumerate(options):
            inputs = self._fitted(name, option.size.hardware).inputs
            items = inputs.items[inputs.typical]
            if items > 0:
                waves[k] = np.ceil(np.ceil(items / option.batch) / option.workers)
        return waves

    def _uses_upstream(self, name: str) -> bool:
        return any(
            getattr(fitted.model, "depends_on_upstream", False) for fitted in self._models.get(name, {}).values()
        )

    def _fitted(self, stage: str, hardware: str | None) -> _Fitted:
        if stage not in self.workflow:
            raise UnknownStage(stage, tuple(s.name for s in self.workflow.stages))
        models = self._models.get(stage)
        if not models or (hardware is not None and hardware not in models):
            self._refuse(stage)
        assert models is not None
        return models[hardware] if hardware is not None else next(iter(models.values()))

    def _refuse(self, stage: str) -> None:
        verdict = self.identified(stage)
        verdict.require()
        raise NotEnoughObservations(
            stage, 0, 1, "Nothing was measured on any hardware or knob of its menu: profile it."
        )

    def _chosen(self, plan: Plan | Mapping[str, Option]) -> dict[str, Option]:
        if isinstance(plan, Plan):
            return {name: plan[name].option for name in self.workflow.order}
        for name in self.workflow.order:
            if name not in plan:
                raise UnknownStage(name, tuple(plan))
        return {name: plan[name] for name in self.workflow.order}

    def _time(
        self, stage: str, response: str, workers: int, memory_mb: float | None, vcpus: float | None,
        hardware: str | None, batch: int, items: int | None, upstream: int | None, knobs: Mapping[str, object] | None,
    ) -> StageTime:  # fmt: skip
        fitted = self._fitted(stage, hardware)
        size = Size(self._vcpus(stage, memory_mb, vcpus), round(memory_mb or 1024), hardware=hardware or "cpu")
        label = tuple(sorted((knobs or {}).items()))
        option = Option(whole(workers, "workers"), size, batch=whole(batch, "batch"), knobs=label)
        inputs = fitted.inputs
        above = upstream if upstream is not None else self._usual_upstream(stage, workers)
        levels = [self._points(fitted, [option], (above,), level) for level in range(len(inputs))]
        if items is not None:
            features = levels[inputs.typical].features
            given = float(whole(items, "items"))
            levels = [Points.of([workers], [size.vcpus], upstream=above, items=given, batch=batch, features=features)]
        shares = inputs.weights if len(levels) > 1 else np.ones(1)

        def sample(n: int, rng: np.random.Generator) -> Floats:
            which = rng.choice(len(levels), n, p=shares) if len(levels) > 1 else np.zeros(n, dtype=int)
            seconds = np.empty(n)
            for level, points in enumerate(levels):
                at = which == level
                draws = fitted.model.sample(points, int(at.sum()), rng)
                seconds[at] = getattr(draws, response)[0]
            return seconds

        means = [fitted.model.mean(points, "wall" if response == "wall_s" else "busy")[0] for points in levels]
        return StageTime(float(np.dot(shares, means)), sample)

    def _vcpus(self, stage: str, memory_mb: float | None, vcpus: float | None) -> float:
        if vcpus is not None:
            return vcpus
        if memory_mb is None:
            raise InvalidValue("memory_mb", None, "memory_mb or vcpus of a worker")
        menu = self.workflow[stage].menu
        tied = [size.vcpus for size in menu.sizes if size.memory_mb == memory_mb]
        return tied[0] if tied else memory_mb / (price_list(menu.prices).mb_per_vcpu or _MB_PER_VCPU)

    def _usual_upstream(self, stage: str, workers: int) -> int:
        rows = self.history(stage)
        same = rows["workers"] == workers
        return int(np.median(rows["upstream"][same] if same.any() else rows["upstream"]))


def _settings(data: StageData, mask: NDArray[np.bool_]) -> int:
    return len(np.unique(data.points.settings[mask]))


def _quantiles(values: Floats) -> Quantiles:
    p50, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99)).tolist()
    return Quantiles(float(values.mean()), p50, p95, p99)
