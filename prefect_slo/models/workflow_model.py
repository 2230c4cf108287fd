"""How long and how dear a run of the whole workflow is, learned from its stage runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Self

import numpy as np

from prefect_slo.errors import InvalidPlan, InvalidValue, NotEnoughObservations, UnknownStage
from prefect_slo.models.design import Floats
from prefect_slo.models.history import History, knob_label
from prefect_slo.models.identification import Identification, identify
from prefect_slo.models.learning import KINDS, Learned, by_hardware
from prefect_slo.models.protocol import Response, StageModel
from prefect_slo.models.record import MB_PER_VCPU, Record, checked
from prefect_slo.models.runs import Luck, PlanPrediction, PlanSamples, RunSampler
from prefect_slo.models.stage_time import StageTime, time_of
from prefect_slo.models.tables import SampleTables
from prefect_slo.plan import Plan
from prefect_slo.pricing import price_list
from prefect_slo.resources import Option, Size
from prefect_slo.units import positive, whole
from prefect_slo.workflow import Workflow

SCHEMA = 1

_PREDICTED = (8, 1)
"""Tag of a prediction's draws after the seed; a stream that no search has seen (see ``simulate.SIMULATED``)."""


class WorkflowModel:
    """Joint distribution of latency and cost of a workflow.

    Args:
        workflow: Its graph and menus.
        kind: Stage model: ``white-box`` (default), or for comparison ``empirical``, ``analytic`` or ``regression``.
        features: Columns that hold the size of a run's input. They are used where they vary between runs of one
            setting; ``bytes_in`` is one of them by default.
        half_life_runs: A run weighs half as much as one that many runs later; ``None`` weighs all alike.
        measured_items: Whether runs have as many items as those that were measured, be the workflow's own ``items``
            those or not; by default a typical run has as many as the workflow says, where it does.

    Example:
        ``WorkflowModel(workflow).fit(table).predict(plan).latency_s.p95``
    """

    def __init__(
        self, workflow: Workflow, *, kind: str = "white-box", features: Sequence[str] = ("bytes_in",),
        half_life_runs: float | None = 500.0, measured_items: bool = False,
    ) -> None:  # fmt: skip
        self.workflow = workflow
        self.measured_items = measured_items
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
        self._record = Record()
        return self.update(stage_runs, run_latency_s)

    def update(self, stage_runs: Any, run_latency_s: Mapping[str, float] | None = None) -> Self:
        """Learn from more runs. Equals, to the last bit, a fit on the old rows followed by the new ones.

        Args:
            stage_runs: Rows of whole runs that came after those learned so far.
            run_latency_s: As in ``fit``.
        """
        table = checked(self.workflow, stage_runs)
        self._record = self._record.followed_by(self.workflow, table, run_latency_s or {}, self.features)
        return self._learn()

    def to_document(self) -> dict[str, Any]:
        """Everything that predictions depend on, JSON-able: the rows kept, and the settings."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "features": list(self.features),
            "half_life_runs": self.half_life_runs,
            **self._record.to_document(),
        }

    @classmethod
    def from_document(cls, workflow: Workflow, document: Mapping[str, Any], *, measured_items: bool = False) -> Self:
        """The model that wrote the document; stages that the workflow no longer has are left out.

        Raises:
            InvalidValue: A document of another schema.
        """
        if not isinstance(document, Mapping):
            raise InvalidValue("model", document, "what to_document() returns")
        if document.get("schema") != SCHEMA:
            raise InvalidValue("model.schema", document.get("schema"), f"{SCHEMA}; fit the model again")
        for name in ("kind", "features", "half_life_runs"):
            if name not in document:
                raise InvalidValue(f"model.{name}", None, "what to_document() wrote there; fit the model again")
        model = cls(
            workflow, kind=document["kind"], features=document["features"], half_life_runs=document["half_life_runs"],
            measured_items=measured_items,
        )  # fmt: skip
        model._record = Record.from_document(workflow, document)
        return model._learn()

    def identified(self, stage: str) -> Identification:
        """Whether a stage was measured at enough settings to plan it: true or false, with the reason."""
        return identify(stage, self.workflow[stage].menu, self._record.histories.get(stage))

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
        if stage not in self._record.histories:
            self._refuse(stage)
        return self._record.histories[stage]

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

    def tables(
        self, n_samples: int, rng: np.random.Generator, *, cold: bool | float = False,
        only: Mapping[str, Collection[Option]] | None = None,
    ) -> SampleTables:  # fmt: skip
        """Draws of every option that the menus offer and the models know.

        Args:
            n_samples: Draws per option.
            rng: Spawns one independent stream per stage, by position, so that names don't matter.
            cold: Whether workers have to start, or the share of runs in which they do.
            only: By stage, the options to draw; all by default.

        Raises:
            NotEnoughObservations: A stage of which no option can be predicted.
        """
        options = {name: self._options(name) for name in self.workflow.order}
        if only is not None:
            options = {name: tuple(o for o in known if o in only.get(name, known)) for name, known in options.items()}
        return self._sampler.tables(options, n_samples, rng, cold)

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
        for name, option in chosen.items():
            self._learned(name, option.size.kind)
        planned = plan.stages if isinstance(plan, Plan) else {}
        return self._sampler.plan(chosen, n_samples, rng, cold, blocks, planned)

    def sample_truths(
        self, plan: Plan | Mapping[str, Option], truths: int, runs: int, rng: np.random.Generator, *,
        cold: bool | float = False,
    ) -> PlanSamples:  # fmt: skip
        """Draws of ``runs`` runs under each of ``truths`` draws of the parameters, one truth after the other.

        What a promise with a confidence is tested on: it must hold under that share of the truths.
        """
        return self.sample_plan(plan, truths * runs, rng, cold=cold, blocks=truths)

    def truths(self, truths: int, runs: int, rng: np.random.Generator, *, cold: bool | float = False) -> Luck:
        """The same for any number of plans: all are run under the same truths and with the same luck.

        Example:
            ``model.truths(256, 400, rng).of({"load": option})``
        """
        return Luck(self._sampler, truths * runs, rng, cold, truths)

    def predict(
        self, plan: Plan | Mapping[str, Option], *, n_samples: int = 20_000, seed: int = 0, cold: bool | float = False
    ) -> PlanPrediction:
        """Latency and cost of runs of a plan, under the model; see ``sample_plan``."""
        rng = np.random.default_rng(np.random.SeedSequence([seed, *_PREDICTED]))
        samples = self.sample_plan(plan, whole(n_samples, "n_samples"), rng, cold=cold)
        at = plan.objective.percentile if isinstance(plan, Plan) and plan.objective else 0.95
        return PlanPrediction.of(samples, at)

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

    def _learn(self) -> Self:
        def weigh(rows: History) -> Floats:
            return self._record.weights(rows, self.half_life_runs)

        self._known = {
            name: by_hardware(
                replace(self.workflow[name], items=None) if self.measured_items else self.workflow[name],
                history,
                kind=self.kind,
                features=self.features,
                weigh=weigh,
                capacity=self.workflow.capacity,
            )
            for name, history in self._record.histories.items()
        }
        return self

    # --- drawing ------------------------------------------------------------------------------------------------

    @property
    def _sampler(self) -> RunSampler:
        chances = {stage.name: self._record.chance(stage) for stage in self.workflow.stages}
        return RunSampler(self.workflow, self._known, chances, self._record.driver)

    def _options(self, name: str) -> tuple[Option, ...]:
        """Menu options on hardware and with knobs that were measured, and with memory enough for the largest input."""
        learned, menu = self._known.get(name, {}), self.workflow[name].menu
        known = tuple(
            option
            for option in menu.options()
            if option.size.kind in learned
            and (not menu.knobs or knob_label(option.knobs) in learned[option.size.kind].knobs)
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
        above = self._usual_upstream(stage, workers) if upstream is None else whole(upstream, "upstream", least=0)
        count = None if items is None else whole(items, "items")
        return time_of(learned, option, above, response, items=count)

    def _vcpus(self, stage: str, memory_mb: float | None, vcpus: float | None) -> float:
        if memory_mb is not None:
            positive(memory_mb, "memory_mb")
        if vcpus is not None:
            return positive(vcpus, "vcpus")
        if memory_mb is None:
            raise InvalidValue("memory_mb", None, "memory_mb or vcpus of a worker")
        menu = self.workflow[stage].menu
        tied = [size.vcpus for size in menu.sizes if size.memory_mb == memory_mb]
        return tied[0] if tied else memory_mb / (price_list(menu.prices).mb_per_vcpu or MB_PER_VCPU)

    def _usual_upstream(self, stage: str, workers: int) -> int:
        rows = self.history(stage)
        same = rows["workers"] == workers
        return int(np.median(rows["upstream"][same] if same.any() else rows["upstream"]))
