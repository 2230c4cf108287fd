"""Draws of latency and cost of a stage's options, given what is known of it and what the stages of a run share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefect_slo.models.design import Bools, Floats, Points
from prefect_slo.models.history import knob_label
from prefect_slo.models.learning import Learned
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
    stream: np.random.Generator, *, blocks: int | None = None,
) -> tuple[Samples32, Samples32]:  # fmt: skip
    """Wall and busy time, shapes ``(len(sums), len(options), n_samples)``.

    Args:
        learned: By hardware.
        options: Menu options, each on hardware that is known.
        sums: Numbers of upstream workers.
        shared: Of the same samples.
        stream: The stage's own.
        blocks: As in ``StageModel.sample``.
    """
    kinds = list(dict.fromkeys(option.size.hardware for option in options))
    if len(kinds) == 1:
        return _draw(learned[kinds[0]], options, sums, shared, stream, blocks)
    shape = (len(sums), len(options), len(shared.ranks))
    wall, busy = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
    for kind in kinds:
        at = [k for k, option in enumerate(options) if option.size.hardware == kind]
        wall[:, at], busy[:, at] = _draw(learned[kind], [options[k] for k in at], sums, shared, stream, blocks)
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
    for k, option in enumerate(options):
        inputs = learned[option.size.hardware].inputs
        waves[k] = points_of(learned[option.size.hardware], [option], (0,), inputs.typical).waves[0]
    return waves


def _draw(
    learned: Learned, options: Sequence[Option], sums: Sequence[int], shared: Shared, stream: np.random.Generator,
    blocks: int | None,
) -> tuple[Samples32, Samples32]:  # fmt: skip
    shape = (len(sums), len(options), len(shared.ranks))
    levels = learned.inputs.levels(shared.ranks)
    used = np.unique(levels).tolist()
    if len(used) == 1:
        draws = learned.model.sample(points_of(learned, options, sums, used[0]), shape[2], stream, blocks=blocks)
        wall = np.asarray(draws.wall_s, dtype=np.float32).reshape(shape)
        busy = np.asarray(draws.busy_s, dtype=np.float32).reshape(shape)
    else:
        wall, busy = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
        state = stream.bit_generator.state
        for level in used:
            at = np.flatnonzero(levels == level)
            points = points_of(learned, options, sums, level)
            if blocks is None:
                draws = learned.model.sample(points, len(at), stream)
                wall[:, :, at] = draws.wall_s.reshape(*shape[:2], len(at))
                busy[:, :, at] = draws.busy_s.reshape(*shape[:2], len(at))
            else:
                # A block keeps its parameters over all levels of input: each level is drawn from the same state.
                stream.bit_generator.state = state
                draws = learned.model.sample(points, shape[2], stream, blocks=blocks)
                wall[:, :, at] = draws.wall_s.reshape(shape)[:, :, at]
                busy[:, :, at] = draws.busy_s.reshape(shape)[:, :, at]
    if shared.cold.any():
        extra_wall, extra_busy = learned.startup.sample(shape[2], stream)
        wall += (extra_wall * shared.cold).astype(np.float32)
        busy += (extra_busy * shared.cold).astype(np.float32)
    return wall, busy
