"""How many items and how much input a stage meets: a random variable, drawn once per run.

All stages of a sample share the rank of their input: a large run is large everywhere. That is the true coupling where
one input flows through the graph, and the cautious one elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prefect_slo.models.design import Floats

_LEVELS = 12


@dataclass(frozen=True)
class Inputs:
    """Levels of input, smallest first.

    Attributes:
        items: Items at each level, shape ``(n_levels,)``; 0 for divisible work.
        features: Input features at each level, relative to their typical value, shape ``(n_levels, n_features)``.
        weights: Share of runs at each level.
    """

    items: Floats
    features: Floats
    weights: Floats

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def of(cls, items: Floats, features: Floats, weights: Floats) -> Inputs:
        """Levels from rows: the distinct inputs, or means over equal shares of the runs where there are many."""
        rows, which = np.unique(np.column_stack([items, features]), axis=0, return_inverse=True)
        share = np.bincount(which.ravel(), weights)
        order = np.argsort(rows.sum(axis=1) if rows.shape[1] == 1 else _size(rows), kind="stable")
        rows, share = rows[order], share[order] / share.sum()
        if len(rows) > _LEVELS:
            middle = np.cumsum(share) - share / 2
            bins = np.minimum((middle * _LEVELS).astype(int), _LEVELS - 1)
            used = np.unique(bins)
            rows = np.stack([np.average(rows[bins == k], axis=0, weights=share[bins == k]) for k in used])
            rows[:, 0] = np.ceil(rows[:, 0] - 1e-9)
            share = np.array([share[bins == k].sum() for k in used])
        return cls(rows[:, 0], rows[:, 1:], np.asarray(share, dtype=float))

    def about(self, items: int | None) -> Inputs:
        """The same with that many items in a typical run, which vary as much as they did; themselves for ``None``.

        Divisible work has no items, and stays so.
        """
        typical = float(self.items[self.typical])
        if not items or not typical or typical == items:
            return self
        scaled = np.where(self.items > 0, np.maximum(np.round(self.items * (items / typical)), 1.0), 0.0)
        return Inputs(scaled, self.features, self.weights)

    def levels(self, ranks: Floats) -> NDArray[np.int64]:
        """Level of each sample, given the rank of its input in [0, 1), shape ``(n_samples,)``."""
        if len(self) == 1:
            return np.zeros(len(ranks), dtype=np.int64)
        return np.minimum(np.searchsorted(self._reached, ranks, side="right"), len(self) - 1)

    def known(self, features: Floats) -> Inputs:
        """The one level of a run whose input is known, with the items of the level most like it.

        Args:
            features: Relative to their typical value, shape ``(n_features,)``.
        """
        logs = np.log(np.maximum(self.features, 1e-12)) - np.log(np.maximum(features, 1e-12))
        like = int(np.argmin((logs**2).sum(axis=1)))
        return Inputs(self.items[like : like + 1], features[None, :], np.ones(1))

    @property
    def typical(self) -> int:
        """The median level."""
        return int(self.levels(np.array([0.5]))[0])

    @cached_property
    def _reached(self) -> Floats:
        reached: Floats = np.cumsum(self.weights)
        return reached


def _size(rows: Floats) -> Floats:
    """One number to order inputs by: the mean of each column relative to its own mean."""
    means = np.maximum(rows.mean(axis=0), 1e-300)
    size: Floats = (rows / means).mean(axis=1)
    return size
