"""Latency of a run from the latencies of its stages: the longest path per sample, by topological recursion.

Never by listing paths: 25 diamonds in a row have 2²⁵ of them. An ``all`` edge waits for the parent's last item. An
``item`` edge lets item *i* start when the parent's item *i* is done, so the two stages run as a pipeline: with the
parent's calls in ``w_p`` waves and the child's in ``w`` waves,

    begin  = max(all parents' finish, item parents' first result)
    finish = max(begin + L, max over item parents (finish_p + (L − s) / w))
    first  = begin + s + (L − s) / w

where ``s`` is what of ``L`` its workers took to start. The child can't end before it did all of its work from its first
input on, nor before one more wave after the last input. It is exact for one bottleneck stage and equal waves; workers
that pull bundles as they get free stay within about a wave of it (tests compare it with a discrete-event simulation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefect_slo.workflow import Edge, Workflow

Samples = NDArray[Any]


@dataclass(frozen=True)
class Progress:
    """How far a stage is, per sample.

    Attributes:
        first: When its first results are there, shape ``(n_samples,)`` or any that broadcasts.
        finish: When its last item is done.
    """

    first: Samples
    finish: Samples


def advance(
    after: tuple[Edge, ...],
    latency_s: Samples,
    parents: Mapping[str, Progress],
    waves: Samples | float = 1.0,
    start_s: Samples | float = 0.0,
) -> Progress:
    """Progress of a stage, given that of its parents.

    Args:
        after: Its dependencies.
        latency_s: How long it takes once it can run without waiting for input.
        parents: Progress of at least its parents.
        waves: How many calls its busiest worker makes one after another; 1 where its results come all at once.
        start_s: Of its latency, what passes before its first call, as its workers have to start.
    """
    ready = [parents[edge.parent].first if edge.kind == "item" else parents[edge.parent].finish for edge in after]
    begin: Samples | float = reduce(np.maximum, ready) if ready else 0.0
    finish: Samples = begin + latency_s
    if isinstance(waves, (float, np.floating)) and waves == 1 and all(edge.kind == "all" for edge in after):
        return Progress(finish, finish)
    last_wave = (latency_s - start_s) / waves
    for edge in after:
        if edge.kind == "item":
            finish = np.maximum(finish, parents[edge.parent].finish + last_wave)
    return Progress(begin + start_s + last_wave, finish)


def makespan(
    workflow: Workflow,
    latency_s: Mapping[str, Samples],
    *,
    waves: Mapping[str, Samples | float] | None = None,
    start_s: Mapping[str, Samples | float] | None = None,
    driver_s: Samples | float = 0.0,
) -> Samples:
    """Latency of the run, shape ``(n_samples,)``.

    Args:
        workflow: The graph.
        latency_s: Draws of every stage, shape ``(n_samples,)`` each; 0 where a branch was not taken.
        waves: See ``advance``; 1 for stages that are missing.
        start_s: See ``advance``; 0 for stages that are missing.
        driver_s: Time of the flow function itself, beyond the longest path.
    """
    waves, start_s = waves or {}, start_s or {}
    progress: dict[str, Progress] = {}
    for name in workflow.order:
        progress[name] = advance(
            workflow[name].after, latency_s[name], progress, waves.get(name, 1.0), start_s.get(name, 0.0)
        )
    ends = [progress[name].finish for name in workflow.order if not workflow.children(name)]
    total: Samples = np.maximum.reduce(ends) + driver_s
    return total


def stages_run(
    workflow: Workflow, chances: Mapping[str, float], uniforms: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.bool_]]:
    """Which stages run, per sample: a stage runs by its chance, given that at least one of its parents did.

    Args:
        workflow: The graph.
        chances: Probability of each stage, given its parents.
        uniforms: One independent draw in [0, 1) per stage and sample.
    """
    ran: dict[str, NDArray[np.bool_]] = {}
    for name in workflow.order:
        parents = workflow[name].parents
        reached = np.logical_or.reduce([ran[parent] for parent in parents]) if parents else np.True_
        ran[name] = (uniforms[name] < chances[name]) & reached
    return ran
