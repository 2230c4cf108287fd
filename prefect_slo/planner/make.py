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
from prefect_slo.planner.goals import Balanced, PlanObjective, goal_of
from prefect_slo.planner.problem import Choice, Goal, Problem, percentile
from prefect_slo.planner.promise import needed, promised, raised, sure
from prefect_slo.planner.sampling import ENOUGH_SAMPLES, Sampler, TableSource
from prefect_slo.planner.search import NODE_LIMIT, Found
from prefect_slo.planner.solver import Solver, solve
from prefect_slo.units import whole

SEARCH_SAMPLES = 4000
"""Samples of the search; more change the plan's cost by less than its price of certainty."""

TESTS = 6
"""Tests on fresh samples before the objective is called infeasible; test r spends 1/2ʳ of the error budget. After one
that failed, the next search is asked for as much more as they showed to be missing."""


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
            made for a bound that is smaller by as much. That claims nothing of the new plan in real runs: it has none.

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
    factor = 1.0 if calibration is None else calibration.planning_factor
    goal = goal.within(*((factor, 1.0) if goal.latency_bound_s < inf else (1.0, factor)))
    winner = _certified(sampler, problem, goal, slo, whole(node_limit, "node_limit"), factor)
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
    both = _quantiles(latency), _quantiles(cost)
    if at == 0.95:
        return Prediction(*both, both[0].p95, both[1].p95)
    return Prediction(*both, _at(latency, at), _at(cost, at))


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


def _certified(
    sampler: Sampler, problem: Problem, goal: Goal, slo: Slo | None, node_limit: int, factor: float
) -> Winner:
    """The best plan that can be promised, once it passes its test on fresh samples.

    The goal's leading bound is the objective's divided by ``factor``, which only the refusal needs to know.
    """
    confidence = slo.confidence if slo else 0.99
    error, risk, share = 1 - confidence, 1 - goal.percentile, SEARCH_SHARE
    solver, tests, least = Solver(problem, node_limit), 0, (1.0, 1.0)
    while tests < TESTS:
        if tests and problem.n_samples < ENOUGH_SAMPLES:
            problem = sampler.problem(tests)
            solver = Solver(problem, node_limit)
        missing, failed = 1.0, []
        for found in promised(sampler, solver, goal, 1 - share * risk, confidence, least)[: TESTS - tests]:
            assert found.choice is not None
            latency, cost = sampler.fresh(problem, found.choice, tests)
            winner = Winner(problem, found.choice, latency, cost, None)
            if slo is None:
                return winner
            tests += 1
            verdict = judge(_bounds(goal, latency, cost), goal.percentile, error / 2**tests)
            if verdict.passed:
                return replace(winner, certificate=_certificate(solver, goal, found, verdict, confidence))
            missing = min(0.97, missing, 0.98 * verdict.allowed / verdict.violations)
            failed.append((found.choice, (percentile(latency, verdict.allowed), percentile(cost, verdict.allowed))))
        if missing == 1.0:
            break
        share *= missing
        for choice, drawn in failed:
            least = raised(least, needed(problem, goal, 1 - share * risk, choice, drawn))
    raise _infeasible(sampler, solver, goal, slo, factor)


def _bounds(
    goal: Goal, latency: NDArray[np.floating], cost: NDArray[np.floating]
) -> list[tuple[NDArray[np.floating], float]]:
    pairs: list[tuple[NDArray[np.floating], float]] = [(latency, goal.latency_bound_s), (cost, goal.cost_bound_usd)]
    return [(values, bound) for values, bound in pairs if bound < inf]


def _certificate(solver: Solver, goal: Goal, found: Found, verdict: Verdict, confidence: float) -> Certificate:
    """The certificate of a plan that passed; certainty is priced against the best plan at the nominal percentile."""
    assert found.choice is not None
    own, nominal = solver.problem.score(found.choice, goal), solver.nominal(goal, [found.choice])
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


