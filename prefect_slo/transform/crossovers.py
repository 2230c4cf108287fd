"""When another way would be taken: the fan-outs and sizes at which the fastest method of an edge changes, in words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prefect_slo.edges import Method
from prefect_slo.transform.passing import DataStage, Links, Place, Transfer, methods_of

MOST_FAN_OUT = 1024
MOST_MB = 1e5
_STEPS = 240  # of a geometric grid of sizes, each then bisected
_CLOSE = 1e-3


@dataclass(frozen=True)
class Crossover:
    """From here on another method is the fastest."""

    at: float
    method: Method


def by_fan_out(
    edge: Transfer, source: DataStage, sink: DataStage, links: Links, at: tuple[Place, Place], most: int = MOST_FAN_OUT
) -> tuple[Crossover, ...]:
    """Methods by fan-out: from where on each is the fastest, a fan-out of ``f`` being ``f`` workers and calls."""

    def fastest(fan_out: int) -> Method | None:
        return _fastest(edge, source, replace(sink, workers=fan_out, calls=fan_out, slots=fan_out), links, at)

    return _changes([(float(f), fastest(f)) for f in range(1, most + 1)])


def by_size(
    edge: Transfer, source: DataStage, sink: DataStage, links: Links, at: tuple[Place, Place]
) -> tuple[Crossover, ...]:
    """Methods by size from 1 KB up: from how many megabytes on each is the fastest."""

    def fastest(size_mb: float) -> Method | None:
        return _fastest(replace(edge, size_mb=size_mb), source, sink, links, at)

    grid = [1e-3 * (MOST_MB / 1e-3) ** (step / _STEPS) for step in range(_STEPS + 1)]
    found = []
    for coarse in _changes([(size, fastest(size)) for size in grid]):
        low, high = grid[max(grid.index(coarse.at) - 1, 0)], coarse.at
        while high - low > _CLOSE * high and fastest(low) != coarse.method:
            middle = (low + high) / 2
            low, high = (low, middle) if fastest(middle) == coarse.method else (middle, high)
        found.append(Crossover(high, coarse.method))
    return tuple(found)


def words(
    edge: Transfer, source: DataStage, sink: DataStage, links: Links, at: tuple[Place, Place], chosen: Method
) -> str:
    """Why a method was chosen: which others there are, and from which fan-out and size on they would be taken."""
    if len(methods_of(source, sink, edge, links, at)) < 2 and len(edge.ways) < 2:
        return f"{chosen}: there is no other way between these pools"
    what = f"all of {_mb(edge.size_mb)} to each of" if edge.broadcast else f"{_mb(edge.size_mb)} in shares to"
    said = [f"{chosen}: the fastest for {what} {sink.calls} call{'s' if sink.calls > 1 else ''}"]
    fan_outs = by_fan_out(edge, source, sink, links, at)
    if len(fan_outs) > 1:
        steps = [f"{c.method} from fan-out {c.at:.0f}" for c in fan_outs[1:]]
        said.append(f"by fan-out: {fan_outs[0].method}, " + ", ".join(steps))
    sizes = by_size(edge, source, sink, links, at)
    if len(sizes) > 1:
        steps = [f"{c.method} above {_mb(c.at)}" for c in sizes[1:]]
        said.append(f"by size: {sizes[0].method}, " + ", ".join(steps))
    return "; ".join(said)


def _fastest(
    edge: Transfer, source: DataStage, sink: DataStage, links: Links, at: tuple[Place, Place]
) -> Method | None:
    seconds = methods_of(source, sink, edge, links, at)
    return min((took, method) for method, took in seconds.items())[1] if seconds else None


def _changes(fastest: list[tuple[float, Method | None]]) -> tuple[Crossover, ...]:
    found: list[Crossover] = []
    for at, method in fastest:
        if method is not None and (not found or found[-1].method != method):
            found.append(Crossover(at, method))
    return tuple(found)


def _mb(size: float) -> str:
    return f"{size:.3g} MB" if size >= 0.1 else f"{1000 * size:.3g} kB"
