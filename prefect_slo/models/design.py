"""What a stage model learns from and is asked about: points of the menu, and the rows measured at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

STEPS = ("read_s", "compute_s", "write_s")


@dataclass(frozen=True)
class Points:
    """Settings of one stage and the inputs they meet, as columns of shape ``(n_points,)``.

    Attributes:
        workers: Workers that run the stage at once (*d*).
        vcpus: vCPUs of each (*v*).
        upstream: Workers of the parents, summed (*u*); 0 for a source.
        items: Calls made; 0 for divisible work.
        batch: Items in one call.
        features: Input features relative to their typical value, shape ``(n_points, n_features)``.
        knobs: One name per point for the task's knobs and their values; ``""`` without any.
    """

    workers: Floats
    vcpus: Floats
    upstream: Floats
    items: Floats
    batch: Floats
    features: Floats
    knobs: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.workers)

    @classmethod
    def of(
        cls,
        workers: Sequence[float] | Floats,
        vcpus: Sequence[float] | Floats,
        *,
        upstream: float | Sequence[float] | Floats = 0.0,
        items: float | Sequence[float] | Floats = 0.0,
        batch: float | Sequence[float] | Floats = 1.0,
        features: Floats | None = None,
        knobs: str | Sequence[str] | NDArray[np.str_] = "",
    ) -> Points:
        """Points from columns; scalars hold for every point."""
        d = np.asarray(workers, dtype=float)
        n = len(d)

        def full(values: float | Sequence[float] | Floats) -> Floats:
            return np.broadcast_to(np.asarray(values, dtype=float), (n,)).copy()

        columns = np.ones((n, 0)) if features is None else np.asarray(features, dtype=float).reshape(n, -1)
        names = np.broadcast_to(np.asarray(knobs, dtype=str), (n,)).copy()
        return cls(d, full(vcpus), full(upstream), full(items), full(batch), columns, names)

    @classmethod
    def joined(cls, parts: Sequence[Points]) -> Points:
        """The points of all parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def take(self, index: Ints | Bools) -> Points:
        """The points at ``index`` (positions or a mask)."""
        return Points(
            self.workers[index], self.vcpus[index], self.upstream[index], self.items[index], self.batch[index],
            self.features[index], self.knobs[index],
        )  # fmt: skip

    @cached_property
    def load(self) -> Floats:
        """Work that the busiest worker gets: ⌈⌈n/b⌉/d⌉·b items, or the fraction 1/d of divisible work."""
        return np.where(self.items > 0, self.waves * self.batch, 1.0 / self.workers)

    @cached_property
    def waves(self) -> Floats:
        """Calls that the busiest worker makes: ⌈⌈n/b⌉/d⌉, or 1 for divisible work."""
        calls = np.ceil(np.maximum(self.items, 1.0) / self.batch - 1e-9)
        return np.where(self.items > 0, np.ceil(calls / self.workers - 1e-9), 1.0)

    @cached_property
    def share(self) -> Floats:
        """Mean items per worker, n/d; the fraction 1/d for divisible work."""
        return np.where(self.items > 0, self.items / self.workers, 1.0 / self.workers)

    @cached_property
    def coordinates(self) -> Floats:
        """Base-2 logarithms of workers, vCPUs, batch and 1 + upstream, ``(n, 4)``: which settings are neighbours."""
        return np.stack(
            [np.log2(self.workers), np.log2(self.vcpus), np.log2(self.batch), np.log2(1.0 + self.upstream)], axis=1
        )

    @cached_property
    def settings(self) -> Ints:
        """Number of the setting (workers, vCPUs, batch, upstream, knobs) of each point, in order of appearance."""
        seen: dict[tuple[object, ...], int] = {}
        rows = zip(self.coordinates.round(9).tolist(), self.knobs.tolist(), strict=True)
        return np.asarray([seen.setdefault((*at, knob), len(seen)) for at, knob in rows], dtype=np.int64)


@dataclass(frozen=True)
class StageData:
    """Rows of one stage on one kind of hardware, as a stage model fits them.

    Attributes:
        points: Setting and input of each row.
        wall_s: From first item ready to last item done, shape ``(n_rows,)``.
        busy_s: Mean busy time of the stage's workers; never above ``wall_s``.
        steps_s: Read, compute and write time, mean over the workers, ``(n_rows, 3)``; ``(n_rows, 0)`` where unknown.
        weights: Weight of each row; recent runs weigh more.
    """

    points: Points
    wall_s: Floats
    busy_s: Floats
    steps_s: Floats
    weights: Floats = field(default_factory=lambda: np.ones(0))

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.wall_s):
            object.__setattr__(self, "weights", np.ones(len(self.wall_s)))

    def __len__(self) -> int:
        return len(self.wall_s)

    def followed_by(self, other: StageData) -> StageData:
        """The rows of both."""
        points = Points.joined([self.points, other.points])
        return StageData(
            points,
            np.concatenate([self.wall_s, other.wall_s]),
            np.concatenate([self.busy_s, other.busy_s]),
            np.concatenate([self.steps_s, other.steps_s]),
            np.concatenate([self.weights, other.weights]),
        )

    def take(self, index: Ints | Bools) -> StageData:
        """The rows at ``index`` (positions or a mask)."""
        return StageData(
            self.points.take(index), self.wall_s[index], self.busy_s[index], self.steps_s[index], self.weights[index]
        )