def _infeasible(sampler: Sampler, solver: Solver, goal: Goal, slo: Slo | None, factor: float) -> InfeasibleSlo:
    """What to tell: the nearest bound of the objective that a plan on the menu keeps with room to spare.

    In the objective's own terms, where real runs made the planner work for less: ``factor`` times the model's.
    """
    words, problem = str(slo) if slo else "a plan", solver.problem
    risk = SEARCH_SHARE * (1 - goal.percentile)
    fastest = goal.at(1 - risk).fastest()
    confidence = slo.confidence if slo else 0.99
    room = 1 - _sure_risk(sampler.fresh_samples, 1 - goal.percentile, 1 - confidence)
    surer = 1 - (1 - confidence) / 2
    if goal.latency_bound_s < inf:
        found = solver.solve(fastest)
        if found.choice is not None:
            latency, cost = sampler.fresh(problem, found.choice, TESTS)
            safe = factor * sure(sampler, problem, found.choice, goal.percentile, surer)[0]
            bound = _round_up(max(factor * _at(latency, room), factor * found.score, safe))
            where = max(criticality(problem, found.choice), key=lambda c: c.path_share)
            reached = max(expected := _rounded(factor * _at(latency, goal.percentile)), _rounded(safe))
            nearest = Nearest(bound, reached, _rounded(float(cost.mean())), _rounded(1 - expected / reached))
            return InfeasibleSlo(str(slo.latency) if slo else words, nearest, where.stage, where.path_share)
    if goal.cost_bound_usd < inf and (choice := solver.frugal(1 - risk)) is not None:
        factor = 1.0 if goal.latency_bound_s < inf else factor
        latency, cost = sampler.fresh(problem, choice, TESTS)
        safe = factor * sure(sampler, problem, choice, goal.percentile, surer)[1]
        bound = _round_up(max(factor * _at(cost, room), factor * _at(problem.cost(choice), 1 - risk), safe))
        where = max(criticality(problem, choice), key=lambda c: c.cost_share)
        reached = max(expected := _rounded(factor * _at(cost, goal.percentile)), _rounded(safe))
        nearest = Nearest(bound, _at(latency, goal.percentile), reached, _rounded(1 - expected / reached))
        return InfeasibleSlo(str(slo.budget) if slo else words, nearest, where.stage, where.cost_share)
    return InfeasibleSlo(words, None, problem.workflow.order[0], 0.0)


def _sure_risk(samples: int, risk: float, error: float) -> float:
    """A share of violations that passes even the last test almost surely: four deviations under its threshold."""
    allowed = allowed_violations(samples, risk, error / 2**TESTS)
    sure = (allowed - 4 * sqrt(samples * risk * (1 - risk))) / samples
    return min(max(sure, 0.5 / samples), SEARCH_SHARE * risk)


def _quantiles(samples: NDArray[np.floating]) -> Quantiles:
    mean = _rounded(float(samples.mean(dtype=np.float64)))
    ranks = [_rank(samples, q) for q in (0.5, 0.95, 0.99)]
    return Quantiles(mean, *(_rounded(float(value)) for value in np.partition(samples, ranks)[ranks]))


def _at(samples: NDArray[np.floating], q: float) -> float:
    return _rounded(percentile(samples, Goal(percentile=q).allowed(len(samples))))


def _rank(samples: NDArray[np.floating], q: float) -> int:
    return len(samples) - 1 - Goal(percentile=q).allowed(len(samples))


def _rounded(value: float, digits: int = 9) -> float:
    """Nine significant digits: float32 sums hold seven, and files stay readable."""
    return float(f"{value:.{digits}g}")


def _round_up(value: float, digits: int = 4) -> float:
    """The next number of four significant digits, as error messages print it."""
    if value <= 0:
        return value
    scale = 10.0 ** (digits - 1 - floor(log10(value)))
    return float(f"{ceil(value * scale * (1 + 1e-6)) / scale:.{digits}g}")
