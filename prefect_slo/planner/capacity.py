"""Capacity: stages that can hold workers at the same time must fit together.

Sets of stages that can all overlap are the antichains of an order (``overlap``), and a plan fits when the heaviest
antichain does, in every resource. What is counted is the peak of stages that can overlap, never the sum over a
workflow. Shares of GPUs must find their places on devices, too (``placing``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.overlap import Order, antichains, max_weight_antichain, waits
from prefect_slo.planner.placing import Placing
from prefect_slo.resources import Option
from prefect_slo.workflow import Workflow


@dataclass(eq=False)
class Antichains:
    """Sets of stages that can overlap, and what each option of each stage holds.

    Attributes:
        sets: Antichains as tuples of stage positions; grows as ``admit`` finds others that a choice breaks.
        order: Which stages can't overlap.
        needs: By stage, ``(n_options, n_limits)`` of what its workers hold in all.
        limits: ``(n_limits,)``.
        placing: Places shares of GPUs on devices, which no sum can tell; ``None`` where no option takes of one.
    """

    sets: list[tuple[int, ...]]
    order: Order
    needs: tuple[NDArray[np.float64], ...]
    limits: NDArray[np.float64]
    placing: Placing | None = None

    @classmethod
    def of(cls, workflow: Workflow, options: Sequence[Sequence[Option]]) -> Antichains:
        """The antichains of a workflow whose stages, in topological order, have these options."""
        capacity = workflow.capacity
        limited = capacity.limits()
        limits = np.array(list(limited.values()), dtype=np.float64)
        needs = tuple(np.array([[capacity.held(o, *limit) for limit in limited] for o in stage]) for stage in options)
        if not limited:
            return cls([], frozenset(), needs, limits)
        order = waits(workflow)
        listed, _ = antichains(range(len(options)), order)  # the rest are found when broken
        return cls(listed, order, needs, limits, Placing.of(order, capacity, options))

    def restricted(self, kept: Sequence[NDArray[np.intp]]) -> Antichains:
        """The same for some of every stage's options, by position."""
        needs = tuple(need[index] for need, index in zip(self.needs, kept, strict=True))
        return replace(self, needs=needs, placing=self.placing.restricted(kept) if self.placing is not None else None)

    def easier(self, at: int) -> NDArray[np.bool_]:
        """``[a, b]``: whether option *a* of a stage fits wherever *b* does."""
        needs = self.needs[at]
        fits = (needs[:, None, :] <= needs[None, :, :]).all(axis=2)
        if self.placing is not None:
            fits &= self.placing.easier(at)
        return np.asarray(fits)

    def narrow(self, at: int, choice: Sequence[int], mask: NDArray[np.bool_]) -> None:
        """Clear from ``mask`` the options of a stage that do not fit beside what was chosen for the stages before it.

        Stages after it count with the least that they can hold.
        """
        if not self.limits.size:
            return
        beside = np.zeros_like(self.limits)
        for members in self.sets:
            if at in members:
                held = [self.needs[m][choice[m]] if m < at else self._least(m) for m in members if m != at]
                beside = np.maximum(beside, np.sum(held, axis=0) if held else 0.0)
        mask &= (self.needs[at] + beside <= self.limits * (1 + 1e-9)).all(axis=1)

    def admit(self, choice: Sequence[int]) -> bool:
        """Whether a complete choice fits; an antichain that it breaks is remembered."""
        for resource, limit in enumerate(self.limits):
            held = [self.needs[i][o][resource] for i, o in enumerate(choice)]
            if sum(held) <= limit * (1 + 1e-9):
                continue
            heaviest = max_weight_antichain(held, self.order)
            if sum(held[i] for i in heaviest) > limit * (1 + 1e-9):
                if heaviest not in self.sets:
                    self.sets.append(heaviest)
                return False
        return self.placing is None or self.placing.admits(choice)

    def _least(self, at: int) -> NDArray[np.float64]:
        least: NDArray[np.float64] = self.needs[at].min(axis=0)
        return least
