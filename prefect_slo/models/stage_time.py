"""The distribution of one stage's time at one setting, on the menu or off it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from prefect_slo.models.design import Floats, Points
from prefect_slo.models.drawing import points_of
from prefect_slo.models.learning import Learned
from prefect_slo.models.protocol import Response, StageModel
from prefect_slo.resources import Option
from prefect_slo.units import fraction

_SAMPLES = 20_000


@dataclass(frozen=True)
class StageTime:
    """A mixture over the levels of input that the stage meets.

    Attributes:
        mean: Expected seconds.
    """

    mean: float
    _model: StageModel = field(repr=False)
    _levels: Sequence[Points] = field(repr=False)
    _shares: Floats = field(repr=False)
    _response: Response = field(repr=False)

    @classmethod
    def of(cls, model: StageModel, levels: Sequence[Points], shares: Floats, response: Response) -> StageTime:
        """Of one point per level of input, with the share of runs at each level."""
        means = [model.mean(points, response)[0] for points in levels]
        return cls(float(np.dot(shares, means)), model, levels, shares, response)

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        """Draws in seconds, shape ``(n,)``."""
        which = rng.choice(len(self._levels), n, p=self._shares) if len(self._levels) > 1 else np.zeros(n, dtype=int)
        seconds = np.empty(n)
        for level, points in enumerate(self._levels):
            at = which == level
            draws = self._model.sample(points, int(at.sum()), rng)
            seconds[at] = (draws.wall_s if self._response == "wall" else draws.busy_s)[0]
        return seconds

    def quantile(self, q: float) -> float:
        """The ``q``-quantile in seconds, ``q`` in (0, 1)."""
        fraction(q, "q")
        return float(np.quantile(self.sample(_SAMPLES, np.random.default_rng(0)), q))


def time_of(
    learned: Learned, option: Option, upstream: int, response: Response, *, items: int | None = None
) -> StageTime:
    """Time of a stage at an option, over the inputs that it meets or with a given number of items.

    Args:
        learned: What is known of the stage.
        option: On the menu or off it.
        upstream: Workers of its parents, summed.
        response: Wall or busy time.
        items: Items of the run.
    """
    inputs = learned.inputs
    if items is None:
        levels = [points_of(learned, [option], (upstream,), level) for level in range(len(inputs))]
        return StageTime.of(learned.model, levels, inputs.weights, response)
    typical = points_of(learned, [option], (upstream,), inputs.typical)
    given = replace(typical, items=np.full(1, float(items)))
    return StageTime.of(learned.model, [given], np.ones(1), response)
