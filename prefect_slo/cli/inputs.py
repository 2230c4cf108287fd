"""What commands take: the workflow file, the stage-run table, bounds, pins; read and turned into values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_slo.cli.output import working
from prefect_slo.errors import InvalidObservation, InvalidPlan, InvalidValue
from prefect_slo.units import whole

if TYPE_CHECKING:
    from prefect_slo.models import WorkflowModel
    from prefect_slo.objective import Slo
    from prefect_slo.observation import StageRuns
    from prefect_slo.plan import Plan
    from prefect_slo.workflow import Workflow

AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON document instead of tables.")]


def _check_seed(_type: object, seed: int) -> None:
    whole(seed, "seed", least=0)


Seed = Annotated[
    int, Parameter(validator=_check_seed, help="Seed of every sample; the same input and seed give the same result.")
]
Cold = Annotated[bool, Parameter(negative="", help="Every worker has to start first.")]
Pins = Annotated[
    tuple[str, ...],
    Parameter(negative="", show_default=False, help="Hold a choice: train.workers=8. May be repeated."),
]
PlanFile = Annotated[Path, Parameter(name="--plan", help="Plan file (.json).")]


@Parameter(name="*")
@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    workflow: Annotated[Path, Parameter(name=["--workflow", "-w"], help="Workflow file (.toml or .json).")]
    runs: Annotated[
        str,
        Parameter(
            name=["--runs", "-r"],
            help="Stage-run table (.csv, .parquet or .jsonl; s3://bucket/key too), "
            "or a model that 'prefect-slo fit -o' wrote (.json).",
        ),
    ]

    def read(self) -> Workflow:
        """The workflow."""
        from prefect_slo.workflow import Workflow

        return Workflow.load(self.workflow)

    def model(self) -> WorkflowModel:
        """The model of the workflow: read where ``runs`` is one, else fitted to the table."""
        from prefect_slo.models import WorkflowModel

        workflow = self.read()
        if Path(self.runs).suffix == ".json":
            try:
                return WorkflowModel.from_document(workflow, _read_json(Path(self.runs), "model"))
            except (KeyError, TypeError, AttributeError) as error:
                expected = f"a model that 'prefect-slo fit -o' wrote ({type(error).__name__}: {error})"
                raise InvalidObservation("model", str(self.runs), expected) from None
        rows = self.rows(workflow)
        with working(f"Fitting {len(rows):,} rows"):
            return WorkflowModel(workflow).fit(rows)

    def with_passing(self, plan: Plan) -> Plan:
        """A plan with how data pass along its edges, where ``runs`` is a table that tells bytes."""
        from prefect_slo.transform import with_passing

        if Path(self.runs).suffix == ".json":
            return plan
        workflow = self.read()
        return with_passing(plan, workflow, self.rows(workflow))

    def rows(self, workflow: Workflow) -> StageRuns:
        """The stage-run table; memory and vCPUs are tied by the workflow's price list where it has only one of them."""
        from prefect_slo.pricing import price_list
        from prefect_slo.tables import read_table

        tie = price_list(workflow.stages[0].menu.prices).mb_per_vcpu
        return read_table(self.runs) if tie is None else read_table(self.runs, mb_per_vcpu=tie)


@Parameter(name="*")
@dataclass(frozen=True)
class Bound:
    """What is promised."""

    latency: Annotated[str | None, Parameter(help="Bound on latency, e.g. 30s or 1m30s: the cheapest plan.")] = None
    budget: Annotated[str | None, Parameter(help="Bound on cost in US dollars, e.g. 0.02: the fastest plan.")] = None
    percentile: Annotated[float, Parameter(help="Fraction of runs that keep the bound.")] = 0.95
    confidence: Annotated[float, Parameter(help="How sure the plan is that they do.")] = 0.99

    def slo(self) -> Slo:
        """The objective: both bounds together ask for the cheapest plan that keeps both.

        Raises:
            InvalidValue: Neither bound is given, or one of them is none.
        """
        from prefect_slo.objective import Budget, Latency, Slo

        at = (self.percentile, self.confidence)
        latency = None if self.latency is None else Latency(self.latency, *at)
        budget = None if self.budget is None else Budget(self.budget, *at)
        if latency is not None or budget is not None:
            return Slo(latency, budget)
        raise InvalidValue("latency", None, "a bound: --latency 30s, --budget 0.02, or both")


def read_plan(path: Path, *, field: str = "plan") -> Plan:
    """A plan file.

    Raises:
        InvalidPlan: Missing, or no plan.
    """
    from prefect_slo.plan import Plan

    return Plan.from_document(_read_json(path, field))


def write_text(path: Path, text: str) -> None:
    """Write a file that the user named.

    Raises:
        InvalidValue: It can't be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidValue("output", str(path), f"a path that can be written ({error.strerror})") from None


def read_pins(pins: Sequence[str], *, field: str = "pin") -> dict[str, dict[str, Any]]:
    """``["train.workers=8"]`` as ``{"train": {"workers": 8}}``; the stage may hold dots, the choice may not.

    Raises:
        InvalidValue: Text of another form.
    """
    choices: dict[str, dict[str, Any]] = {}
    for pin in pins:
        left, equals, value = pin.partition("=")
        stage, dot, choice = left.rpartition(".")
        if not (equals and dot and stage and choice and value):
            raise InvalidValue(field, pin, "<stage>.<choice>=<value>, such as train.workers=8")
        choices.setdefault(stage, {})[choice.strip()] = _literal(value.strip())
    return choices


def _literal(text: str) -> object:
    """The number that ``text`` writes, else the text."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _read_json(path: Path, field: str) -> Any:
    kind = InvalidObservation if field == "model" else InvalidPlan
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise kind(field, str(path), f"a readable .json file ({error})") from None
