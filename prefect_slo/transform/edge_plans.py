"""How data passes along every edge of a plan: what each way would take, which is taken, and when another would be.

Where stages run is the plan's already: workers of this machine are together, workers of a pool elsewhere each on their
own. What is left to choose is the way of each edge, among those that there are between its pools, by what these say of
themselves (``Pool.handing_on``):

    machine     through the flow's own process (``inline``), or once into memory that all map (``machine``)
    objects     as it is (``machine``)
    storage     in the request and the reply (``inline``) while they fit, over storage (``remote``) beyond: stored once,
                and read by each call that takes it; through the flow's process as well where the other pool does not
                pass over the same storage (``Pool.storage``), or where the flow takes a result apart
    requests    in the request and the reply (``inline``): what does not fit runs in the flow's process
    workers     from worker to worker of one pool (``direct``), or with the call and its result (``inline``)
    calls       with the call and its result (``inline``), whichever way the pool's bundles go

What a task asks of Prefect's engine is not known here: a result that is persisted or cached, one of a task with hooks,
and what batched tasks take come to the flow's process all the same, which takes longer than is said of their edges.

Until the size of what a stage hands on can be told from the size of a run's input, an edge goes the way that bears any
size: over storage, from worker to worker, or through the flow's process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from prefect_slo.edges import EdgePlan, Method, Way
from prefect_slo.observation import StageRuns
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.pricing import price_list
from prefect_slo.resources import HandingOn
from prefect_slo.transform.crossovers import words
from prefect_slo.transform.learned import MB, Floats, Sizes, broadcasts, learn_links, learn_sizes
from prefect_slo.transform.passing import DataStage, Links, Place, Transfer, costs_of, message_mb, methods_of
from prefect_slo.workflow import Stage, Workflow

HERE = Links(
    direct_mb_s=300, up_mb_s=300, down_mb_s=300, inline_mb_s=300, inline_s=1e-3, inline_limit_mb=inf,
    machine_mb_s=250, machine_s=2e-3,
)  # fmt: skip
"""Worker processes of one machine: pickled, sent and unpickled (``inline``), or received once and written once
(``machine``), as measured on two cores."""

ELSEWHERE = Links(
    direct_mb_s=80, up_mb_s=85, down_mb_s=85, inline_mb_s=100, inline_s=2e-3, remote_s=0.02, inline_limit_mb=4.4,
    relay_mb_s=400, put_usd=5e-6, get_usd=4e-7,
)  # fmt: skip
"""Functions in one region with S3: one connection has about 85 MB/s, a small object takes 10 to 30 ms."""

CLUSTER = Links(
    direct_mb_s=100, up_mb_s=1, down_mb_s=1, inline_mb_s=100, direct_s=4e-3, inline_s=2e-3, inline_limit_mb=inf,
)  # fmt: skip
"""Workers of one Dask or Ray cluster, until its runs show more: each has a link of its own, and the flow's process one
for them all; to read a result there takes a round trip more."""

THREADS = Links(direct_mb_s=1, up_mb_s=1, down_mb_s=1, inline_mb_s=1)
"""Threads of one process hand on objects as they are."""

_LOCAL: Mapping[str, HandingOn] = {"default": "machine", "process": "machine", "thread": "objects"}
"""What the pools of this machine do that declare nothing."""

_HERE = ("machine", "objects")


@dataclass(frozen=True)
class _Pools:
    """What pools do with large results, and how fast data passes on this machine, on a cluster, and over storage."""

    declared: Mapping[str, HandingOn]
    storage: Mapping[str, str]
    here: Links = HERE
    cluster: Links = CLUSTER
    elsewhere: Links = ELSEWHERE

    def of(self, stage: StagePlan) -> HandingOn:
        """What the pool of a stage does."""
        return self.declared.get(stage.pool) or _LOCAL.get(stage.pool, "calls")

    def share_storage(self, one: str, other: str) -> bool:
        """Whether what lies on the storage of a pool can be read by workers of another."""
        return one == other or (one in self.storage and self.storage[one] == self.storage.get(other))


@dataclass(frozen=True)
class _Between:
    """What there is between two pools.

    Attributes:
        links: How fast data passes.
        ways: Methods.
        unknown: The one that bears any size.
        request_mb: What fits into a request, where one of them takes and gives nothing but those.
    """

    links: Links
    ways: tuple[Method, ...]
    unknown: Method
    relayed: Links | None = None
    request_mb: float = inf

    def of_parts(self) -> _Between:
        """The same for a result that the flow takes apart: parts lie nowhere else, they travel with their calls."""
        if "inline" not in self.ways:
            return self
        ways = tuple(way for way in self.ways if way not in ("machine", "direct"))
        unknown = self.unknown if self.unknown in ways else "inline"
        return replace(self, links=self.relayed or self.links, ways=ways, unknown=unknown)


def with_passing(plan: Plan, workflow: Workflow, runs: StageRuns) -> Plan:
    """The plan with how data passes along each of its edges; edges of which no run has shown any bytes are left out.

    Args:
        plan: Sizes and pools of the stages.
        workflow: The graph.
        runs: What was measured of it: bytes, and times of reading and writing.
    """
    pools = _learned(_pools(workflow), plan, workflow, runs)
    given = {stage.name: _given(stage.name, runs) for stage in workflow.stages}
    passing = [
        edge
        for sink in workflow.stages
        if sink.name in plan.stages
        for edge in _into(sink, plan, workflow, runs, given, pools)
    ]
    return replace(plan, passing=tuple(passing))


def _into(
    sink: Stage,
    plan: Plan,
    workflow: Workflow,
    runs: StageRuns,
    given: Mapping[str, Sizes],
    pools: _Pools,
) -> list[EdgePlan]:
    """The edges into a stage."""
    parents = [workflow[name] for name in sink.parents if name in plan.stages and given[name].runs]
    sizes = [given[parent.name].at(_typical(parent.name, runs)) for parent in parents]
    rows = runs.of_stage(sink.name)
    taken_mb = float(np.median(rows["bytes_in"] / MB)) if len(rows) else 0.0
    item_wise = {edge.parent for edge in sink.after if edge.kind == "item"}
    calls = _calls(sink, runs)
    all_of_it = broadcasts(taken_mb, tuple(sizes), calls)
    planned = []
    for parent, size_mb, broadcast in zip(parents, sizes, all_of_it, strict=True):
        if size_mb <= 0:
            continue
        between = _between(plan[parent.name], plan[sink.name], pools)
        if calls > 1 and not broadcast and parent.name not in item_wise:
            between = between.of_parts()
        ends = (_end(parent, plan, runs, pools), _end(sink, plan, runs, pools))
        edge = Transfer(parent.name, sink.name, size_mb, broadcast and parent.name not in item_wise, between.ways)
        planned.append(_chosen(edge, ends, between, given[parent.name]))
    return planned


def _chosen(edge: Transfer, ends: tuple[DataStage, DataStage], between: _Between, sizes: Sizes) -> EdgePlan:
    source, sink = ends
    at = (source.places[0], sink.places[0])
    seconds = methods_of(source, sink, edge, between.links, at)
    usd = costs_of(source, sink, edge, between.links, seconds)
    ways = sorted((Way(method, seconds[method], usd[method]) for method in seconds), key=lambda way: way.seconds)
    chosen = ways[0]
    if not sizes.converged:
        chosen = next((way for way in ways if way.method == between.unknown), chosen)
    others = tuple(way for way in ways if way is not chosen)
    why = words(edge, source, sink, between.links, at, chosen.method)
    message = message_mb(source, sink, edge)
    if message > between.request_mb:
        why = (
            f"{chosen.method}: {message:.3g} MB do not fit into a request of {between.request_mb:g} MB, so that such "
            "calls run in the flow's process; give the pool a bucket"
        )
    elif not sizes.converged and between.request_mb == inf:
        why = f"{chosen.method}, which bears any size: {_unknown(sizes)}"
    return EdgePlan(edge.source, edge.sink, chosen, edge.size_mb, edge.broadcast, others, why)


def _unknown(sizes: Sizes) -> str:
    if sizes.error == inf:
        return f"{sizes.runs} runs say too little of what is handed on"
    return f"what is handed on is predicted with an error of {sizes.error:.0%} after {sizes.runs} runs"


def _between(source: StagePlan, sink: StagePlan, pools: _Pools) -> _Between:
    ends = (pools.of(source), pools.of(sink))
    if ends == ("objects", "objects"):
        return _Between(THREADS, ("machine",), "machine")
    if all(end in _HERE for end in ends):
        ways: tuple[Method, ...] = ("machine", "inline") if ends[1] == "machine" else ("inline",)
        return _Between(pools.here, ways, "inline")
    anything = replace(pools.elsewhere, inline_limit_mb=inf)
    if "requests" in ends:
        return _Between(anything, ("inline",), "inline", request_mb=pools.elsewhere.inline_limit_mb)
    if "storage" in ends:
        shared = ends == ("storage", "storage") and pools.share_storage(source.pool, sink.pool)
        past = replace(pools.elsewhere, relay_mb_s=inf) if shared else pools.elsewhere
        return _Between(past, ("inline", "remote"), "remote", relayed=pools.elsewhere)
    if source.pool == sink.pool and ends[0] == "workers":
        return _Between(pools.cluster, ("direct", "inline"), "direct")
    return _Between(anything, ("inline",), "inline")


def _end(stage: Stage, plan: Plan, runs: StageRuns, pools: _Pools) -> DataStage:
    """A stage of the plan as data passes through it."""
    own = plan[stage.name]
    size, local = own.size, pools.of(own) in _HERE
    menu = stage.menu
    prices = next((pool.prices for pool in menu.pools if pool.name == own.pool and pool.prices), menu.prices)
    rate = price_list(prices).rate(size.vcpus, size.memory_mb, size.gpu, size.hardware)
    calls = max(_calls(stage, runs), 1)
    place: Place = "together" if local else "spread"
    return DataStage(stage.name, own.workers, 0.0, own.workers, stage.probability, calls, rate, place)


def _calls(stage: Stage, runs: StageRuns) -> int:
    if stage.items:
        return stage.items
    items = runs.of_stage(stage.name)["items"]
    seen = items[items > 0]
    return int(np.median(seen)) if len(seen) else 0


def _given(stage: str, runs: StageRuns) -> Sizes:
    """What a stage hands on, by the size of a run's input."""
    rows = _with_bytes(stage, runs)
    return learn_sizes(rows["bytes_out"] / MB, _features(rows))


