"""Draws of latency and cost of a stage's options, given what is known of it and what the stages of a run share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefect_slo.models.design import Bools, Floats, Points
from prefect_slo.models.history import knob_label
from prefect_slo.models.learning import Learned
from prefect_slo.models.luck import StageLuck
from prefect_slo.resources import Menu, Option

Samples32 = NDArray[np.float32]


@dataclass(frozen=True)
class Shared:
    """What the stages of a run have in common, arrays of shape ``(n_samples,)``.

    Attributes:
        ranks: Rank of the run's input among all inputs, in [0, 1).
        cold: Whether its workers have to start.
        ran: Whether each stage runs, by name.
    """

    ranks: Floats
    cold: Bools
    ran: Mapping[str, Bools]


def draw_options(
    learned: Mapping[str, Learned], options: Sequence[Option], sums: Sequence[int], shared: Shared,
    stream: np.random.Generator, *, luck: Mapping[str, StageLuck] | None = None,
) -> tuple[Samples32, Samples32]:  # fmt: skip
    """Wall and busy time, shapes ``(len(sums), len(options), n_samples)``.

    Args:
        learned: By hardware.
        options: Menu options, each on hardware that is known.
        sums: Numbers of upstream workers.
        shared: Of the same samples.
        stream: The stage's own.
        luck: Runs of the same number of samples by hardware, which all options share; drawn where there are none.
    """
    kinds = list(dict.fromkeys(option.size.hardware for option in options))
    shape = (len(sums), len(options), len(shared.ranks))
    wall, busy = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
    for kind in kinds:
        at = [k for k, option in enumerate(options) if option.size.hardware == kind]
        runs = None if luck is None else luck[kind]
        drawn = _draw(learned[kind], [options[k] for k in at], sums, shared, stream, runs)
        if len(kinds) == 1:
            return drawn
        wall[:, at], busy[:, at] = drawn
    return wall, busy


def cost_of(menu: Menu, options: Sequence[Option], wall: Samples32, busy: Samples32) -> Samples32:
    """US dollars of all workers of each option, from wall and busy time ``(n_sums, n_options, n_samples)``.

    A price list with a price per request is a function service and bills busy time; one without bills workers for as
    long as they are held.
    """
    prices = {pool: menu.prices_of(pool) for pool in {option.pool for option in options}}
    cost = np.empty_like(wall)
    for k, option in enumerate(options):
        price, size = prices[option.pool], option.size
        billed = busy[:, k] if price.request > 0 else wall[:, k]
        if price.granularity_s > 0:
            step = np.float32(price.granularity_s)
            billed = np.ceil(billed / step) * step
        rate = price.rate(size.vcpus, size.memory_mb, size.gpu, size.hardware)
        cost[:, k] = billed * np.float32(option.workers * rate) + np.float32(option.workers * price.request)
    return cost


def points_of(learned: Learned, options: Sequence[Option], sums: Sequence[int], level: int) -> Points:
    """Points of every option at every number of upstream workers (options fastest), at one level of input."""
    n, features = len(options), learned.inputs.features
    return Points.of(
        np.tile([float(option.workers) for option in options], len(sums)),
        np.tile([option.size.vcpus for option in options], len(sums)),
        upstream=np.repeat(np.asarray(sums, dtype=float), n),
        items=learned.inputs.items[level],
        batch=np.tile([float(option.batch) for option in options], len(sums)),
        features=np.broadcast_to(features[level], (n * len(sums), features.shape[1])),
        knobs=np.tile([knob_label(option.knobs) for option in options], len(sums)),
    )


def waves_of(learned: Mapping[str, Learned], options: Sequence[Option]) -> Samples32:
    """Calls that the busiest worker makes one after another with a typical input, shape ``(n_options,)``."""
    waves = np.ones(len(options), dtype=np.float32)
    for kind in {option.size.hardware for option in options}:
        at = [k for k, option in enumerate(options) if option.size.hardware == kind]
        points = points_of(learned[kind], [options[k] for k in at], (0,), learned[kind].inputs.typical)
        waves[at] = points.waves
    return waves


def _draw(
    learned: Learned, options: Sequence[Option], sums: Sequence[int], shared: Shared, stream: np.random.Generator,
    luck: StageLuck | None,
) -> tuple[Samples32, Samples32]:  # fmt: skip
    shape = (len(sums), len(options), len(shared.ranks))
    levels = learned.inputs.levels(shared.ranks)
    used = np.flatnonzero(np.bincount(levels)).tolist()
    points = [points_of(learned, options, sums, level) for level in used]
    if len(used) == 1:
        draws = learned.model.sample(points[0], shape[2], stream) if luck is None else luck.at(points[0])
        wall, busy = draws.wall_s, draws.busy_s
    else:
        wall, busy = (np.empty((len(points[0]), shape[2]), dtype=np.float32) for _ in range(2))
        for level, there in zip(used, points, strict=True):
            at = np.flatnonzero(levels == level)
            draws = learned.model.sample(there, len(at), stream) if luck is None else luck.at(there, at)
            wall[:, at], busy[:, at] = draws.wall_s, draws.busy_s
    wall, busy = (np.asarray(values, dtype=np.float32).reshape(shape) for values in (wall, busy))
    if shared.cold.any():
        extra_wall, extra_busy = learned.startup.sample(shape[2], stream.spawn(1)[0])
        wall = wall + (extra_wall * shared.cold).astype(np.float32)
        busy = busy + (extra_busy * shared.cold).astype(np.float32)
    return wall, busy
