"""Samples of every menu option of every stage: all that a planner needs, so that it knows no formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefect_slo.resources import Option
from prefect_slo.workflow import Workflow


@dataclass(frozen=True)
class StageTable:
    """Joint draws of latency and cost of one stage.

    The same sample index is the same run everywhere: options of a stage share its parameters and its noise, stages
    have independent streams but share the input.

    Attributes:
        stage: Its name.
        options: Menu options that the model can predict.
        upstream: Sums of the parents' workers that the menus allow; ``(0,)`` when the stage doesn't depend on them.
        latency_s: Shape ``(n_upstream, n_options, n_samples)``, float32; 0 in samples where the stage doesn't run.
        cost_usd: Of all its workers; same shape.
        waves: Calls that the busiest worker makes one after another with a typical input, shape ``(n_options,)``.
    """

    stage: str
    options: tuple[Option, ...]
    upstream: tuple[int, ...]
    latency_s: NDArray[np.float32]
    cost_usd: NDArray[np.float32]
    waves: NDArray[np.float32]

    def at(self, upstream: int) -> int:
        """Position of a sum of parents' workers on the first axis."""
        return 0 if len(self.upstream) == 1 else self.upstream.index(upstream)


@dataclass(frozen=True)
class SampleTables:
    """Tables of all stages, drawn together.

    Attributes:
        workflow: The graph they belong to.
        stages: By stage name, parents first.
        driver_s: Time of the flow function beyond the longest path, shape ``(n_samples,)``.
        ran: Whether each stage runs, by name, shape ``(n_samples,)``.
    """

    workflow: Workflow
    stages: Mapping[str, StageTable]
    driver_s: NDArray[np.float32]
    ran: Mapping[str, NDArray[np.bool_]]

    def __getitem__(self, stage: str) -> StageTable:
        return self.stages[stage]

    @property
    def n_samples(self) -> int:
        """Samples per option."""
        return len(self.driver_s)


def upstream_sums(workflow: Workflow, stage: str) -> tuple[int, ...]:
    """Every sum of the parents' workers that their menus allow; ``(0,)`` for a source."""
    sums = {0}
    for parent in workflow[stage].parents:
        sums = {total + workers for total in sums for workers in workflow[parent].menu.worker_counts}
    return tuple(sorted(sums))
