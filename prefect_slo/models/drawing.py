"""Draws of latency and cost of a stage's options, given what is known of it and what the stages of a run share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isnan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefect_slo.granularity import bundle_size, invocations, record_level
from prefect_slo.models.design import Bools, Floats, Points
from prefect_slo.models.history import knob_label
from prefect_slo.models.learning import Learned
from prefect_slo.models.luck import StageLuck
from prefect_slo.models.startup import Startup
from prefect_slo.plan import StagePlan
from prefect_slo.resources import Menu, Option
from prefect_slo.workflow import Stage

Samples32 = NDArray[np.float32]


@dataclass(frozen=True)
class Shared:
    """What the stages of a run have in common, arrays of shape ``(n_samples,)``.

    Attributes:
        ranks: Rank of the run's input among all inputs, in [0, 1).
        chill: How warm the run finds things, in [0, 1): stages start cold in it whose share of cold runs is above that.
        cold: Share of cold runs that is asked for.
        ran: Whether each stage runs, by name.
        blocks: Number of consecutive blocks of runs that share their truth; ``None``: each run has its own.
    """

    ranks: Floats
    chill: Floats
    cold: float
    ran: Mapping[str, Bools]
    blocks: int | None = None

    def starts(self, startup: Startup, option: Option) -> Bools:
        """Runs in which the workers of an option have to start: as asked for, or as rows show where that is more."""
        return self.chill < max(self.cold, startup.share(float(option.workers), option.vcpus))


class Drawn(NamedTuple):
    """Times of a stage's options, shapes ``(n_sums, n_options, n_samples)``.

    Attributes:
        wall_s: Wall time, starts included.
        busy_s: Mean busy time of its workers, likewise.
        start_s: Of both, what starts add, ``(n_options, n_samples)``; ``None`` where no worker has to start.
    """

    wall_s: Samples32
    busy_s: Samples32
    start_s: Samples32 | None


def draw_options(
    learned: Mapping[str, Learned], options: Sequence[Option], sums: Sequence[int], shared: Shared,
    stream: np.random.Generator, *, luck: Mapping[str, StageLuck] | None = None,
) -> Drawn:  # fmt: skip
    """Times of some options at some numbers of upstream workers.

    Args:
        learned: By hardware.
        options: Menu options, each on hardware that is known.
        sums: Numbers of upstream workers.
        shared: Of the same samples.
        stream: The stage's own.
        luck: Runs of the same number of samples by hardware, which all options share; drawn where there are none.
    """
    kinds = list(dict.fromkeys(option.size.kind for option in options))
    shape = (len(sums), len(options), len(shared.ranks))
    wall, busy = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
    start: Samples32 | None = None
    for kind in kinds:
        at = [k for k, option in enumerate(options) if option.size.kind == kind]
        runs = None if luck is None else luck[kind]
        drawn = _draw(learned[kind], [options[k] for k in at], sums, shared, stream, runs)
        if len(kinds) == 1:
            return drawn
        wall[:, at], busy[:, at] = drawn.wall_s, drawn.busy_s
        if drawn.start_s is not None:
            start = np.zeros(shape[1:], dtype=np.float32) if start is None else start
            start[at] = drawn.start_s
    return Drawn(wall, busy, start)


@dataclass(frozen=True)
class Requests:
    """What an option is billed for beside time, where its rows have shown it.

    Attributes:
        count: Invocations, jobs or bundles of a run, a number or of shape ``(n_samples,)``.
        storage_usd: Of reading and writing objects, for each.
    """

    count: Samples32 | float
    storage_usd: float


def cost_of(
    menu: Menu, options: Sequence[Option], wall: Samples32, busy: Samples32,
    requests: Sequence[Requests | None] = (), beyond: Sequence[Samples32] = (),
) -> Samples32:  # fmt: skip
    """US dollars of all workers of each option, from wall and busy time ``(n_sums, n_options, n_samples)``.

    Where rows say how many invocations, jobs or bundles were paid for, busy time is what was paid, rounding included:
    it is not rounded again, and a price list that bills calls adds what it asks for each. Elsewhere such a list takes
    busy time and one request of each worker; one that bills leases, workers for as long as they are held.

    Args:
        menu: The stage's, for its prices.
        options: Of the menu.
        wall: Wall time.
        busy: Busy time.
        requests: By option, what it is billed for beside time.
        beyond: By option, what each worker is held beyond the wall time, ``(n_samples,)``.
    """
    prices = {pool: menu.prices_of(pool) for pool in {option.pool for option in options}}
    cost = np.empty_like(wall)
    for k, option in enumerate(options):
        price, size, workers = prices[option.pool], option.size, option.workers
        rate = price.rate(size.vcpus, size.memory_mb, size.gpu, size.hardware)
        seen = requests[k] if requests else None
        if seen is not None:
            least_s, each_usd = (price.minimum_s, price.request) if price.bills == "calls" else (0.0, 0.0)
            billed = np.maximum(busy[:, k] * np.float32(workers), seen.count * np.float32(least_s))
            cost[:, k] = billed * np.float32(rate) + seen.count * np.float32(each_usd + seen.storage_usd)
            continue
        billed = busy[:, k] if price.bills == "calls" else wall[:, k]
        if beyond and price.bills != "calls":
            billed = np.maximum(billed + beyond[k], np.float32(0))
        if price.granularity_s > 0:
            step = np.float32(price.granularity_s)
            billed = np.ceil(billed / step) * step
        billed = np.maximum(billed, np.float32(price.minimum_s))
        cost[:, k] = billed * np.float32(workers * rate) + np.float32(workers * price.request)
    return cost


def requests_of(
    learned: Mapping[str, Learned], stage: Stage, options: Sequence[Option], wall: Samples32, shared: Shared,
    planned: StagePlan | None = None,
) -> list[Requests | None]:  # fmt: skip
    """What each option is billed for beside time; ``None`` where its rows don't say.

    Args:
        learned: By hardware.
        stage: The stage.
        options: Menu options, each on hardware that is known.
        wall: Wall time, ``(n_sums, n_options, n_samples)``: the time of an item decides how many travel together.
        shared: Of the same samples.
        planned: How the stage is run, where that is decided; else as a plan of the option would have it.
    """
    found: list[Requests | None] = []
    for k, option in enumerate(options):
        known = learned[option.size.kind]
        if known.billing is None:
            found.append(None)
            continue
        levels = known.inputs.levels(shared.ranks)
        counts = [_calls(items, option) for items in known.inputs.items.tolist()]
        if isnan(known.billing.per_call):
            per_item_s = float(wall[:, k].mean()) / float(waves_of(learned, [option])[0])
            counts = [_invocations(calls, stage, option, per_item_s, planned) for calls in counts]
        else:
            counts = [calls * known.billing.per_call for calls in counts]
        count = np.asarray(counts, dtype=np.float32)[levels] if len(set(counts)) > 1 else float(counts[0])
        found.append(Requests(count, known.billing.storage_usd))
    return found


def beyond_wall_of(learned: Mapping[str, Learned], options: Sequence[Option], shared: Shared) -> list[Samples32]:
    """What each worker of each option is held beyond its stage's wall time, ``(n_samples,)``; empty where nothing."""
    startups = [learned[option.size.kind].startup for option in options]
    if not any(any(startup.held_s) for startup in startups):
        return []
    return [
        startup.beyond_wall_s(shared.starts(startup, option)).astype(np.float32)
        for startup, option in zip(startups, options, strict=True)
    ]


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
    for kind in {option.size.kind for option in options}:
        at = [k for k, option in enumerate(options) if option.size.kind == kind]
        points = points_of(learned[kind], [options[k] for k in at], (0,), learned[kind].inputs.typical)
        waves[at] = points.waves
    return waves


