"""How well models predict what they were not fitted to: combinations of settings left out in turn.

What is left out is a *combination of settings* (workers, size and batch of every stage), never a single run: a twin of
the run with the same settings would give the answer away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from prefect_slo.errors import NotEnoughObservations
from prefect_slo.models import WorkflowModel, makespan
from prefect_slo.models.design import Floats
from prefect_slo.models.history import knob_label
from prefect_slo.models.learning import own_wall
from prefect_slo.observation import StageRuns
from prefect_slo.resources import Option, Size
from prefect_slo.units import whole
from prefect_slo.workflow import Workflow

Progress = Callable[[int, int], None]

_SAMPLES = 4000


@dataclass(frozen=True)
class Score:
    """Predictions against what was measured.

    Attributes:
        rows: Predictions made; a row counts once a repeat.
        latency_error: Mean absolute relative error of predicted mean wall time (of a stage, without waiting for a
            parent that feeds items one by one) or latency (of a run).
        work_error: The same of mean busy time (of a stage) or cost (of a run); ``nan`` where the table lacks it.
        coverage: Share of rows at or below their predicted 95th percentile.
    """

    rows: int
    latency_error: float
    work_error: float
    coverage: float


@dataclass(frozen=True)
class Evaluation:
    """Scores on settings that the models had not seen.

    Attributes:
        stages: By stage.
        run: Of runs in which every stage ran; ``None`` without any, or where items are handed on one by one: a stage's
            wall time then overlaps its parent's, and the table doesn't tell the latency of the run.
    """

    stages: Mapping[str, Score]
    run: Score | None


def evaluate(
    workflow: Workflow,
    stage_runs: StageRuns,
    *,
    kind: str = "white-box",
    folds: int = 6,
    repeats: int = 1,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Fit with one ``folds``-th of the settings left out, in turn, and predict these. Cold runs are left aside.

    Args:
        workflow: Its graph.
        stage_runs: The table.
        kind: Stage model, as in ``WorkflowModel``.
        folds: Parts that the settings are divided into.
        repeats: Divisions, each at random.
        seed: Of the divisions.
        progress: Called with fits done and fits in all.

    Raises:
        NotEnoughObservations: All runs share one setting.
        UnknownStage: A row of a stage that the workflow doesn't have.
    """
    whole(folds, "folds", least=2)
    whole(repeats, "repeats")
    rows = stage_runs if stage_runs["cold"].all() else stage_runs.select(~stage_runs["cold"])
    runs = _runs(workflow, rows)
    own = _own_walls(workflow, rows)
    of_stages: dict[str, list[_Pair]] = {}
    of_runs: list[_Pair] = []
    step_by_step = all(edge.kind == "all" for stage in workflow.stages for edge in stage.after)
    told = count(1)
    for repeat in range(repeats):
        parts = _parts(workflow, runs, folds, np.random.default_rng([seed, repeat]))
        for fold in range(folds):
            held = [run for run, part in zip(runs, parts, strict=True) if part == fold]
            if held:
                left = np.ones(len(rows), dtype=bool)
                left[[i for run in held for i in run.rows.values()]] = False
                model = WorkflowModel(workflow, kind=kind).fit(rows.select(left))
                for name in workflow.order:
                    of_stages.setdefault(name, []).extend(_stage_pairs(model, name, rows, own, held))
                if step_by_step:
                    of_runs += _run_pairs(model, rows, [run for run in held if len(run.rows) == len(workflow.stages)])
            progress(next(told), repeats * folds)
    scores = {name: _score(pairs) for name, pairs in of_stages.items() if pairs}
    return Evaluation(scores, _score(of_runs) if of_runs else None)


def fitted_error(model: WorkflowModel, stage: str) -> float:
    """Mean absolute relative error of wall time on the warm rows that a stage was fitted to; ``nan`` without rows.

    Wall time is the stage's own, without waiting for a parent that feeds items one by one.
    """
    history, declared = model.history(stage), model.workflow[stage]
    names = ("workers", "memory_mb", "vcpus", "batch", "upstream")
    settings = zip(*(history[name].tolist() for name in names), history.hardware.tolist(), history.knobs.tolist(),
                   strict=True)  # fmt: skip
    warm = not history["cold"].all()
    walls: dict[tuple[Any, ...], list[float]] = {}
    for setting, wall_s, cold in zip(settings, own_wall(declared, history).tolist(), history["cold"], strict=True):
        if not (cold and warm):
            walls.setdefault(setting, []).append(wall_s)
    knobs_of = {knob_label(option.knobs): dict(option.knobs) for option in declared.menu.options()}
    errors = []
    for (workers, memory_mb, vcpus, batch, upstream, hardware, knobs), measured in walls.items():
        time = model.stage_time(
            stage, workers=int(workers), memory_mb=memory_mb, vcpus=vcpus, hardware=hardware, batch=int(batch),
            upstream=int(upstream), knobs=knobs_of.get(knobs),
        )  # fmt: skip
        errors += [abs(time.mean / wall_s - 1) for wall_s in measured]
    return float(np.mean(errors)) if errors else math.nan


@dataclass(frozen=True)
class _Run:
    """One run: position of each stage's row, and the option that it ran with."""

    rows: Mapping[str, int]
    options: Mapping[str, Option]

    @property
    def setting(self) -> tuple[tuple[str, Option], ...]:
        return tuple(sorted(self.options.items()))


@dataclass(frozen=True)
class _Pair:
    """One prediction and what was measured; ``work`` is busy time of a stage, cost of a run."""

    predicted: float
    actual: float
    predicted_work: float
    actual_work: float
    p95: float


