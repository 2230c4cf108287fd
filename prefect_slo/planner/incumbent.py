"""Good plans fast: the best of a sweep, then moves of one or two stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.batch import admitted, costs, latencies, mean_costs, rows_of
from prefect_slo.planner.network import Network
from prefect_slo.planner.problem import Choice, Goal, Problem, percentile
from prefect_slo.planner.sweep import Sweeps

Floats = NDArray[np.floating]

SAMPLES = 512
"""Samples on which candidates and moves are compared before the best are judged on all."""

MOVES = 96
"""Moves judged at once."""

DOUBT = 0.02
"""Share of a bound by which a move may seem to break it and still be judged: its promise is of first order only."""

PATIENCE = 3
"""Batches of moves without success before a plan counts as polished."""


@dataclass(frozen=True)
class Start:
    """Where a search starts.

    Attributes:
        plan: The best plan found that keeps every bound; ``None`` when none was found.
        reference: The plan, or else the one nearest to the bounds; ``None`` when nothing on the menu fits.
    """

    plan: Choice | None
    reference: Choice | None


def begin(problem: Problem, goal: Goal, extra: Sequence[Choice] = (), *, sweeps: Sweeps | None = None) -> Start:
    """The best plan that sweeps and moves of one or two stages reach.

    Args:
        problem: What is planned.
        goal: Objective and bounds.
        extra: Further plans to start from.
        sweeps: Of the problem, where it is planned for several goals.
    """
    sweeps = sweeps or Sweeps(problem)
    first = sweeps.around()
    candidates = [*dict.fromkeys([*extra, *first])]
    best, score = _best(problem, goal, candidates)
    if best is None:
        return _without_plan(problem, goal, candidates)
    if (again := sweeps.around(best)) is not first:
        best, score = _best(problem, goal, [best, *again])
        assert best is not None
    best, _ = polish(problem, goal, best, score)
    return Start(best, best)


def begin_from(problem: Problem, goal: Goal, candidates: Sequence[Choice]) -> Start:
    """The same, from given plans that keep the structural limits."""
    if not candidates:
        return Start(None, None)
    best, score = _best(problem, goal, candidates)
    if best is None:
        return _without_plan(problem, goal, candidates)
    best, _ = polish(problem, goal, best, score)
    return Start(best, best)


def _without_plan(problem: Problem, goal: Goal, candidates: Sequence[Choice]) -> Start:
    """Where to start when no candidate keeps the bounds: is the fastest that moves can make of them fast enough?"""
    if not candidates:
        return Start(None, None)
    if goal.latency_bound_s == inf or goal.latency_weight:
        return Start(None, _nearest(problem, goal, candidates))
    fastest = begin_from(problem, goal.fastest(), candidates)
    if fastest.plan is None or (score := problem.score(fastest.plan, goal)) == inf:
        return Start(None, fastest.reference)
    best, _ = polish(problem, goal, fastest.plan, score)
    return Start(best, best)


def polish(problem: Problem, goal: Goal, choice: Choice, score: float, rounds: int = 40) -> tuple[Choice, float]:
    """Change one or two stages at a time as long as that improves the score.

    Moves of one or two stages are ranked by the objective that they promise, latency being linear in the stages' times
    at the samples near the percentile; only those that promise to keep the bounds are judged. When they bring nothing
    more, every stage in turn takes its best option given the others, which finds what is not linear (stages off the
    longest path).
    """
    choice, score = _walk(problem, goal, choice, score, rounds)
    settled, value = _settle(problem, goal, choice, score)
    return _walk(problem, goal, settled, value, rounds) if value < score else (choice, score)


def _walk(problem: Problem, goal: Goal, choice: Choice, score: float, rounds: int) -> tuple[Choice, float]:
    for _ in range(rounds):
        better = _move(problem, goal, choice, score)
        if better is None:
            break
        choice, score = better
    return choice, score


def _settle(problem: Problem, goal: Goal, choice: Choice, score: float) -> tuple[Choice, float]:
    for i in range(len(problem.stages)):
        options = np.flatnonzero(problem.allowed[i])
        trials = np.tile(np.array(choice, dtype=np.intp), (len(options), 1))
        trials[:, i] = options
        trials = trials[options != choice[i]]
        rows = rows_of(problem, trials)
        if not goal.latency_weight:
            cheaper = mean_costs(problem, trials, rows) * goal.cost_weight < score
            trials, rows = trials[cheaper], rows[cheaper]
        keep = admitted(problem, trials)
        for trial in _promising(problem, goal, trials[keep], rows[keep]) if keep.any() else ():
            value = problem.score(trial, goal)
            if value < score:
                choice, score = trial, value
                break
    return choice, score


def _move(problem: Problem, goal: Goal, choice: Choice, score: float) -> tuple[Choice, float] | None:
    gains, slower = _promises(problem, goal, choice)
    trials = _trials(problem, goal, choice, gains, slower)
    for at in range(0, min(len(trials), PATIENCE * MOVES), MOVES):
        some = trials[at : at + MOVES]
        some = some[admitted(problem, some)]
        rows = rows_of(problem, some)
        if not goal.latency_weight:
            cheaper = mean_costs(problem, some, rows) * goal.cost_weight < score
            some, rows = some[cheaper], rows[cheaper]
        if not len(some):
            continue
        for trial in _promising(problem, goal, some, rows):
            value = problem.score(trial, goal)
            if value < score * (1 - 1e-9):
                return trial, value
    return None


def _promises(problem: Problem, goal: Goal, choice: Choice) -> tuple[list[Floats], list[Floats]]:
    """By stage and option: change of mean cost, and of latency at the percentile to first order."""
    latency = problem.latency(choice)
    n = len(latency)
    rank = n - 1 - goal.allowed(n)
    near = np.argsort(latency, kind="stable")[max(0, rank - n // 40) : rank + n // 40 + 1]
    rows = [problem.upstream_row(i, choice) for i in range(len(problem.stages))]
    own = [stage.latency[rows[i], choice[i]][near] for i, stage in enumerate(problem.stages)]
    pieces = [time * stage.piece[choice[i]] for i, (time, stage) in enumerate(zip(own, problem.stages, strict=True))]
    network = Network.of(problem.stages)
    _, on = network.longest(own, pieces)
    gains, slower = [], []
    for i, stage in enumerate(problem.stages):
        into = network.into[i]
        through = on[into["full"][0]].astype(np.float32)
        wave = on[[*into["piece"], *into["tail"]]].sum(axis=0).astype(np.float32)
        times = stage.latency[rows[i]][:, near]
        weight = through + stage.piece[:, None] * wave
        slower.append((weight * times).mean(axis=1) - (weight[choice[i]] * times[choice[i]]).mean())
        gains.append(stage.mean_cost[rows[i]] - stage.mean_cost[rows[i], choice[i]])
    return gains, slower


def _trials(
    problem: Problem, goal: Goal, choice: Choice, gains: list[Floats], slower: list[Floats]
) -> NDArray[np.intp]:
    """Choices one or two moves away that promise to improve and to keep the bounds, the best promise first."""
    allowed = goal.allowed(problem.n_samples)
    room = purse = inf
    if goal.latency_bound_s < inf:
        room = (1 + DOUBT) * goal.latency_bound_s - percentile(problem.latency(choice), allowed)
    if goal.cost_bound_usd < inf:
        purse = (1 + DOUBT) * goal.cost_bound_usd - percentile(problem.cost(choice), allowed)
    value = [goal.cost_weight * g + goal.latency_weight * s for g, s in zip(gains, slower, strict=True)]
    useful = [np.flatnonzero(mask) for mask in problem.allowed]
    keep = [
        options[np.lexsort((slower[i][options], value[i][options]))][:_width(len(problem.stages))]
        for i, options in enumerate(useful)
    ]  # fmt: skip
    moves: list[tuple[Floats, NDArray[np.intp], tuple[int, ...]]] = []
    for i, options in enumerate(useful):
        fits = (value[i][options] < 0) & (slower[i][options] <= room) & (gains[i][options] <= purse)
        good = options[fits]
        moves.append((value[i][good], good[:, None], (i,)))
    for i, j in combinations(range(len(problem.stages)), 2):
        a, b = useful[i] if len(problem.stages) <= 12 else keep[i], useful[j] if len(problem.stages) <= 12 else keep[j]
        total = value[i][a][:, None] + value[j][b]
        fits = (total < 0) & (slower[i][a][:, None] + slower[j][b] <= room)
        fits &= gains[i][a][:, None] + gains[j][b] <= purse
        fits &= (a[:, None] != choice[i]) & (b != choice[j])
        at, bt = np.nonzero(fits)
        moves.append((total[at, bt], np.stack([a[at], b[bt]], axis=1), (i, j)))
    values = np.concatenate([value for value, _, _ in moves])
    order = np.argsort(values, kind="stable")[: PATIENCE * MOVES]
    owner = np.repeat(np.arange(len(moves)), [len(value) for value, _, _ in moves])
    first = np.cumsum([0, *(len(value) for value, _, _ in moves)])
    trials = np.tile(np.array(choice, dtype=np.intp), (len(order), 1))
    for row, at in enumerate(order):
        _, options, stages = moves[owner[at]]
        trials[row, list(stages)] = options[at - first[owner[at]]]
    return trials


def _width(n_stages: int) -> int:
    """Options per stage that pairs of moves are made of: all on small graphs, fewer on large ones."""
    return 54 if n_stages <= 12 else 12


def _promising(problem: Problem, goal: Goal, choices: NDArray[np.intp], rows: NDArray[np.intp]) -> list[Choice]:
    """Choices that look good on some of the samples, best first."""
    some = problem.sample(SAMPLES)
    cost = mean_costs(problem, choices, rows)
    latency = latencies(some, choices, rows)
    allowed = goal.allowed(some.n_samples)
    value = goal.cost_weight * cost
    if goal.latency_weight:
        rank = some.n_samples - 1 - allowed
        value = value + goal.latency_weight * np.partition(latency, rank, axis=1)[:, rank]
    over = np.count_nonzero(latency > goal.latency_bound_s, axis=1) if goal.latency_bound_s < inf else 0
    if goal.cost_bound_usd < inf:
        over = np.maximum(over, np.count_nonzero(costs(some, choices, rows) > goal.cost_bound_usd, axis=1))
    doubtful = over > allowed + 3 * np.sqrt(allowed + 1)
    order = np.argsort(np.where(doubtful, inf, value), kind="stable")
    return [tuple(choices[at].tolist()) for at in order if not np.broadcast_to(doubtful, value.shape)[at]][:12]


def _best(problem: Problem, goal: Goal, candidates: Sequence[Choice]) -> tuple[Choice | None, float]:
    choices = np.array(candidates, dtype=np.intp).reshape(-1, len(problem.stages))
    best, score = None, inf
    for at in range(0, len(choices), MOVES):
        some = choices[at : at + MOVES]
        for choice in _promising(problem, goal, some, rows_of(problem, some)):
            if (value := problem.score(choice, goal)) < score:
                best, score = choice, value
    return best, score


def _nearest(problem: Problem, goal: Goal, candidates: Sequence[Choice]) -> Choice:
    if goal.latency_bound_s < inf:
        some = problem.sample(SAMPLES)
        allowed = goal.allowed(some.n_samples)
        return min(candidates, key=lambda choice: percentile(some.latency(choice), allowed))
    return min(candidates, key=problem.mean_cost)
