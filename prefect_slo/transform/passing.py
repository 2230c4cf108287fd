"""How data passes from stage to stage: on one machine, from worker to worker, over storage, or in the request.

After SONIC (Mahgoub et al., USENIX ATC 2021). Each stage runs *together* on one machine, in ``⌈n/slots⌉`` waves, or
*spread*, each worker on a machine of its own. Between two stages that hand on ``D`` megabytes

    machine   0                                          both stages together
    direct    r_d + max(sent by a source, got by a sink) / b_d      every source and every sink has a link of its own
    remote    2·r_s + (part of a source) / b_up + (got by a sink) / b_down
    inline    r_i + (D + all that sinks get) / b_i       where a message fits the service's limit

where a sink gets its share of ``D``, or all of it when it is broadcast; a source then sends it once to each sink. Given
where stages run, the best method of an edge does not depend on other edges. On a chain times add up, and the best
places are found by Viterbi's recursion, exactly; on another graph the longest path counts, and places are enumerated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal

from prefect_slo.errors import InvalidValue
from prefect_slo.units import finite, positive, whole

Method = Literal["machine", "direct", "remote", "inline"]
Place = Literal["together", "spread"]
PLACES: tuple[Place, Place] = ("together", "spread")
ENUMERATED = 16
"""Stages of a graph that is no chain, at most: 2¹⁶ placements take about a second."""


@dataclass(frozen=True)
class Links:
    """How fast data passes, in megabytes and seconds.

    Attributes:
        direct_mb_s: From one machine to another.
        up_mb_s: Into storage, by one machine.
        down_mb_s: Out of storage, by one machine.
        inline_mb_s: Through the process that makes the requests; all of them together.
        direct_s: Before the first byte of a direct transfer.
        remote_s: Of one operation of storage.
        inline_s: Of a request.
        inline_limit_mb: Largest message of a request.
    """

    direct_mb_s: float
    up_mb_s: float
    down_mb_s: float
    inline_mb_s: float
    direct_s: float = 0.0
    remote_s: float = 0.0
    inline_s: float = 0.0
    inline_limit_mb: float = 4.5

    def __post_init__(self) -> None:
        for name in ("direct_mb_s", "up_mb_s", "down_mb_s", "inline_mb_s"):
            positive(getattr(self, name), f"links.{name}")
        for name in ("direct_s", "remote_s", "inline_s", "inline_limit_mb"):
            if finite(getattr(self, name), f"links.{name}") < 0:
                raise InvalidValue(f"links.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class DataStage:
    """A stage as data passes through it.

    Attributes:
        name: Its name.
        workers: How many run at once, spread.
        item_s: Time of a worker's work.
        slots: Workers that one machine has CPU and memory for.
        probability: Chance that a run comes by.
    """

    name: str
    workers: int
    item_s: float
    slots: int = 1
    probability: float = 1.0

    def __post_init__(self) -> None:
        whole(self.workers, f"{self.name}.workers")
        whole(self.slots, f"{self.name}.slots")
        if not 0 < finite(self.probability, f"{self.name}.probability") <= 1:
            raise InvalidValue(f"{self.name}.probability", self.probability, "a number in (0, 1]")

    def time_s(self, place: Place) -> float:
        """Expected time of its work at a place."""
        waves = math.ceil(self.workers / self.slots) if place == "together" else 1
        return self.probability * waves * self.item_s


@dataclass(frozen=True)
class Transfer:
    """Data that one stage hands on to another.

    Attributes:
        source: Name of the stage that makes it.
        sink: Name of the stage that takes it.
        size_mb: All that the source makes.
        broadcast: Whether every worker of the sink needs all of it, and not just a share.
    """

    source: str
    sink: str
    size_mb: float
    broadcast: bool = False


@dataclass(frozen=True)
class Passing:
    """How data passes in a workflow.

    Attributes:
        latency_s: Expected time of the longest path.
        places: By stage.
        methods: By edge, as ``(source, sink)``.
        edge_s: Expected time of each edge.
        alternatives: What each edge would take by every method that its places allow.
    """

    latency_s: float
    places: Mapping[str, Place]
    methods: Mapping[tuple[str, str], Method]
    edge_s: Mapping[tuple[str, str], float]
    alternatives: Mapping[tuple[str, str], Mapping[Method, float]]


def best_passing(stages: Sequence[DataStage], transfers: Sequence[Transfer], links: Links) -> Passing:
    """The places and methods of least expected latency.

    Args:
        stages: In topological order.
        transfers: Edges between them.
        links: How fast data passes.

    Raises:
        InvalidValue: An edge that is none, or a graph that is no chain with more than ``ENUMERATED`` stages.
    """
    by_name = {stage.name: stage for stage in stages}
    order = {stage.name: at for at, stage in enumerate(stages)}
    for edge in transfers:
        if order.get(edge.source, len(stages)) >= order.get(edge.sink, -1):
            raise InvalidValue("transfer", (edge.source, edge.sink), "two stages, the source before the sink")
    chain = [(a.name, b.name) for a, b in pairwise(stages)]
    if sorted(chain) == sorted((edge.source, edge.sink) for edge in transfers):
        along = {(edge.source, edge.sink): edge for edge in transfers}
        places = _viterbi(stages, [along[pair] for pair in chain], links)
    elif len(stages) <= ENUMERATED:
        places = _enumerated(stages, transfers, links)
    else:
        raise InvalidValue("stages", len(stages), f"a chain, or at most {ENUMERATED} stages")
    return _passing(places, by_name, transfers, links)


def methods_of(
    source: DataStage, sink: DataStage, edge: Transfer, links: Links, at: tuple[Place, Place]
) -> dict[Method, float]:
    """Expected seconds of an edge by every method that these places of source and sink allow."""
    sources = 1 if at[0] == "together" else source.workers
    sinks = 1 if at[1] == "together" else sink.workers
    got = edge.size_mb if edge.broadcast else edge.size_mb / sinks
    part = edge.size_mb / sources
    sent = part * sinks if edge.broadcast else part
    found: dict[Method, float] = {}
    if at == ("together", "together"):
        found["machine"] = 0.0
    found["direct"] = links.direct_s + max(sent, got) / links.direct_mb_s
    found["remote"] = 2 * links.remote_s + part / links.up_mb_s + got / links.down_mb_s
    message = max(edge.size_mb / source.workers, edge.size_mb if edge.broadcast else edge.size_mb / sink.workers)
    if message <= links.inline_limit_mb:
        taken = edge.size_mb * (sink.workers if edge.broadcast else 1)
        found["inline"] = links.inline_s + (edge.size_mb + taken) / links.inline_mb_s
    return {method: sink.probability * seconds for method, seconds in found.items()}


def direct_until(edge: Transfer, links: Links) -> float:
    """The fan-out beyond which storage passes a broadcast from one machine faster than that machine itself.

    From ``r_d + f·D/b_d = 2·r_s + D/b_up + D/b_down``.
    """
    storage_s = 2 * links.remote_s + edge.size_mb / links.up_mb_s + edge.size_mb / links.down_mb_s
    return (storage_s - links.direct_s) * links.direct_mb_s / edge.size_mb


def _viterbi(stages: Sequence[DataStage], edges: Sequence[Transfer], links: Links) -> dict[str, Place]:
    """Places of least total time on a chain: for each place of a stage, the best way to get there."""
    best: dict[Place, tuple[float, tuple[Place, ...]]] = {
        place: (stages[0].time_s(place), (place,)) for place in PLACES
    }
    for (source, sink), edge in zip(pairwise(stages), edges, strict=True):
        best = {
            place: min(
                (
                    total + min(methods_of(source, sink, edge, links, (before, place)).values()) + sink.time_s(place),
                    (*way, place),
                )
                for before, (total, way) in best.items()
            )
            for place in PLACES
        }
    _, way = min(best.values())
    return dict(zip((stage.name for stage in stages), way, strict=True))


def _enumerated(stages: Sequence[DataStage], transfers: Sequence[Transfer], links: Links) -> dict[str, Place]:
    """Places of the shortest longest path, by trying all; each edge takes its best method."""
    by_name = {stage.name: stage for stage in stages}
    fastest = {
        (edge, at): min(methods_of(by_name[edge.source], by_name[edge.sink], edge, links, at).values())
        for edge in transfers
        for at in product(PLACES, PLACES)
    }

    def latency_s(places: Mapping[str, Place]) -> float:
        edge_s = {(e.source, e.sink): fastest[e, (places[e.source], places[e.sink])] for e in transfers}
        return _longest(stages, places, edge_s)

    names = [stage.name for stage in stages]
    every = (dict(zip(names, places, strict=True)) for places in product(PLACES, repeat=len(names)))
    return min(every, key=latency_s)


def _passing(
    places: Mapping[str, Place], by_name: Mapping[str, DataStage], transfers: Sequence[Transfer], links: Links
) -> Passing:
    alternatives = {
        (edge.source, edge.sink): methods_of(
            by_name[edge.source], by_name[edge.sink], edge, links, (places[edge.source], places[edge.sink])
        )
        for edge in transfers
    }
    methods = {edge: min(seconds, key=lambda method: seconds[method]) for edge, seconds in alternatives.items()}
    edge_s = {edge: alternatives[edge][method] for edge, method in methods.items()}
    return Passing(_longest(tuple(by_name.values()), places, edge_s), places, methods, edge_s, alternatives)


def _longest(
    stages: Sequence[DataStage], places: Mapping[str, Place], edge_s: Mapping[tuple[str, str], float]
) -> float:
    """Time of the longest path through stages in topological order."""
    done: dict[str, float] = {}
    for stage in stages:
        ready = max(
            (done[source] + seconds for (source, sink), seconds in edge_s.items() if sink == stage.name), default=0.0
        )
        done[stage.name] = ready + stage.time_s(places[stage.name])
    return max(done.values(), default=0.0)
