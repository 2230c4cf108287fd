"""Time of the flow function itself: what a run takes beyond the longest path of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from prefect_slo.models.design import Floats
from prefect_slo.models.makespan import makespan
from prefect_slo.observation import StageRuns
from prefect_slo.units import positive
from prefect_slo.workflow import Workflow

_KEPT = 200
_MOST_INFLATION = 4.0
_LONE_SPREAD = 0.5


@dataclass(frozen=True)
class Driver:
    """Measured driver times; none until a run's latency is known, and then the driver takes no time.

    Attributes:
        seconds: Of the latest runs, oldest first.
    """

    seconds: tuple[float, ...] = ()

    def followed_by(self, workflow: Workflow, runs: StageRuns, run_latency_s: Mapping[str, float]) -> Driver:
        """With the runs whose latency is given: latency less the longest path of measured walls, at least 0."""
        measured = []
        for run_id, latency in list(run_latency_s.items())[-_KEPT:]:
            rows = runs.select(runs["run_id"] == str(run_id))
            if not len(rows):
                continue
            walls = dict(zip(rows["stage"].tolist(), rows["wall_s"].tolist(), strict=True))
            calls = np.ceil(np.maximum(rows["items"], 1) / rows["batch"])
            waves = dict(zip(rows["stage"].tolist(), np.ceil(calls / rows["workers"]).tolist(), strict=True))
            times = {stage.name: np.array([walls.get(stage.name, 0.0)]) for stage in workflow.stages}
            path = makespan(workflow, times, waves=waves)
            rest = max(positive(latency, f"run_latency_s[{run_id}]") - float(path[0]), 0.0)
            measured.append(float(f"{rest:.6g}"))
        return Driver(tuple(dict.fromkeys((*self.seconds, *measured)))[-_KEPT:])

    def sample(self, n_samples: int, rng: np.random.Generator) -> Floats:
        """Draws in seconds, shape ``(n_samples,)``: resampled runs, spread wider where they are few (see noise.py)."""
        if not self.seconds:
            return np.zeros(n_samples)
        values = np.asarray(self.seconds)
        m, centre = len(values), float(np.mean(values))
        if m == 1:
            return centre * np.exp(_LONE_SPREAD * rng.standard_normal(n_samples))
        inflation = np.minimum(np.sqrt((m - 1) / rng.chisquare(m - 1, n_samples)), _MOST_INFLATION)
        drawn = centre + (rng.choice(values, n_samples) - centre) * np.sqrt(m / (m - 1)) * inflation
        floor: Floats = np.maximum(drawn, 0.0)
        return floor

    def to_document(self) -> list[float]:
        """The measured times."""
        return list(self.seconds)

    @classmethod
    def from_document(cls, document: list[float]) -> Self:
        """Read what ``to_document`` wrote."""
        return cls(tuple(document))