def _calls(items: float, option: Option) -> float:
    """Calls of a run with so many items; divisible work is a call to each worker."""
    return float(ceil(items / option.batch - 1e-9)) if items > 0 else float(option.workers)


def _invocations(calls: float, stage: Stage, option: Option, item_s: float, planned: StagePlan | None) -> float:
    """Invocations that so many calls make, as the plan of the option bundles them."""
    if planned is not None:
        return float(invocations(ceil(calls), option.batch, planned.record, planned.bundle))
    if stage.fanout != "given" or not stage.items:
        return calls
    typical = ceil(stage.items / option.batch)
    bundle = bundle_size(typical, option.workers, item_s)
    return float(invocations(ceil(calls), option.batch, record_level(typical, item_s), bundle))


def _draw(
    learned: Learned, options: Sequence[Option], sums: Sequence[int], shared: Shared, stream: np.random.Generator,
    luck: StageLuck | None,
) -> Drawn:  # fmt: skip
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
    cold = np.stack([shared.starts(learned.startup, option) for option in options])
    if not cold.any():
        return Drawn(wall, busy, None)
    extra_wall, extra_busy = learned.startup.sample(shape[2], stream.spawn(1)[0], blocks=shared.blocks)
    start = (extra_wall * cold).astype(np.float32)
    return Drawn(wall + start, busy + (extra_busy * cold).astype(np.float32), start)
