"""From the rows kept of a stage to everything known about it on one kind of hardware."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from prefect_slo.models.analytic import Analytic
from prefect_slo.models.design import STEPS, Bools, Floats, Points, StageData
from prefect_slo.models.empirical import Empirical
from prefect_slo.models.history import History
from prefect_slo.models.inputs import Inputs
from prefect_slo.models.memory import MemoryNeed
from prefect_slo.models.noise import enough_repeats
from prefect_slo.models.protocol import Response, StageModel
from prefect_slo.models.regression import Regression
from prefect_slo.models.startup import Startup, mean_beyond, seen_by_setting
from prefect_slo.models.transfer import THREAD, nearest_share, on_share, on_threads
from prefect_slo.models.whitebox import WhiteBox
from prefect_slo.resources import Capacity
from prefect_slo.workflow import Stage

KINDS: dict[str, Callable[[], StageModel]] = {
    "white-box": WhiteBox, "empirical": Empirical, "analytic": Analytic, "regression": Regression,
}  # fmt: skip
"""Stage models by name, as documents store them."""

_FEATURE_SPREAD = 0.02
"""Least relative variation within settings that makes a column a feature of the input."""

_WARM_SHARE = 0.5
"""Share of the settings that must have warm rows for cold rows to be left out of the fit."""

_REACH = 2.0
"""Robust standard deviations from the expected warm time that a cold row, less its start, may lie off."""


@dataclass(frozen=True)
class Billing:
    """What a service has billed a stage for beside time, where its rows say so.

    Attributes:
        per_call: Invocations, jobs or bundles for each call, retries included; ``nan`` where calls have travelled
            together, so that they are counted as the planner bundles calls.
        storage_usd: US dollars of reading and writing objects, for each invocation.
    """

    per_call: float
    storage_usd: float

    @classmethod
    def of(cls, rows: History) -> Billing | None:
        """From rows; ``None`` unless all of them were billed by the invocation."""
        requests = rows["requests"]
        if not len(rows) or not (np.isfinite(rows["billed_s"]).all() and (requests > 0).all()):
            return None
        calls = np.where(rows["items"] > 0, np.ceil(rows["items"] / rows["batch"]), rows["workers"])
        together = bool((requests < calls).any())
        storage = np.nan_to_num(rows["storage_usd"], nan=0.0)
        return cls(
            float("nan") if together else float((requests / calls).mean()), float(storage.sum() / requests.sum())
        )


@dataclass(frozen=True)
class Learned:
    """What is known of one stage on one kind of hardware.

    Attributes:
        model: Wall and busy time of warm runs.
        startup: What a cold start adds.
        inputs: How many items and how much input it meets.
        knobs: Knob settings that were measured, as labels.
        memory: Peak memory of a worker; ``None`` where it was never measured.
        scales: Median of each feature of the input that the model knows.
        billing: What is billed beside time; ``None`` where leases are paid for, or the rows don't say.
    """

    model: StageModel
    startup: Startup
    inputs: Inputs
    knobs: frozenset[str]
    memory: MemoryNeed | None
    scales: Mapping[str, float] = field(default_factory=dict)
    billing: Billing | None = None

    def given(self, features: Mapping[str, float]) -> Learned:
        """The same for a run whose input is known; features that are not named stay at their typical value."""
        if not self.scales.keys() & features.keys():
            return self
        row = self.inputs.features[self.inputs.typical].copy()
        for k, (name, scale) in enumerate(self.scales.items()):
            row[k] = features.get(name, row[k] * scale) / scale
        return replace(self, inputs=self.inputs.known(row))


_UNLIMITED = Capacity()


def by_hardware(
    stage: Stage,
    rows: History,
    *,
    kind: str,
    features: Sequence[str],
    weigh: Callable[[History], Floats],
    capacity: Capacity = _UNLIMITED,
) -> dict[str, Learned]:
    """What is known of a stage on every kind of hardware that it ran on, the one measured most first.

    Threads on its menu are known, too, where rows of processes tell how the stage would do on them; and shares of a
    GPU, where another share was measured.

    Args:
        stage: The stage.
        rows: All its rows.
        kind: Name of the stage model.
        features: Columns that may hold the size of the input.
        weigh: Weights of rows.
        capacity: Of the workflow; says how sharers of a GPU slow each other down.
    """
    kinds, counts = np.unique(rows.hardware, return_counts=True)
    by_kind = {name: rows.take(rows.hardware == name) for name in kinds[np.argsort(-counts, kind="stable")].tolist()}
    measured = tuple(by_kind)
    for other in stage.menu.options():
        name = other.size.kind
        if name not in by_kind and 0 < other.size.gpu < 1 and (base := nearest_share(name, measured)) is not None:
            by_kind[name] = on_share(by_kind[base], name, capacity.of(other.pool).gpu_slowdown)
    offered = {option.size.kind for option in stage.menu.options()}
    if THREAD in offered - by_kind.keys() and (derived := on_threads(rows)) is not None:
        by_kind[THREAD] = derived
    return {
        name: learn(stage, mine, kind=kind, features=features, weights=weigh(mine)) for name, mine in by_kind.items()
    }


def learn(stage: Stage, rows: History, *, kind: str, features: Sequence[str], weights: Floats) -> Learned:
    """Fit a stage model to warm rows, and the rest to all.

    Args:
        stage: The stage, for the kinds of its edges, and for the items of a typical run where it says how many.
        rows: Its rows on one kind of hardware.
        kind: Name of the stage model.
        features: Columns that may hold the size of the input.
        weights: Weight of each row.
    """
    data = stage_data(stage, rows, features=features, weights=weights)
    cold = rows["cold"] > 0
    if _n_settings(data, ~cold) < _WARM_SHARE * _n_settings(data, np.ones(len(rows), dtype=bool)):
        cold = np.zeros(len(rows), dtype=bool)
    warm = data.take(~cold)
    model = KINDS[kind]().fit(warm)
    startup = Startup()
    if cold.any():
        chilled = data.take(cold)
        responses: tuple[Response, ...] = ("wall", "busy")
        expected = [model.quantile(chilled.points, 0.5, response) for response in responses]
        startup = Startup.of(chilled.wall_s, chilled.busy_s, *expected)
        if not enough_repeats(warm.points.settings):
            model = KINDS[kind]().fit(warm.followed_by(_warmed(chilled, *expected)))
    startup = replace(startup, **_elsewhere(rows, data.wall_s, cold))
    sizes = data.points.features[:, 0] if data.points.features.shape[1] else None
    return Learned(
        model, startup, Inputs.of(data.points.items, data.points.features, data.weights).about(stage.items),
        frozenset(rows.knobs.tolist()), MemoryNeed.fit(rows["peak_memory_mb"], sizes), feature_scales(rows, features),
        Billing.of(rows),
    )  # fmt: skip


def _elsewhere(rows: History, wall_s: Floats, cold: Bools) -> dict[str, Any]:
    """How often ordinary runs start cold where workers start elsewhere, and what leases cost there beyond wall time."""
    billed = np.isfinite(rows["billed_s"])
    if not billed.any():
        return {}
    leased = billed & ~np.isfinite(rows["requests"])
    held_s = mean_beyond((rows["billed_s"] / rows["workers"])[leased], wall_s[leased], cold[leased])
    seen = seen_by_setting(rows["workers"], rows["vcpus"], cold) if cold.any() else {}
    return {"seen": seen, "held_s": held_s}


def _warmed(cold: StageData, wall_s: Floats, busy_s: Floats) -> StageData:
    """Cold rows as repeats of warm ones, at half their weight, where warm repeats are too few.

    What a start adds is taken off in the median, as seconds or as a factor, whichever leaves less spread around the
    expected warm times. Rows far from these are drawn in: starts have tails of their own, which warm runs don't.
    """

    def adjusted(actual: Floats, expected: Floats) -> Floats:
        less = np.maximum(actual - np.median(actual - expected), 0.2 * actual)
        divided = actual / np.median(actual / expected)
        logs = [np.log(each / expected) for each in (less, divided)]
        spread, closer = min((float(np.median(np.abs(each))), k) for k, each in enumerate(logs))
        reach = _REACH * 1.4826 * spread
        drawn_in: Floats = expected * np.exp(np.clip(logs[closer], -reach, reach))
        return drawn_in

    wall, busy = adjusted(cold.wall_s, wall_s), adjusted(cold.busy_s, busy_s)
    busy = np.minimum(busy, wall)
    steps = cold.steps_s * (busy / cold.busy_s)[:, None]
    return StageData(cold.points, wall, busy, steps, 0.5 * cold.weights)


def stage_data(stage: Stage, rows: History, *, features: Sequence[str], weights: Floats) -> StageData:
    """Rows as a stage model fits them. Where what ran is paid for by its own time, that is their busy time."""
    points = Points.of(
        rows["workers"], rows["vcpus"], upstream=rows["upstream"], items=_items(rows), batch=rows["batch"],
        features=_features(rows, features), knobs=rows.knobs,
    )  # fmt: skip
    billed = rows["billed_s"] / rows["workers"]
    by_request = np.isfinite(rows["requests"]) & np.isfinite(billed) & (billed > 0)
    busy = np.where(by_request, billed, rows["busy_s"])
    steps = np.stack([rows[step] for step in STEPS], axis=1)
    if np.isfinite(steps).all() and (steps.sum(axis=1) > 0).all():
        # Steps are means over the workers, as busy time is; what they leave out of it is shared among them.
        steps = steps * (busy / steps.sum(axis=1))[:, None]
    else:
        steps = np.zeros((len(rows), 0))
    return StageData(points, np.maximum(own_wall(stage, rows), busy), busy, steps, weights)


class Columns(Protocol):
    """Rows of one stage by column: a history, or a mapping of columns."""

    def __getitem__(self, column: str, /) -> Floats:
        """One column, shape ``(n_rows,)``."""
        ...


def own_wall(stage: Stage, rows: Columns) -> Floats:
    """Wall time without waiting for a parent that feeds items one by one: what a stage's model is fitted to.

    Such a stage's measured wall lasts as long as its parent's; what it needs by itself is the start of its workers and
    their busy time, stretched to the busiest worker's share of the items.
    """
    if all(edge.kind == "all" for edge in stage.after):
        return rows["wall_s"]
    points = Points.of(rows["workers"], rows["vcpus"], items=_items(rows), batch=rows["batch"])
    own = rows["busy_s"] * np.where(points.items > 0, points.load / np.maximum(points.share, 1e-12), 1.0)
    return np.clip(own + np.nan_to_num(rows["start_s"]), rows["busy_s"], rows["wall_s"])


def _items(rows: Columns) -> Floats:
    """Items of each row; 0 where the work is divided over the workers, one shard each."""
    items = rows["items"]
    sharded = bool((items == rows["workers"]).all()) and len(np.unique(items)) > 1
    return np.zeros(len(items)) if sharded else items


def _features(rows: History, names: Sequence[str]) -> Floats:
    """Features of each row relative to their median, shape ``(n_rows, n_features)``."""
    columns = [rows.numbers[name] / scale for name, scale in feature_scales(rows, names).items()]
    return np.stack(columns, axis=1) if columns else np.ones((len(rows), 0))


def feature_scales(rows: History, names: Sequence[str]) -> dict[str, float]:
    """Medians of the columns that vary between runs of one setting.

    A column that only follows the setting (bytes read grow with the number of workers) is an effect, no input.
    """
    scales = {}
    settings = Points.of(rows["workers"], rows["vcpus"], upstream=rows["upstream"], batch=rows["batch"]).settings
    for name in names:
        values = rows.numbers.get(name)
        if values is None or not np.isfinite(values).all() or np.median(values) <= 0:
            continue
        relative = values / np.median(values)
        means = np.bincount(settings, relative) / np.bincount(settings)
        if np.sqrt(np.mean((relative - means[settings]) ** 2)) > _FEATURE_SPREAD:
            scales[name] = float(np.median(values))
    return scales


def _n_settings(data: StageData, mask: Bools) -> int:
    return len(np.unique(data.points.settings[mask]))
