"""What a cold start adds to a stage: seconds of wall and of busy time, beyond a warm run at the same setting.

Where workers start elsewhere, starts are part of ordinary runs: a work pool's job is asked for, waits for the pool's
next poll and boots, an environment of a function starts, unless one is still warm from the run before. Whether it is
depends on how far apart runs come, which no plan decides, so the share of runs that start cold is taken as the rows
show it. Starts are few where runs are: under a promise with a confidence, how long workers start is drawn from what as
many rows leave open, by a Bayesian bootstrap (Rubin, Annals of Statistics, 1981).

What is paid for a lease there is not its stage's wall time either: it includes the job's boot and what it idled before,
not the time until the pool's poll. Rows say how long was paid for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np

from prefect_slo.models.design import Bools, Floats, Ints

_PRIOR_RUNS = 2.0
"""The share of a setting starts from that of all settings, as if so many runs had shown it."""

_BEYOND = 0.5
"""Rows' worth of weight that lies beyond the slowest start, as with the noise of warm runs."""

_PRIOR_SPREAD = 0.3
"""Relative standard deviation of starts that is believed in before any repeat, worth one row."""


class Seen(NamedTuple):
    """How often workers had to start."""

    cold: int = 0
    runs: int = 0


@dataclass(frozen=True)
class Startup:
    """Extra seconds seen in cold rows; empty where none was seen.

    Attributes:
        wall_s: Extra wall time, shape ``(n_rows,)``.
        busy_s: Extra busy time of the same rows.
        seen: Cold runs by workers and vCPUs, where starts are part of ordinary runs; else empty.
        held_s: Mean seconds that a worker is paid for beyond its stage's wall time, in warm and in cold runs.
    """

    wall_s: Floats = field(default_factory=lambda: np.zeros(0))
    busy_s: Floats = field(default_factory=lambda: np.zeros(0))
    seen: Mapping[tuple[float, float], Seen] = field(default_factory=dict)
    held_s: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, cold_wall_s: Floats, cold_busy_s: Floats, warm_wall_s: Floats, warm_busy_s: Floats) -> Self:
        """From cold rows and what a warm run is expected to take at their settings; never below 0."""
        wall = np.maximum(cold_wall_s - warm_wall_s, 0.0)
        return cls(wall, np.clip(cold_busy_s - warm_busy_s, 0.0, wall))

    def sample(self, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> tuple[Floats, Floats]:
        """Joint draws of extra wall and busy time, shapes ``(n_samples,)``.

        With ``blocks``, the rows' chances are drawn once per block, with half a row more beyond the slowest.
        """
        if not len(self.wall_s):
            return np.zeros(n_samples), np.zeros(n_samples)
        if blocks is None:
            rows = rng.integers(len(self.wall_s), size=n_samples)
            return self.wall_s[rows], self.busy_s[rows]
        slowest = int(np.argmax(self.wall_s))
        chances = rng.gamma(np.append(np.ones(len(self.wall_s)), _BEYOND), size=(blocks, len(self.wall_s) + 1))
        rows = _drawn(chances, n_samples // blocks, rng)
        beyond = rows == len(self.wall_s)
        rows[beyond] = slowest
        wall, busy = self.wall_s[rows], self.busy_s[rows]
        if (longest := float(self.wall_s[slowest])) > 0:
            factor = 1.0 + beyond * rng.exponential(self._spread / longest, size=n_samples)
            wall, busy = wall * factor, busy * factor
        return wall, busy

    @property
    def _spread(self) -> float:
        """Standard deviation of extra wall time."""
        mean = self.wall_s.mean()
        squares = (_PRIOR_SPREAD * mean) ** 2 + np.sum((self.wall_s - mean) ** 2)
        return float(np.sqrt(squares / len(self.wall_s)))

    def share(self, workers: float, vcpus: float) -> float:
        """Share of ordinary runs in which a stage of this setting waits for workers to start."""
        runs = sum(seen.runs for seen in self.seen.values())
        if not runs:
            return 0.0
        everywhere = sum(seen.cold for seen in self.seen.values()) / runs
        own = self.seen.get((workers, vcpus), Seen())
        return (own.cold + _PRIOR_RUNS * everywhere) / (own.runs + _PRIOR_RUNS)

    def beyond_wall_s(self, cold: Bools) -> Floats:
        """Seconds that each worker is paid for beyond its stage's wall time, in runs that start cold or don't."""
        warm_s, cold_s = self.held_s
        return np.where(cold, cold_s, warm_s)


def _drawn(chances: Floats, each: int, rng: np.random.Generator) -> Ints:
    """So many positions by each row of chances, one row's after the other's."""
    count, width = chances.shape
    reached = np.cumsum(chances, axis=1)
    borders = (reached / reached[:, -1:] + np.arange(count)[:, None]).ravel()
    row = np.repeat(np.arange(count), each)
    found = np.searchsorted(borders, row + rng.random(len(row)), side="right") - width * row
    return np.asarray(np.clip(found, 0, width - 1), dtype=np.int64)


def seen_by_setting(workers: Floats, vcpus: Floats, cold: Bools) -> dict[tuple[float, float], Seen]:
    """How often each setting's rows were cold, oldest first, arrays of shape ``(n_rows,)``.

    The first row of a setting counts for none: nothing can be warm for it, however close runs come. A sweep, which runs
    each setting a few times, would show little else.
    """
    counts: dict[tuple[float, float], Seen] = {}
    for setting, chilled in zip(zip(workers.tolist(), vcpus.tolist(), strict=True), cold.tolist(), strict=True):
        known = counts.get(setting)
        counts[setting] = Seen(known.cold + bool(chilled), known.runs + 1) if known is not None else Seen()
    return counts


def mean_beyond(paid_s: Sequence[float] | Floats, wall_s: Floats, cold: Bools) -> tuple[float, float]:
    """Means of what is paid for beyond wall time, over warm and over cold rows; rows that don't say it count for none.

    Args:
        paid_s: Seconds paid for each worker, shape ``(n_rows,)``, ``nan`` where unknown.
        wall_s: Wall time of the stage in the same rows.
        cold: Whether workers had to start.
    """
    beyond = np.asarray(paid_s) - wall_s
    known = np.isfinite(beyond)
    warm, chilled = (beyond[known & mask] for mask in (~cold, cold))
    means = [float(rows.mean()) if len(rows) else 0.0 for rows in (warm, chilled)]
    return means[0], means[1]