def _runs(workflow: Workflow, rows: StageRuns) -> list[_Run]:
    positions: dict[str, dict[str, int]] = {}
    for i, (run, stage) in enumerate(zip(rows["run_id"], rows["stage"], strict=True)):
        positions.setdefault(run, {})[workflow[stage].name] = i
    return [
        _Run(stages, {name: _option(workflow, rows, i) for name, i in stages.items()}) for stages in positions.values()
    ]


def _option(workflow: Workflow, rows: StageRuns, i: int) -> Option:
    """The menu option that a row was measured at; it may lie off the menu."""
    size = Size(float(rows["vcpus"][i]), round(float(rows["memory_mb"][i])), hardware=str(rows["hardware"][i]))
    declared = workflow[rows["stage"][i]].menu.knobs
    knobs = tuple((name, _plain(rows.extra[name][i])) for name in sorted(declared) if name in rows.extra)
    return Option(int(rows["workers"][i]), size, batch=int(rows["batch"][i]), knobs=knobs)


def _parts(workflow: Workflow, runs: Sequence[_Run], folds: int, rng: np.random.Generator) -> list[int]:
    """Part of each run; runs with the same settings share one."""
    distinct = list(dict.fromkeys(run.setting for run in runs))
    if len(distinct) < 2:
        name = workflow.order[0]
        raise NotEnoughObservations(name, len(distinct), 2, "Measure the workflow at another setting.")
    order = rng.permutation(len(distinct)).tolist()
    part = {setting: place % folds for setting, place in zip(distinct, order, strict=True)}
    return [part[run.setting] for run in runs]


_OWN = ("workers", "vcpus", "items", "batch", "wall_s", "start_s")


def _own_walls(workflow: Workflow, rows: StageRuns) -> Floats:
    """Wall time of each row as its stage's model learns it, without waiting for a parent that feeds items singly."""
    own = rows["wall_s"].astype(float)
    for stage in workflow.stages:
        mine = np.flatnonzero(rows["stage"].astype(str) == stage.name)
        columns = {name: rows[name][mine].astype(float) for name in _OWN}
        idle = np.nan_to_num(rows["overhead_s"][mine], nan=0.0)
        columns["busy_s"] = np.clip(columns["wall_s"] - idle, 1e-3 * columns["wall_s"], None)
        own[mine] = own_wall(stage, columns)
    return own


def _stage_pairs(model: WorkflowModel, name: str, rows: StageRuns, own: Floats, held: Sequence[_Run]) -> list[_Pair]:
    """Predictions of a stage in the held-out runs; none where the model has never seen it on that hardware."""
    predicted: dict[tuple[Option, int], tuple[float, float, float] | None] = {}
    pairs = []
    for run in (run for run in held if name in run.rows):
        upstream = sum(run.options[parent].workers for parent in model.workflow[name].parents if parent in run.options)
        at = (run.options[name], upstream)
        if at not in predicted:
            predicted[at] = _predicted(model, name, *at)
        forecast, i = predicted[at], run.rows[name]
        if forecast is not None:
            wall, busy, p95 = forecast
            pairs.append(_Pair(wall, float(own[i]), busy, _busy(rows, i), p95))
    return pairs


def _run_pairs(model: WorkflowModel, rows: StageRuns, held: Sequence[_Run]) -> list[_Pair]:
    """Predictions of whole runs."""
    predicted: dict[tuple[tuple[str, Option], ...], tuple[float, float, float] | None] = {}
    pairs = []
    for run in held:
        if run.setting not in predicted:
            try:
                drawn = model.sample_plan(run.options, _SAMPLES, np.random.default_rng(0))
            except NotEnoughObservations:
                predicted[run.setting] = None
                continue
            p95 = float(np.quantile(drawn.latency_s, 0.95))
            predicted[run.setting] = (float(drawn.latency_s.mean()), float(drawn.cost_usd.mean()), p95)
        forecast = predicted[run.setting]
        if forecast is not None:
            latency, cost, p95 = forecast
            walls = {name: np.array([rows["wall_s"][i]]) for name, i in run.rows.items()}
            spent = sum(float(rows["cost_usd"][i]) for i in run.rows.values())
            pairs.append(_Pair(latency, float(makespan(model.workflow, walls)[0]), cost, spent, p95))
    return pairs


def _predicted(model: WorkflowModel, name: str, option: Option, upstream: int) -> tuple[float, float, float] | None:
    """Mean wall time, mean busy time and 95th percentile of wall time."""
    try:
        wall, busy = (
            time(
                name, workers=option.workers, memory_mb=option.memory_mb, vcpus=option.vcpus,
                hardware=option.size.kind, batch=option.batch, upstream=upstream, knobs=dict(option.knobs),
            )
            for time in (model.stage_time, model.busy_time)
        )  # fmt: skip
    except NotEnoughObservations:
        return None
    return wall.mean, busy.mean, wall.quantile(0.95)


def _busy(rows: StageRuns, i: int) -> float:
    """Measured mean busy time of a row: its wall time less its overhead, or the sum of its steps; else ``nan``."""
    if math.isfinite(rows["overhead_s"][i]):
        return float(rows["wall_s"][i] - rows["overhead_s"][i])
    return float(rows["read_s"][i] + rows["compute_s"][i] + rows["write_s"][i])


def _score(pairs: Sequence[_Pair]) -> Score:
    def error(predicted: list[float], actual: list[float]) -> float:
        known = [(p, a) for p, a in zip(predicted, actual, strict=True) if math.isfinite(a) and a > 0]
        return float(np.mean([abs(p / a - 1) for p, a in known])) if known else math.nan

    return Score(
        rows=len(pairs),
        latency_error=error([p.predicted for p in pairs], [p.actual for p in pairs]),
        work_error=error([p.predicted_work for p in pairs], [p.actual_work for p in pairs]),
        coverage=float(np.mean([p.actual <= p.p95 for p in pairs])),
    )


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value
