"""From a model and an objective to a certified plan: search on samples, then certify on fresh ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf, log10, sqrt

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import InfeasibleSlo, Nearest
from prefect_slo.models.calibration import Calibration
from prefect_slo.objective import Slo
from prefect_slo.plan import Certificate, Plan, Prediction, Quantiles, StagePlan
from prefect_slo.planner.bundles import bundled
from prefect_slo.planner.certify import CERTIFY_SAMPLES, SEARCH_SHARE, Verdict, allowed_violations, judge
from prefect_slo.planner.criticality import criticality
from prefect_slo.planner.dominance import Reduced
from prefect_slo.planner.goals import Balanced, PlanObjective, goal_of
from prefect_slo.planner.incumbent import begin, polish
from prefect_slo.planner.problem import Choice, Goal, Problem, percentile
from prefect_slo.planner.promise import excess, first_room, loosened, sure, tightened
from prefect_slo.planner.relax import quantile_bound
from prefect_slo.planner.sampling import ENOUGH_SAMPLES, Sampler, TableSource
from prefect_slo.planner.search import NODE_LIMIT, Found, search
from prefect_slo.units import whole

SEARCH_SAMPLES = 4000
"""Samples of the search; more change the plan's cost by less than its price of certainty."""

ATTEMPTS = 6
"""Tests before the objective is called infeasible; test r spends 1/2ʳ of the error budget, and each failure tightens
the next search by as much as the fresh samples, or the truths that the rows allow for, showed to be missing."""

NOMINAL_NODES = 60
"""Nodes of the search at the nominal percentile, from which the price of certainty follows."""

SMALL = 16
"""Up to so many stages that search is worth its time; on larger graphs moves alone find the nominal plan."""


