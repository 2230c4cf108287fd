r"""Lagrange multipliers of the latency constraint, as a flow on the graph, one per scenario.

A run is the longest path of an expanded graph (``network``). For a flow of size F from source to sink, ``F · makespan
≥ Σ arcs flow · length``, so the bound of a scenario splits into a sum over stages and each stage picks its option
alone:

    score ≥ Σ_i min_o [α·E[C_io] + μ_io·L_ios + ν·C_ios] + F·driver_s − λ·T − ν·B,      F = β + λ

with ``μ_io = flow(S_i→E_i) + piece_io·(flow(S_i→H_i) + Σ_p flow(E_p→E_i))``, α and β the weights of cost and latency.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.network import Network
from prefect_slo.planner.problem import Goal, Problem

Floats = NDArray[np.floating]

ASCENT_STEPS = 24
"""Steps of the dual ascent; the bound gains under 0.05 % from 24 to 60 on random graphs of 8 stages."""


@dataclass(frozen=True, eq=False)
class Multipliers:
    """Multipliers per scenario.

    Attributes:
        network: The graph that the flow runs on.
        flow: ``(n_arcs, n_columns)``, objective units per second.
        latency_price: λ, ``(n_columns,)``: objective units per second of the latency bound.
        cost_price: ν, ``(n_columns,)``: objective units per US dollar of the cost bound.
    """

    network: Network
    flow: Floats
    latency_price: Floats
    cost_price: Floats

    def full(self, i: int) -> Floats:
        """Flow through a stage's whole latency."""
        return np.asarray(self.flow[self.network.into[i]["full"][0]])

    def price(self, i: int, piece: Floats) -> Floats:
        """Objective units per second of a stage, ``(n_columns,)``, or by option where its waves are priced apart."""
        into = self.network.into[i]
        if not into["piece"] and not into["tail"]:
            return self.full(i)
        return np.asarray(self.full(i) + piece[:, None] * self.flow[[*into["piece"], *into["tail"]]].sum(axis=0))

    def constant(self, problem: Problem, goal: Goal) -> Floats:
        """What a scenario's bound holds beside the sum over stages, ``(n_columns,)``."""
        total = (goal.latency_weight + self.latency_price) * problem.driver
        if goal.latency_bound_s < inf:
            total = total - self.latency_price * goal.latency_bound_s
        if goal.cost_bound_usd < inf:
            total = total - self.cost_price * goal.cost_bound_usd
        return np.asarray(total)

    def stage(self, problem: Problem, goal: Goal, i: int) -> Floats:
        """What each option of a stage contributes, ``(n_upstream, n_options, n_columns)``."""
        stage = problem.stages[i]
        value = self.price(i, stage.piece) * stage.latency
        if goal.cost_weight:
            value += (goal.cost_weight * stage.mean_cost).astype(np.float32)[:, :, None]
        if goal.cost_bound_usd < inf:
            value += self.cost_price * stage.cost
        return np.asarray(value)


def ascend(
    problem: Problem,
    goal: Goal,
    rows: list[int],
    steps: int = ASCENT_STEPS,
    picks: list[NDArray[np.intp]] | None = None,
) -> Multipliers:
    """Multipliers that raise each scenario's own bound, by dual ascent.

    The prices move by factors that halve whenever the sign of the violation turns; the flow is the running average
    of longest paths (fictitious play). Stages that depend on upstream workers are held at ``rows`` of their tables
    here, which decides how good the multipliers are, never whether their bound is valid.

    Args:
        problem: The scenarios, as columns.
        goal: Objective and bounds.
        rows: By stage, the row of its table.
        steps: Number of steps.
        picks: Where to put what each step picks, ``(n_stages, n_columns)`` option indices.
    """
    network = Network.of(problem.stages)
    columns = problem.n_samples
    open_rows = [np.flatnonzero(mask) for mask in problem.allowed]
    tables = [
        (stage.latency[row][keep], stage.cost[row][keep], stage.mean_cost[row][keep], stage.piece[keep])
        for stage, row, keep in zip(problem.stages, rows, open_rows, strict=True)
    ]
    bounded, budgeted = goal.latency_bound_s < inf, goal.cost_bound_usd < inf
    guess = _exchange_rate(tables, goal)
    price = np.full(columns, guess if bounded else 0.0, dtype=np.float32)
    dearness = np.full(columns, _dearness(tables, goal) if budgeted else 0.0, dtype=np.float32)
    price_step = np.full(columns, 1.4, dtype=np.float32)
    dear_step = price_step.copy()
    price_sign = np.zeros(columns, dtype=np.float32)
    dear_sign = price_sign.copy()
    share = np.zeros((len(network.arcs), columns), dtype=np.float32)
    best = np.full(columns, -np.inf, dtype=np.float32)
    kept = (share.copy(), price.copy(), dearness.copy())
    fastest = [latency.min(axis=0) for latency, *_ in tables]
    _, on = network.longest(fastest, [f * t[3].min() for f, t in zip(fastest, tables, strict=True)])
    share[:] = on
    at = np.arange(columns)
    for step in range(steps):
        size = goal.latency_weight + price
        trial = Multipliers(network, share * size, price, dearness)
        value = trial.constant(problem, goal)
        latency, piece, picked, spent = [], [], [], np.zeros(columns, dtype=np.float32)
        for i, (own, cost, mean, pieces) in enumerate(tables):
            terms = trial.price(i, pieces) * own
            if goal.cost_weight:
                terms += (goal.cost_weight * mean).astype(np.float32)[:, None]
            if budgeted:
                terms += dearness * cost
            pick = terms.argmin(axis=0)
            picked.append(open_rows[i][pick])
            value = value + terms[pick, at]
            latency.append(own[pick, at])
            piece.append(latency[-1] * pieces[pick])
            if budgeted:
                spent += cost[pick, at]
        if picks is not None:
            picks.append(np.stack(picked))
        better = value > best
        best = np.where(better, value, best)
        for keep, new in zip(kept, (share, price, dearness), strict=True):
            keep[..., better] = new[..., better]
        length, on = network.longest(latency, piece)
        if bounded:
            sign = np.sign(length + problem.driver - goal.latency_bound_s)
            price_step = np.where(sign * price_sign < 0, price_step * 0.5, price_step)
            price, price_sign = price * np.exp(sign * price_step), sign
        if budgeted:
            sign = np.sign(spent - goal.cost_bound_usd)
            dear_step = np.where(sign * dear_sign < 0, dear_step * 0.5, dear_step)
            dearness, dear_sign = dearness * np.exp(sign * dear_step), sign
        share += (on - share) * np.float32(2.0 / (step + 4.0))
    share, price, dearness = kept
    return Multipliers(network, share * (goal.latency_weight + price), price, dearness)


def _exchange_rate(tables: list[tuple[Floats, Floats, Floats, Floats]], goal: Goal) -> float:
    """Objective units per second between the fastest and the cheapest options: where the ascent starts."""
    dollars = seconds = 0.0
    for latency, _, mean, _ in tables:
        time = latency.mean(axis=1)
        fast, cheap = int(time.argmin()), int(mean.argmin())
        dollars += float(mean[fast] - mean[cheap])
        seconds += float(time[cheap] - time[fast])
    weight = goal.cost_weight or goal.latency_weight or 1.0
    return max(weight * dollars, 1e-12) / max(seconds, 1e-12)


def _dearness(tables: list[tuple[Floats, Floats, Floats, Floats]], goal: Goal) -> float:
    """Objective units per US dollar, in the same way."""
    if not goal.latency_weight:
        return goal.cost_weight or 1.0
    return goal.latency_weight / _exchange_rate(tables, Goal())
