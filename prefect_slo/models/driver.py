"""Time of the flow function itself: what a run takes beyond the longest path of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
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
        seconds: Of the latest runs, oldest first; as often as they occurred.
        marks: Of the same runs: what was measured of each, in short. A run that is learned twice, or a copy of it under
            another id, counts once; another run that took as long counts too.
    """

    seconds: tuple[float, ...] = ()
    marks: tuple[str, ...] = ()

    def followed_by(self, workflow: Workflow, runs: StageRuns, run_latency_s: Mapping[str, float]) -> Driver:
        """With the runs whose latency is given: latency less the longest path of measured walls, at least 0."""
        measured = dict(zip(self.marks, self.seconds, strict=True))
        for run_id, latency in list(run_latency_s.items())[-_KEPT:]:
            rows = runs.select(runs["run_id"] == str(run_id))
            if not len(rows):
                continue
            walls = dict(zip(rows["stage"].tolist(), rows["wall_s"].tolist(), strict=True))
            calls = np.ceil(np.maximum(rows["items"], 1) / rows["batch"])
            waves = dict(zip(rows["stage"].tolist(), np.ceil(calls / rows["workers"]).tolist(), strict=True))
            times = {stage.name: np.array([walls.get(stage.name, 0.0)]) for stage in workflow.stages}
            started = np.minimum(np.nan_to_num(rows["start_s"]), rows["wall_s"])
            starts = dict(zip(rows["stage"].tolist(), started.tolist(), strict=True))
            path = makespan(workflow, times, waves=waves, start_s=starts)
            rest = max(positive(latency, f"run_latency_s[{run_id}]") - float(path[0]), 0.0)
            measured.setdefault(_mark(float(latency), walls), float(f"{rest:.6g}"))
        latest = list(measured.items())[-_KEPT:]
        return Driver(tuple(seconds for _, seconds in latest), tuple(mark for mark, _ in latest))

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

    def to_document(self) -> list[list[str | float]]:
        """The measured times with their marks, oldest first."""
        return [[mark, seconds] for mark, seconds in zip(self.marks, self.seconds, strict=True)]

    @classmethod
    def from_document(cls, document: Sequence[Sequence[str | float] | float]) -> Self:
        """Read what ``to_document`` wrote; a bare time, as it was once, is read as a run of its own."""
        known = [each if isinstance(each, Sequence) else (f"#{i}", each) for i, each in enumerate(document)]
        return cls(tuple(float(seconds) for _, seconds in known), tuple(str(mark) for mark, _ in known))


def _mark(latency_s: float, walls: Mapping[str, float]) -> str:
    """Short name of what was measured of a run: equal for copies, different for all others."""
    return sha256(repr((latency_s, sorted(walls.items()))).encode()).hexdigest()[:12]
