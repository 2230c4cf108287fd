"""How data passes from stage to stage: on one machine, from worker to worker, over storage, or in the request.

After SONIC (Mahgoub et al., USENIX ATC 2021). Each stage runs *together* on one machine, in ``⌈n/slots⌉`` waves, or
*spread*, each worker on a machine of its own. Between two stages that hand on ``D`` megabytes

    machine   r_m + D / b_m                              both stages together; b_m = ∞ where memory is shared as it is
    direct    r_d + max(sent by a source, got by a sink) / b_d      every source and every sink has a link of its own
    remote    2·r_s + (part of a source) / b_up + (got by a sink) / b_down  [+ 2·D / b_relay]
    inline    r_i + (D + all that sinks get) / b_i       where a message fits the service's limit

where a sink gets its share of ``D``, or all of it with each of its calls when it is broadcast; a source then sends it
once to each sink. Given where stages run, the best method of an edge does not depend on other edges. On a chain times
add up, and the best places are found by Viterbi's recursion, exactly; on another graph the longest path counts, and
places are enumerated. Stages that not every run comes by, and edges to them, count by their probability: what is least
is the longest path of expected times, which on a graph with branches is no more than the expected longest path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal

from prefect_slo.edges import METHODS, Method
from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.units import finite, positive, whole

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
        machine_mb_s: Through memory that the processes of one machine share; infinite where nothing is copied.
        machine_s: Before the first byte of that.
        machine_limit_mb: What fits into that memory.
        put_usd: Of writing one object into storage.
        get_usd: Of reading one.
        relay_mb_s: Through the process that runs the flow, where what is stored passes by there too: once as it comes
            in, and once as it is stored for all that take it.
        part_mb: Size of an object, or of a part of one that is written or read by a request of its own.
    """

    direct_mb_s: float
    up_mb_s: float
    down_mb_s: float
    inline_mb_s: float
    direct_s: float = 0.0
    remote_s: float = 0.0
    inline_s: float = 0.0
    inline_limit_mb: float = 4.5
    machine_mb_s: float = math.inf
    machine_s: float = 0.0
    machine_limit_mb: float = math.inf
    put_usd: float = 0.0
    get_usd: float = 0.0
    relay_mb_s: float = math.inf
    part_mb: float = 8.0

    def __post_init__(self) -> None:
        for name in ("direct_mb_s", "up_mb_s", "down_mb_s", "inline_mb_s", "part_mb"):
            positive(getattr(self, name), f"links.{name}")
        for name in ("machine_mb_s", "machine_limit_mb", "relay_mb_s", "inline_limit_mb"):
            if not getattr(self, name) > 0:
                raise InvalidValue(f"links.{name}", getattr(self, name), "a number above 0, or infinity")
        for name in ("direct_s", "remote_s", "inline_s", "machine_s", "put_usd", "get_usd"):
            if finite(getattr(self, name), f"links.{name}") < 0:
                raise InvalidValue(f"links.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class DataStage:
    """A stage as data passes through it.

    Attributes:
        name: Its name.
        workers: How many run at once, spread.
        item_s: Time of a worker's work.
        slots: Workers that one machine has CPU and memory for; with 0 it can't run together.
        probability: Chance that a run comes by.
        calls: Messages that it takes and gives; by default one for each worker.
        usd_s: Cost of a worker a second.
        only: The place where it runs, where that isn't to be chosen.
    """

    name: str
    workers: int
    item_s: float
    slots: int = 1
    probability: float = 1.0
    calls: int = 0
    usd_s: float = 0.0
    only: Place | None = None

    def __post_init__(self) -> None:
        whole(self.workers, f"{self.name}.workers")
        whole(self.slots, f"{self.name}.slots", least=0)
        if not whole(self.calls, f"{self.name}.calls", least=0):
            object.__setattr__(self, "calls", self.workers)
        if self.only == "together" and not self.slots:
            raise InvalidValue(f"{self.name}.slots", self.slots, "at least 1 where all its workers share a machine")
        if not 0 < finite(self.probability, f"{self.name}.probability") <= 1:
            raise InvalidValue(f"{self.name}.probability", self.probability, "a number in (0, 1]")

    @property
    def places(self) -> tuple[Place, ...]:
        """Where it may run."""
        if self.only is not None:
            return (self.only,)
        return PLACES if self.slots else ("spread",)

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
        broadcast: Whether every call of the sink needs all of it, and not just a share.
        ways: Methods that there are.
    """

    source: str
    sink: str
    size_mb: float
    broadcast: bool = False
    ways: tuple[Method, ...] = METHODS


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
        if not edge.size_mb > 0:
            raise InvalidValue("transfer.size_mb", edge.size_mb, "a number above 0")
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
    copies = sink.calls if edge.broadcast else 1  # of all of it, over the calls of the sink
    each = max(copies / sink.workers, 1) if edge.broadcast else 1  # a spread worker takes one for each of its calls
    got = edge.size_mb * (each if edge.broadcast else 1 / sinks)
    part = edge.size_mb / sources
    sent = part * sinks if edge.broadcast else part
    found: dict[Method, float] = {}
    if at == ("together", "together") and edge.size_mb <= links.machine_limit_mb:
        found["machine"] = links.machine_s + edge.size_mb / links.machine_mb_s
    found["direct"] = links.direct_s + max(sent, got) / links.direct_mb_s
    relayed = 2 * edge.size_mb / links.relay_mb_s
    found["remote"] = 2 * links.remote_s + part / links.up_mb_s + got / links.down_mb_s + relayed
    if message_mb(source, sink, edge) <= links.inline_limit_mb:
        found["inline"] = links.inline_s + edge.size_mb * (1 + copies) / links.inline_mb_s
    return {method: sink.probability * seconds for method, seconds in found.items() if method in edge.ways}


def costs_of(
    source: DataStage, sink: DataStage, edge: Transfer, links: Links, seconds: Mapping[Method, float]
) -> dict[Method, float]:
    """Expected US dollars of an edge by method: workers of the sink that wait, and requests to storage."""
    parts = max(math.ceil(edge.size_mb / source.calls / links.part_mb), 1) * source.calls
    taken = edge.size_mb if edge.broadcast else edge.size_mb / sink.calls
    reads = max(math.ceil(taken / links.part_mb), 1) * sink.calls
    requests = sink.probability * (parts * links.put_usd + reads * links.get_usd)
    waiting = sink.workers * sink.usd_s
    return {method: s * waiting + (requests if method == "remote" else 0.0) for method, s in seconds.items()}


def slots_of(machine: Size, worker: Size, *, held_mb: float = 0.0) -> int:
    """Workers that a machine has CPU and memory for, beside data of ``held_mb``; 0 where it can't have one."""
    return max(min(int(machine.vcpus / worker.vcpus), int((machine.memory_mb - held_mb) / worker.memory_mb)), 0)


def message_mb(source: DataStage, sink: DataStage, edge: Transfer) -> float:
    """The largest message of an edge: a result of the source, or an argument of the sink."""
    return max(edge.size_mb / source.calls, edge.size_mb if edge.broadcast else edge.size_mb / sink.calls)


def direct_until(edge: Transfer, links: Links) -> float:
    """The fan-out beyond which storage passes a broadcast from one machine faster than that machine itself.

    From ``r_d + f·D/b_d = 2·r_s + D/b_up + D/b_down``.
    """
    storage_s = 2 * links.remote_s + edge.size_mb / links.up_mb_s + edge.size_mb / links.down_mb_s
    return (storage_s - links.direct_s) * links.direct_mb_s / edge.size_mb


def _viterbi(stages: Sequence[DataStage], edges: Sequence[Transfer], links: Links) -> dict[str, Place]:
    """Places of least total time on a chain: for each place of a stage, the best way to get there."""
    best: dict[Place, tuple[float, tuple[Place, ...]]] = {
        place: (stages[0].time_s(place), (place,)) for place in stages[0].places
    }
    for (source, sink), edge in zip(pairwise(stages), edges, strict=True):
        best = {
            place: min(
                (
                    total + _fastest(source, sink, edge, links, (before, place)) + sink.time_s(place),
                    (*way, place),
                )
                for before, (total, way) in best.items()
            )
            for place in sink.places
        }
    _, way = min(best.values())
    return dict(zip((stage.name for stage in stages), way, strict=True))


def _enumerated(stages: Sequence[DataStage], transfers: Sequence[Transfer], links: Links) -> dict[str, Place]:
    """Places of the shortest longest path, by trying all; each edge takes its best method."""
    by_name = {stage.name: stage for stage in stages}
    fastest = {
        (edge, at): _fastest(by_name[edge.source], by_name[edge.sink], edge, links, at)
        for edge in transfers
        for at in product(PLACES, PLACES)
    }

    def latency_s(places: Mapping[str, Place]) -> float:
        edge_s = {(e.source, e.sink): fastest[e, (places[e.source], places[e.sink])] for e in transfers}
        return _longest(stages, places, edge_s)

    names = [stage.name for stage in stages]
    every = (dict(zip(names, places, strict=True)) for places in product(*(stage.places for stage in stages)))
    return min(every, key=latency_s)


def _fastest(source: DataStage, sink: DataStage, edge: Transfer, links: Links, at: tuple[Place, Place]) -> float:
    return min(methods_of(source, sink, edge, links, at).values(), default=math.inf)


def _passing(
    places: Mapping[str, Place], by_name: Mapping[str, DataStage], transfers: Sequence[Transfer], links: Links
) -> Passing:
    alternatives = {
        (edge.source, edge.sink): methods_of(
            by_name[edge.source], by_name[edge.sink], edge, links, (places[edge.source], places[edge.sink])
        )
        for edge in transfers
    }
    for edge, seconds in alternatives.items():
        if not seconds:
            raise InvalidValue("transfer", edge, "a method that its places and the size of its messages allow")
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
