"""What was measured of a workflow so far: rows by stage, how often each stage ran, and the time of the flow itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from prefect_slo.columns import refuse
from prefect_slo.errors import InvalidObservation, InvalidValue
from prefect_slo.models.design import Floats
from prefect_slo.models.driver import Driver
from prefect_slo.models.history import History, read
from prefect_slo.observation import StageRuns
from prefect_slo.pricing import price_list
from prefect_slo.workflow import Stage, Workflow

FIELDS = ("runs", "branches", "driver_s", "stages")
"""What ``to_document`` writes."""

MB_PER_VCPU = 1769.0
"""Memory that comes with a vCPU where the price list doesn't tie the two."""

_SHORTEST_S, _LONGEST_S = 1e-9, 1e9
_ROWS = 1200
_LEAST_ROWS = 48
_LEAST_WEIGHT = 0.01
_PRIOR_RUNS = 2.0


@dataclass(frozen=True)
class Record:
    """All that a model is fitted to.

    Attributes:
        runs: How many runs were measured.
        histories: Rows kept, by stage.
        branches: By stage, in how many runs it ran, and in how many it could have.
        driver: Times of the flow function beyond the longest path.
    """

    runs: int = 0
    histories: Mapping[str, History] = field(default_factory=dict)
    branches: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    driver: Driver = field(default_factory=Driver)

    def followed_by(
        self, workflow: Workflow, table: StageRuns, run_latency_s: Mapping[str, float], features: Sequence[str]
    ) -> Record:
        """The record with later runs.

        Args:
            workflow: Its stages are the ones the table may name.
            table: Rows of whole runs.
            run_latency_s: Latency of whole runs by run id.
            features: Columns that hold input features.

        Raises:
            UnknownStage: A row of a stage that the workflow doesn't have.
        """
        fresh, numbers = read(workflow, table, features, first_run=self.runs)
        limit = max(_LEAST_ROWS, _ROWS // len(workflow.stages))
        histories = dict(self.histories)
        for name, history in fresh.items():
            known = histories.get(name, history.take(np.zeros(0, dtype=np.int64)))
            histories[name] = known.followed_by(history, limit)
        driver = self.driver.followed_by(workflow, table, run_latency_s)
        return Record(self.runs + len(numbers), histories, self._counted(workflow, fresh), driver)

    def weights(self, rows: History, half_life_runs: float | None) -> Floats:
        """Weight of each row: half for one that many runs older; ``None`` weighs all alike."""
        if half_life_runs is None:
            return np.ones(len(rows))
        age = self.runs - 1 - rows.run
        return np.maximum(0.5 ** (age / half_life_runs), _LEAST_WEIGHT)

    def chance(self, stage: Stage) -> float:
        """Chance of a stage given its parents: as declared, moved by what runs showed (two runs' worth of prior)."""
        ran, of = self.branches.get(stage.name, (0, 0))
        declared = stage.probability
        return declared if declared == 1.0 else (ran + _PRIOR_RUNS * declared) / (of + _PRIOR_RUNS)

    def to_document(self) -> dict[str, Any]:
        """The record, JSON-able."""
        return {
            "runs": self.runs,
            "branches": {name: list(counts) for name, counts in self.branches.items() if counts != (0, 0)},
            "driver_s": self.driver.to_document(),
            "stages": {name: history.to_document() for name, history in self.histories.items()},
        }

    @classmethod
    def from_document(cls, workflow: Workflow, document: Mapping[str, Any]) -> Self:
        """Read what ``to_document`` wrote; stages that the workflow no longer has are left out.

        Raises:
            InvalidValue: A field is missing.
        """
        for name in FIELDS:
            if name not in document:
                raise InvalidValue(f"model.{name}", None, "what to_document() wrote there; fit the model again")
        return cls(
            document["runs"],
            {name: History.from_document(rows) for name, rows in document["stages"].items() if name in workflow},
            {name: (int(ran), int(of)) for name, (ran, of) in document["branches"].items() if name in workflow},
            Driver.from_document(document["driver_s"]),
        )

    def _counted(self, workflow: Workflow, fresh: Mapping[str, History]) -> dict[str, tuple[int, int]]:
        runs = {name: set(history.run.tolist()) for name, history in fresh.items()}
        every = set().union(*runs.values())
        counted = {}
        for stage in workflow.stages:
            reached = set().union(*(runs.get(parent, set()) for parent in stage.parents)) if stage.after else every
            ran, of = self.branches.get(stage.name, (0, 0))
            counted[stage.name] = (ran + len(runs.get(stage.name, set()) & reached), of + len(reached))
        return counted


def checked(workflow: Workflow, stage_runs: Any) -> StageRuns:
    """Typed columns of a stage-run table of any form.

    Raises:
        InvalidObservation: A column is missing, a value can't be a measurement, or there is no row.
    """
    tie = price_list(workflow.stages[0].menu.prices).mb_per_vcpu or MB_PER_VCPU
    if isinstance(stage_runs, StageRuns):
        stage_runs = {**stage_runs.columns, **stage_runs.extra}
    if not hasattr(stage_runs, "keys"):
        raise InvalidObservation("stage_runs", type(stage_runs).__name__, "a table: a mapping of columns")
    table = StageRuns.from_table(stage_runs, mb_per_vcpu=tie)
    if not len(table):
        raise InvalidObservation("stage_runs", 0, "at least one row")
    wall_s = table["wall_s"]
    refuse("wall_s", (wall_s < _SHORTEST_S) | (wall_s > _LONGEST_S), wall_s, "between 1e-9 and 1e9 seconds")
    return table
