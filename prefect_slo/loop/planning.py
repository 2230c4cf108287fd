"""What to do with a run, given what is known: follow the plan in force, plan now, explore, or only observe.

A run that follows the plan in force needs neither the model nor the planner: they are imported where they are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from prefect_slo.loop import gpus, hosts, policy
from prefect_slo.loop.knowledge import Fitted, Knowledge
from prefect_slo.loop.replanning import fits, has_room, keeps, plan_digest, predicted, replan
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan
from prefect_slo.resources import Option, Size
from prefect_slo.workflow import Workflow

if TYPE_CHECKING:
    from prefect_slo.models import WorkflowModel

PROFILE_IT = "Profile it with 'prefect-slo profile'."

EXPLORATION_COST = 1.25
"""An exploring run may cost a quarter more than the plan's, and must keep the bound under the model."""


@dataclass(frozen=True)
class Decision:
    """How a run is run, and why.

    Attributes:
        plan: The plan; ``None`` to observe.
        mode: ``observe``, ``advise``, ``enforce``, ``explore`` or ``profile``.
        note: What the user should know, or nothing.
        on_threads: Stages that are known not to pickle, with the hash of their code.
        ladders: Larger sizes by stage, for items that run out of memory.
        lacking: Whether it does without room or a GPU that its plan would have elsewhere: then the note is a warning.
    """

    plan: Plan | None
    mode: str
    note: str = ""
    on_threads: Mapping[str, str] = field(default_factory=dict)
    ladders: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)
    lacking: bool = False

    @property
    def followed(self) -> Plan | None:
        """The plan that the run is run by; a plan that is only shown is none."""
        return None if self.mode == "advise" else self.plan

    @property
    def digest(self) -> str:
        """Names the choices of the plan that the run is one of, whatever it predicts; empty where it counts for none.

        Runs of a sweep don't count: plans are chosen by them, and a plan that was lucky there would look better than it
        is.
        """
        return plan_digest(self.plan) if self.plan is not None and self.mode == "enforce" else ""


def decide(
    known: Knowledge,
    slo: Slo,
    *,
    mode: str | None,
    seed: int,
    explore: float,
    rng: np.random.Generator,
    features: Mapping[str, float] | None = None,
) -> Decision:
    """What to do with the run that starts now.

    Args:
        known: What is known of the flow.
        slo: What is asked.
        mode: ``None``: enforce where the models are identified, observe where not.
        seed: Of the planner's draws.
        explore: Fraction of runs that may try something unmeasured.
        rng: Draws whether this run does.
        features: Size of the run's input, where the flow declares it: the run is then planned for it alone.
    """
    missing = known.missing()
    if missing:
        hint = f"runs as it is and is observed: {missing}."
        return Decision(None, "observe", hint if "prefect-slo profile" in hint else f"{hint[:-1]}. {PROFILE_IT}")
    if mode == "observe":
        return Decision(None, "observe")
    assert known.workflow is not None
    plan, in_force, workflow = known.plan, known.plan, known.workflow
    if features:
        assert known.model is not None
        known = replace(known, fitted=Fitted.of(known.model.given(rounded(features))), plan=None)
    if known.plan is None or not fits(known.plan, workflow, slo):
        key = slo, tuple(sorted(rounded(features or {}).items()))
        plan = known.made.get(key) or replan(known, slo, seed=seed)[0]
        assert plan is not None
        known.made[key] = plan
    assert plan is not None
    note = f"{slo} is kept by no plan for sure; it runs by its fastest." if plan.certificate is None else ""
    price = _doing_without(known, plan, slo, seed)
    instead = hosts.in_place_of(known, plan, slo, gpus_told=bool(price)) if plan is not known.plan else ""
    without = f"{price} {instead}".strip()
    if mode == "advise":
        shown = note or "a plan is ready; it is shown and not followed (mode 'advise')."
        return Decision(plan, "advise", f"{shown} {without}".strip(), lacking=bool(without))
    mode = "enforce"
    if not note and explore and policy.explores(explore, rng):
        assert known.model is not None
        tried = exploration(known.model, plan, slo, rng)
        if tried is not None:
            plan, mode = tried, "explore"
    told = f"{note} {without}".strip()
    return Decision(
        plan.passing_as(in_force), mode, told, known.on_threads, ladders(plan, workflow), lacking=bool(without)
    )