def make_plan(
    model: TableSource,
    objective: PlanObjective,
    *,
    seed: int = 0,
    cold: bool | float = False,
    pins: Mapping[str, Mapping[str, object]] | None = None,
    samples: int = SEARCH_SAMPLES,
    certify_samples: int = CERTIFY_SAMPLES,
    node_limit: int = NODE_LIMIT,
    calibration: Calibration | None = None,
) -> Plan:
    """The best plan that keeps the objective, certified under the model.

    Args:
        model: Draws samples per menu option.
        objective: A latency bound (least mean cost), a budget (least latency at the percentile), both (the first with
            the second as a constraint), or a ``Balanced`` weighting.
        seed: Seed of every draw; the same input and seed give the same plan, byte for byte.
        cold: Plan for workers that start cold, or the share of runs in which they do.
        pins: Choices that are fixed, by stage: ``{"train": {"workers": 8}}``.
        samples: Samples of the search.
        certify_samples: Fresh samples of the certificate.
        node_limit: Budget of each search, in nodes.
        calibration: Scores of real runs. Where they took longer (under a budget: cost more) than predicted, the plan is
            made for a bound that is smaller by as much, and its certificate says how many runs that rests on.

    Raises:
        InfeasibleSlo: No plan on the menu keeps the objective; carries the nearest bound that can be kept.
        InvalidPlan: A pin that is not on its stage's menu.
        UnknownStage: A pin of a stage that the workflow does not have.
    """
    whole(seed, "seed", least=0)
    sampler = Sampler(
        model, seed, cold, pins or {}, whole(samples, "samples"), whole(certify_samples, "certify_samples")
    )
    problem = sampler.problem(0)
    if isinstance(objective, Balanced):
        slo, goal = objective.within, _balance(objective, problem, node_limit)
    else:
        slo, goal = Slo.of(objective), goal_of(objective)
    if calibration is not None:
        factor = calibration.planning_factor
        goal = goal.within(*((factor, 1.0) if goal.latency_bound_s < inf else (1.0, factor)))
    winner = _certified(sampler, problem, goal, slo, whole(node_limit, "node_limit"))
    if calibration is not None and winner.certificate is not None:
        certificate = replace(winner.certificate, calibration_runs=len(calibration.scores))
        winner = replace(winner, certificate=certificate)
    return Plan(
        workflow=model.workflow.name,
        objective=slo,
        stages=stage_plans(winner.problem, winner.choice),
        predicted=predict(winner.latency, winner.cost, goal.percentile),
        certificate=winner.certificate,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class Winner:
    """A plan that passed its test."""

    problem: Problem
    choice: Choice
    latency: NDArray[np.floating]
    cost: NDArray[np.floating]
    certificate: Certificate | None


def stage_plans(problem: Problem, choice: Choice) -> dict[str, StagePlan]:
    """Stage plans of a choice, with record level and bundle size, in the workflow's own order."""
    position = {stage.name: i for i, stage in enumerate(problem.stages)}
    plans = {}
    for name, option in problem.option(choice).items():
        stage, at = problem.workflow[name], position[name]
        plan = StagePlan.of(option)
        if stage.fanout == "given" and stage.items:
            own = problem.stages[at]
            typical = float(own.latency[problem.upstream_row(at, choice), choice[at]].mean())
            plan = bundled(plan, typical / float(own.waves[choice[at]]), ceil(stage.items / option.batch))
        plans[name] = plan
    return plans


def predict(latency: NDArray[np.floating], cost: NDArray[np.floating], at: float) -> Prediction:
    """Summary of samples of latency (seconds) and cost (US dollars), ``(n_samples,)`` each."""
    return Prediction(_quantiles(latency), _quantiles(cost), _at(latency, at), _at(cost, at))


def uncertified(sampler: Sampler, problem: Problem, choice: Sequence[int], slo: Slo | None) -> Plan:
    """A plan with its prediction and no certificate, for baselines and defaults."""
    latency, cost = sampler.fresh(problem, tuple(choice))
    return Plan(
        workflow=problem.workflow.name,
        objective=slo,
        stages=stage_plans(problem, tuple(choice)),
        predicted=predict(latency, cost, slo.percentile if slo else 0.95),
        seed=sampler.seed,
    )


def solve(problem: Problem, goal: Goal, node_limit: int = NODE_LIMIT, start: Choice | None = None) -> Found:
    """A good plan by sweeps and moves, then branch-and-bound, both without dominated options."""
    reduced = Reduced.of(problem, goal)
    given = None if start is None else reduced.within(start)
    first = begin(reduced.problem, goal, () if given is None else (given,))
    found = search(reduced.problem, goal, incumbent=first.plan, node_limit=node_limit, reference=first.reference)
    return found if found.choice is None else replace(found, choice=reduced.whole(found.choice))


def _certified(sampler: Sampler, problem: Problem, goal: Goal, slo: Slo | None, node_limit: int) -> Winner:
    """The best plan found that passes both tests; after one that passes with much to spare, a bolder one is tried."""
    confidence = slo.confidence if slo else 0.99
    error, risk = 1 - confidence, 1 - goal.percentile
    share, room = SEARCH_SHARE, (1.0, 1.0)
    if slo is not None and sampler.uncertain:
        room = first_room(sampler, problem, goal.at(1 - share * risk), goal.percentile, confidence)
    best: tuple[float, Winner, Found, Verdict] | None = None
    for attempt in range(ATTEMPTS):
        if attempt and best is None and problem.n_samples < ENOUGH_SAMPLES:
            problem = sampler.problem(attempt)
        found = solve(problem, goal.at(1 - share * risk).within(*room), node_limit)
        if found.choice is None and attempt == 0:
            found = solve(problem, goal, node_limit)
        last = found.choice is None or (best is None and attempt == ATTEMPTS - 1)
        if last:
            found = _safest(problem, goal, node_limit)
        if found.choice is None:
            break
        if best is not None and found.choice == best[1].choice:
            break
        latency, cost = sampler.fresh(problem, found.choice, attempt)
        winner = Winner(problem, found.choice, latency, cost, None)
        if slo is None:
            return winner
        verdict = judge(_bounds(goal, latency, cost), goal.percentile, error / 2 ** (attempt + 1))
        over = excess(sampler, problem, found.choice, goal, confidence, attempt)
        if verdict.passed and max(over) <= 1:
            score, before = problem.score(found.choice, goal), room
            if best is not None and score >= best[0]:
                break
            best, room = (score, winner, found, verdict), loosened(room, over)
            if last or room == before:
                break
        elif last or best is not None:
            break
        else:
            share *= 1.0 if verdict.passed else min(0.97, 0.98 * verdict.allowed / verdict.violations)
            room = tightened(room, over)
    if best is None:
        raise _infeasible(sampler, problem, goal, slo, node_limit)
    _, winner, found, verdict = best
    return replace(winner, certificate=_certificate(problem, goal, found, verdict, confidence))


def _safest(problem: Problem, goal: Goal, node_limit: int) -> Found:
    """The plan with most room to its bound, where the cheapest could not be certified or none was found."""
    none = Found(None, inf, -inf, 0, False)
    if goal.latency_bound_s == inf:
        choice = _frugal(problem, goal.percentile, node_limit) if goal.cost_bound_usd < inf else None
    else:
        choice = solve(problem, goal.fastest(), node_limit).choice
    score = problem.score(choice, goal) if choice is not None else inf
    if choice is None or score == inf:
        return none
    return Found(choice, score, quantile_bound(problem, goal, choice), 0, False)


def _bounds(
    goal: Goal, latency: NDArray[np.floating], cost: NDArray[np.floating]
) -> list[tuple[NDArray[np.floating], float]]:
    pairs: list[tuple[NDArray[np.floating], float]] = [(latency, goal.latency_bound_s), (cost, goal.cost_bound_usd)]
    return [(values, bound) for values, bound in pairs if bound < inf]


def _certificate(problem: Problem, goal: Goal, found: Found, verdict: Verdict, confidence: float) -> Certificate:
    """The certificate of a plan that passed; certainty is priced against the best plan at the nominal percentile."""
    assert found.choice is not None
    own = problem.score(found.choice, goal)
    start, nominal = polish(problem, goal, found.choice, own) if own < inf else (found.choice, inf)
    if len(problem.stages) <= SMALL:
        nominal = search(problem, goal, incumbent=start, node_limit=NOMINAL_NODES).score
    price = own / nominal - 1 if 0 < nominal < inf else 0.0
    return Certificate(
        lower_bound=_rounded(found.lower_bound),
        gap=_rounded(found.gap),
        price_of_certainty=_rounded(price),
        samples=verdict.samples,
        violations=verdict.violations,
        confidence=confidence,
    )


def _balance(objective: Balanced, problem: Problem, node_limit: int) -> Goal:
    """The goal of a balance, its open scales being the cheapest plan's cost and the fastest plan's latency."""
    plain = objective.goal(1.0, 1.0)
    free = Goal(percentile=plain.percentile)
    cheapest = solve(problem, free, node_limit).score
    fastest = solve(problem, free.fastest(), node_limit).score
    if cheapest == inf:
        raise InfeasibleSlo("a plan", None, problem.workflow.order[0], 0.0)
    return objective.goal(max(cheapest, 1e-12), max(fastest, 1e-12))


def _infeasible(sampler: Sampler, problem: Problem, goal: Goal, slo: Slo | None, node_limit: int) -> InfeasibleSlo:
    """What to tell: the nearest bound of the objective that a plan on the menu keeps with room to spare."""
    words = str(slo) if slo else "a plan"
    risk = SEARCH_SHARE * (1 - goal.percentile)
    fastest = goal.at(1 - risk).fastest()
    confidence = slo.confidence if slo else 0.99
    room = 1 - _sure_risk(sampler.fresh_samples, 1 - goal.percentile, 1 - confidence)
    surer = 1 - (1 - confidence) / 2
    if goal.latency_bound_s < inf:
        found = solve(problem, fastest, node_limit)
        if found.choice is not None:
            latency, cost = sampler.fresh(problem, found.choice, ATTEMPTS)
            promised = sure(sampler, problem, found.choice, goal.percentile, surer)[0]
            bound = _round_up(max(_at(latency, room), found.score, promised))
            where = max(criticality(problem, found.choice), key=lambda c: c.path_share)
            reached = max(expected := _at(latency, goal.percentile), _rounded(promised))
            nearest = Nearest(bound, reached, _rounded(float(cost.mean())), _rounded(1 - expected / reached))
            return InfeasibleSlo(str(slo.latency) if slo else words, nearest, where.stage, where.path_share)
    if goal.cost_bound_usd < inf and (choice := _frugal(problem, 1 - risk, node_limit)) is not None:
        latency, cost = sampler.fresh(problem, choice, ATTEMPTS)
        promised = sure(sampler, problem, choice, goal.percentile, surer)[1]
        bound = _round_up(max(_at(cost, room), _at(problem.cost(choice), 1 - risk), promised))
        where = max(criticality(problem, choice), key=lambda c: c.cost_share)
        reached = max(expected := _at(cost, goal.percentile), _rounded(promised))
        nearest = Nearest(bound, _at(latency, goal.percentile), reached, _rounded(1 - expected / reached))
        return InfeasibleSlo(str(slo.budget) if slo else words, nearest, where.stage, where.cost_share)
    return InfeasibleSlo(words, None, problem.workflow.order[0], 0.0)


def _sure_risk(samples: int, risk: float, error: float) -> float:
    """A share of violations that passes even the last test almost surely: four deviations under its threshold."""
    allowed = allowed_violations(samples, risk, error / 2**ATTEMPTS)
    sure = (allowed - 4 * sqrt(samples * risk * (1 - risk))) / samples
    return min(max(sure, 0.5 / samples), SEARCH_SHARE * risk)


def _frugal(problem: Problem, at: float, node_limit: int) -> Choice | None:
    """The plan of least cost at a percentile: the cheapest on average, then ever tighter budgets."""
    found = solve(problem, Goal(percentile=at), node_limit)
    best = found.choice
    for _ in range(8):
        if best is None:
            return None
        tighter = percentile(problem.cost(best), Goal(percentile=at).allowed(problem.n_samples)) * (1 - 1e-3)
        found = solve(problem, Goal(percentile=at, cost_bound_usd=tighter), node_limit)
        if found.choice is None:
            return best
        best = found.choice
    return best


def _quantiles(samples: NDArray[np.floating]) -> Quantiles:
    mean = _rounded(float(samples.mean(dtype=np.float64)))
    return Quantiles(mean, _at(samples, 0.5), _at(samples, 0.95), _at(samples, 0.99))


def _at(samples: NDArray[np.floating], q: float) -> float:
    return _rounded(percentile(samples, Goal(percentile=q).allowed(len(samples))))


def _rounded(value: float, digits: int = 9) -> float:
    """Nine significant digits: float32 sums hold seven, and files stay readable."""
    return float(f"{value:.{digits}g}")


def _round_up(value: float, digits: int = 4) -> float:
    """The next number of four significant digits, as error messages print it."""
    if value <= 0:
        return value
    scale = 10.0 ** (digits - 1 - floor(log10(value)))
    return float(f"{ceil(value * scale * (1 + 1e-6)) / scale:.{digits}g}")