def _typical(stage: str, runs: StageRuns) -> Floats:
    features = _features(_with_bytes(stage, runs))
    return np.median(features, axis=0) if len(features) else np.zeros(features.shape[1])


def _with_bytes(stage: str, runs: StageRuns) -> StageRuns:
    rows = runs.of_stage(stage)
    return rows.select(np.nan_to_num(rows["bytes_out"]) > 0)


def _features(rows: StageRuns) -> Floats:
    """Columns of features of the input, shape ``(n_rows, n_features)``: numbers that every row has."""
    columns = [
        column.astype(float)
        for column in rows.extra.values()
        if column.dtype.kind in "if" and np.isfinite(column.astype(float)).all()
    ]
    return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))


def _pools(workflow: Workflow) -> _Pools:
    """What the pools on its menus declare."""
    every = [pool for stage in workflow.stages for pool in stage.menu.pools]
    return _Pools(
        {pool.name: pool.handing_on for pool in every if pool.handing_on is not None},
        {pool.name: pool.storage for pool in every if pool.storage is not None},
    )


def _learned(pools: _Pools, plan: Plan, workflow: Workflow, runs: StageRuns) -> _Pools:
    """The same with speeds as runs show them, each of its own kinds of machine."""
    hardware = runs["hardware"].astype(str)
    own = [(pools.of(stage), stage.size.kind) for stage in plan.stages.values()]
    offered = [
        (pool.handing_on, size.kind) for stage in workflow.stages for pool in stage.menu.pools for size in pool.sizes
    ]
    here = np.isin(hardware, sorted({"cpu", "thread", *(kind for doing, kind in own if doing in _HERE)}))
    workers = np.isin(hardware, sorted({kind for doing, kind in (*own, *offered) if doing == "workers"}))
    return replace(
        pools,
        here=learn_links(runs.select(here), HERE, "inline"),
        cluster=learn_links(runs.select(workers & ~here), CLUSTER, "direct"),
        elsewhere=learn_links(runs.select(~here & ~workers), ELSEWHERE, "remote"),
    )
