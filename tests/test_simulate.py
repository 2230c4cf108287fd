from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import simpy

from prefect_slo.errors import InvalidPlan, InvalidValue, UnknownStage
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.planner.sampling import Sampler
from prefect_slo.simulate import simulate


@pytest.fixture(scope="module")
def model_of():
    """The planner tests' synthetic models."""
    path = Path(__file__).parent / "planner" / "conftest.py"
    spec = importlib.util.spec_from_file_location("synthetic_models", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.synthetic


def played(workflow, latency: dict[str, float]) -> float:
    """Finish of a run in a discrete-event simulation: stages wait for their parents' events, then take their time."""
    world = simpy.Environment()
    done = {name: world.event() for name in workflow.order}

    def stage(name: str):
        yield simpy.AllOf(world, [done[parent] for parent in workflow[name].parents])
        yield world.timeout(latency[name])
        done[name].succeed()

    for name in workflow.order:
        world.process(stage(name))
    world.run()
    return world.now


def plan_of(model, workers: int = 2) -> Plan:
    stages = {}
    for stage in model.workflow.stages:
        option = next(o for o in stage.menu.options() if o.workers == workers)
        stages[stage.name] = StagePlan.of(option)
    return Plan("synthetic", None, stages)


@pytest.mark.parametrize("shape", ["chain", "diamonds", "sources", "random"])
def test_runs_end_when_a_discrete_event_simulation_of_them_ends(model_of, shape):
    model = model_of(shape, 7, seed=2, driver=0.0)
    runs = simulate(model, plan_of(model), runs=40, seed=1)
    for run in range(40):
        latency = {name: float(times[run]) for name, times in runs.stage_latency_s.items()}
        assert runs.latency_s[run] == pytest.approx(played(model.workflow, latency), rel=1e-5)


def test_cost_is_the_sum_over_stages_and_sampled_with_latency(model_of):
    model = model_of("chain", 4, seed=3)
    runs = simulate(model, plan_of(model), runs=2000)
    np.testing.assert_allclose(runs.cost_usd, sum(runs.stage_cost_usd.values()), rtol=1e-6)
    assert np.corrcoef(runs.latency_s, runs.cost_usd)[0, 1] > 0.5


def test_a_thousand_runs_show_the_share_that_keeps_a_bound(model_of):
    model = model_of("chain", 3, seed=4)
    many = simulate(model, plan_of(model), runs=100_000)
    bound = many.latency_quantile(0.95)
    kept = simulate(model, plan_of(model), runs=1000, seed=5).attainment(bound)
    low, high = kept.interval(0.999)
    assert low <= 0.95 <= high
    assert kept.runs == len(simulate(model, plan_of(model), runs=1000)) == 1000


def test_both_bounds_of_an_objective_count(model_of):
    model = model_of("chain", 3, seed=4)
    runs = simulate(model, plan_of(model), runs=5000)
    latency, budget = Latency(runs.latency_quantile(0.9)), Budget(runs.cost_quantile(0.5))
    assert runs.attainment(latency).share == pytest.approx(0.9, abs=1e-3)
    assert runs.attainment(Slo(latency, budget)).met <= runs.attainment(budget).met
    assert runs.attainment(budget).share == pytest.approx(0.5, abs=1e-3)


def test_the_same_seed_gives_the_same_runs_and_another_seed_others(model_of):
    model = model_of("random", 4, seed=5)
    first, again, other = (simulate(model, plan_of(model), runs=100, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.latency_s, again.latency_s)
    assert not np.array_equal(first.latency_s, other.latency_s)


def test_the_plan_itself_is_drawn_so_that_what_it_says_of_bundles_counts(model_of):
    class Seen:
        def __init__(self, model):
            self.model, self.workflow, self.plans = model, model.workflow, []

        def sample_plan(self, plan, *args, **kwargs):
            self.plans.append(plan)
            return self.model.sample_plan(plan, *args, **kwargs)

    seen = Seen(model_of("chain", 2))
    plan = plan_of(seen.model).with_stage("s0", bundle=7)
    simulate(seen, plan, runs=10)
    simulate(seen, {name: stage.option for name, stage in plan.stages.items()}, runs=10)
    assert seen.plans[0] == plan
    assert not isinstance(seen.plans[1], Plan)


def test_every_use_of_a_seed_has_a_stream_of_its_own(model_of):
    class Seen:
        def __init__(self, model):
            self.model, self.workflow, self.drawn = model, model.workflow, {}

        def __getattr__(self, name):
            def called(*args, **kwargs):
                rng = next(each for each in args if isinstance(each, np.random.Generator))
                self.drawn.setdefault(name, []).append(
                    float(np.random.default_rng(rng.bit_generator.seed_seq).random())
                )
                return getattr(self.model, name)(*args, **kwargs)

            return called

    seen = Seen(model_of("chain", 2))
    planner = Sampler(seen, 5, samples=500)
    problem = planner.problem()
    planner.fresh(problem, (0, 0))
    truths = float(planner._stream(2, 0).random())
    simulate(seen, plan_of(seen.model), runs=10, seed=5)
    drawn = [truths, *seen.drawn["tables"], *seen.drawn["sample_plan"]]
    assert len(set(drawn)) == len(drawn) == 4


def test_plans_that_do_not_fit_the_workflow_are_refused(model_of):
    model = model_of("chain", 2)
    plan = plan_of(model)
    with pytest.raises(InvalidPlan, match="s1"):
        simulate(model, {"s0": plan["s0"].option})
    with pytest.raises(UnknownStage, match="ghost"):
        simulate(model, dict.fromkeys(("s0", "s1", "ghost"), plan["s0"].option))
    with pytest.raises(InvalidValue, match="runs"):
        simulate(model, plan, runs=0)
