"""What every stage model can do, so that the workflow model and the planner know no formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from prefect_slo.models.design import Floats, Points, StageData

Response = Literal["wall", "busy"]


@dataclass(frozen=True)
class Draws:
    """Joint draws of one stage; the same sample index means the same run.

    Attributes:
        wall_s: Wall time, shape ``(n_points, n_samples)``.
        busy_s: Mean busy time of its workers, same shape; never above ``wall_s``.
    """

    wall_s: NDArray[np.floating[Any]]
    busy_s: NDArray[np.floating[Any]]


@runtime_checkable
class StageModel(Protocol):
    """A distribution of wall and busy time over settings, learned from rows.

    ``__init__`` stores, ``fit`` learns. Samples carry run-to-run noise *and* parameter uncertainty.
    """

    @property
    def depends_on_upstream(self) -> bool:
        """Whether predictions change with the number of upstream workers."""
        ...

    def fit(self, data: StageData) -> Self:
        """Learn from rows; returns itself."""
        ...

    def mean(self, points: Points, response: Response = "wall") -> Floats:
        """Expected seconds at each point, shape ``(n_points,)``."""
        ...

    def quantile(self, points: Points, q: float, response: Response = "wall") -> Floats:
        """The ``q``-quantile in seconds at each point, shape ``(n_points,)``."""
        ...

    def sample(self, points: Points, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> Draws:
        """Joint draws at each point; all points share the sample's parameters and its run-to-run noise.

        Every sample draws its own parameters; with ``blocks``, samples come in that many consecutive blocks of equal
        size, and each block shares one draw of everything that more data would teach.
        """
        ...