def _doing_without(known: Knowledge, plan: Plan, slo: Slo, seed: int) -> str:
    """What it costs that places have no GPU, where a plan would use one there; computed once for what is known."""
    if known.workflow is None or not (places := gpus.lacking(known.workflow.capacity)):
        return ""
    key = slo, (("gpu", 1.0),)
    if key not in known.made:
        known.made[key] = gpus.wanted(known, slo, seed=seed) or plan
    return gpus.price(known.made[key], plan, places)


def told(known: Knowledge, plan: Plan, mode: str | None) -> Decision:
    """What to do with a run that is pinned to a plan, whatever else is known.

    Args:
        known: What is known of the flow; nothing where that can't be read.
        plan: The plan.
        mode: As of ``decide``.
    """
    if mode == "observe":
        return Decision(None, "observe", "is pinned to a plan, which is not followed (mode 'observe').")
    if mode == "advise":
        return Decision(plan, "advise", "is pinned to a plan, which is shown and not followed (mode 'advise').")
    note = "follows the plan that it is pinned to."
    if known.workflow is None:
        return Decision(plan, "enforce", note, known.on_threads)
    stages = {stage.name for stage in known.workflow.stages}
    if missing := sorted(stages - set(plan.stages)):
        return Decision(plan, "enforce", f"{note} It lacks {', '.join(missing)}: run as they are.", known.on_threads)
    return Decision(plan, "enforce", note, known.on_threads, ladders(plan, known.workflow, only=stages))


def rounded(features: Mapping[str, float]) -> dict[str, float]:
    """Sizes of input to two digits: runs of about the same size share a plan."""
    return {name: float(f"{value:.1e}") for name, value in features.items()}


def exploration(model: WorkflowModel, plan: Plan, slo: Slo, rng: np.random.Generator) -> Plan | None:
    """The plan with one stage at an option that was measured least, where the bound still holds under the model.

    At most a few random candidates are looked at; ``None`` when none of them is safe.
    """
    assert plan.predicted is not None
    stages = [s for s in model.workflow.stages if len(s.menu.options()) > 1]
    for _ in range(4 if stages else 0):
        stage = stages[int(rng.integers(len(stages)))]
        options = [o for o in stage.menu.options() if o != plan[stage.name].option]
        if not options:
            continue
        option = options[int(rng.integers(len(options)))]
        tried = plan.with_stage(stage.name, **_choices(option))
        if not has_room(tried, model.workflow):
            continue
        tried = predicted(model, tried)
        assert tried.predicted is not None
        safe = keeps(tried.predicted, slo)
        if safe and tried.predicted.cost_usd.mean <= EXPLORATION_COST * plan.predicted.cost_usd.mean:
            return tried
    return None


def ladders(plan: Plan, workflow: Workflow, *, only: Collection[str] | None = None) -> dict[str, tuple[Size, ...]]:
    """For every stage, or those named, the sizes of its kind on its menu with more memory, as far as there is room."""
    steps = {}
    for name, stage in plan.stages.items():
        if only is not None and name not in only:
            continue
        options = [o for o in workflow[name].menu.options() if workflow.capacity.fits(replace(o, workers=1))]
        sizes = {o.size for o in options if o.pool == stage.pool and o.size.kind == stage.size.kind}
        larger = sorted((s for s in sizes if s.memory_mb > stage.size.memory_mb), key=lambda s: (s.memory_mb, s.vcpus))
        steps[name] = tuple(larger)
    return steps


def _choices(option: Option) -> dict[str, object]:
    return {
        "workers": option.workers,
        "size": option.size,
        "pool": option.pool,
        "batch": option.batch,
        "knobs": option.knobs,
    }
