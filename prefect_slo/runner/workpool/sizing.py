"""From a worker's size to the job variables of a work pool, and whether the pool knows these variables.

Prefect stores a variable that a pool's base job template does not have, and ignores it: a job would run at any size.
Such a variable is refused here. The rules are data (``sizing.toml``).
"""

from __future__ import annotations

import copy
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from prefect.client.schemas.objects import WorkPool

from prefect_slo.errors import InvalidValue, WorkPoolUnusable
from prefect_slo.resources import Size
from prefect_slo.runner.workpool.gpu_resources import TURNS, GpuResource, told
from prefect_slo.units import whole

GPU_VARIABLE = "gpu_limit"
EXTENDED = ("kubernetes", "docker", "ecs")
"""Types whose template can be extended for GPUs."""


@dataclass(frozen=True)
class Rule:
    """One job variable.

    Attributes:
        of: ``vcpus``, ``memory_mb`` or ``gpu``.
        variable: Its name; dotted, a value in the table of that name.
        scale: Its unit in those of the size.
        steps: Values that there are; the next larger one is taken.
        multiple: It is a multiple of this.
        real: It need not be whole.
        scale_text: Times this when it is written down.
        text: How it is written down, with ``{}`` for the number.
        list: It is a list of this one table, in which ``"{}"`` stands for the number.
        optional: Left out where the pool has no such variable.
    """

    of: str
    variable: str
    scale: float = 1.0
    steps: tuple[float, ...] = ()
    multiple: float = 0.0
    real: bool = False
    scale_text: float = 1.0
    text: str = ""
    list: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False

    def __post_init__(self) -> None:
        if self.of not in ("vcpus", "memory_mb", "gpu"):
            raise InvalidValue("sizing.of", self.of, "vcpus, memory_mb or gpu")
        object.__setattr__(self, "steps", tuple(self.steps))

    @property
    def name(self) -> str:
        """The job variable that it sets or is a part of."""
        return self.variable.partition(".")[0]

    def value(self, amount: float) -> Any:
        """What the variable is set to for so much.

        Raises:
            InvalidValue: There is no step as large.
        """
        number = amount * self.scale
        if self.of == "gpu" and amount != math.floor(amount) and not self.real:
            raise InvalidValue("size.gpu", amount, "whole GPUs, as jobs here are given no share of one")
        if self.steps:
            larger = [step for step in self.steps if step >= number * (1 - 1e-9)]
            if not larger:
                raise InvalidValue(f"size.{self.of}", amount, f"at most {max(self.steps) / self.scale:g}")
            number = min(larger)
        elif self.multiple:
            number = round(math.ceil(number / self.multiple - 1e-9) * self.multiple, 6)
        elif not self.real:
            number = math.ceil(number - 1e-9)
        number *= self.scale_text
        plain = float(number) if self.real else int(number)
        written = self.text.format(plain) if self.text else plain
        if self.list:
            return [{key: written if part == "{}" else part for key, part in self.list.items()}]
        return written


@dataclass(frozen=True)
class Sizing:
    """How a type of work pool is told the size of a job.

    Attributes:
        rules: One for each variable.
        machines: By name, vCPUs and MB of machines to choose from.
        gpu_machines: Those that take a GPU.
        machine_variable: Variable that names the machine.
        gpus: Resources for GPUs that there may be, where the template says which there are.
        properties: Variables of the template, once they are known.
    """

    rules: tuple[Rule, ...] = ()
    machines: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    gpu_machines: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    machine_variable: str = ""
    gpus: tuple[GpuResource, ...] = ()
    properties: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_type(cls, kind: str) -> Sizing | None:
        """That of a type of work pool, such as ``docker``; a push pool is sized as its worker's type."""
        document = _documents().get(kind.removesuffix(":push"))
        return cls.read(document) if document is not None else None

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Sizing:
        """From a table as in ``sizing.toml``."""
        tables = {
            name: {machine: (float(v), float(mb)) for machine, (v, mb) in document.get(name, {}).items()}
            for name in ("machines", "gpu_machines")
        }
        rules = tuple(Rule(**rule) for rule in document.get("rules", ()))
        gpus = tuple(GpuResource(**resource) for resource in document.get("gpus", ()))
        return cls(rules, tables["machines"], tables["gpu_machines"], document.get("machine_variable", ""), gpus)

    def machine(self, size: Size) -> str:
        """The smallest machine that a size fits.

        Raises:
            InvalidValue: It fits none.
        """
        known = self.gpu_machines if size.gpu else self.machines
        enough = [(v, mb, name) for name, (v, mb) in known.items() if v >= size.vcpus and mb >= size.memory_mb]
        if not enough:
            raise InvalidValue("size", size, f"one that fits a machine: {', '.join(known)}")
        return min(enough)[2]


@cache
def _documents() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("sizing.toml").read_text())


def job_variables(
    sizing: Sizing, size: Size, *, overhead_mb: int = 0, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Job variables of a size.

    Args:
        sizing: Of the pool.
        size: Of the worker.
        overhead_mb: Memory that the job is given beyond it.
        given: Variables that are set in any case; where they say the size themselves, they win.

    Raises:
        InvalidValue: The pool has no job as large.
    """
    whole = replace(size, memory_mb=size.memory_mb + overhead_mb)
    variables: dict[str, Any] = {}
    if sizing.machine_variable:
        variables[sizing.machine_variable] = sizing.machine(whole)
    for rule in sizing.rules:
        amount = float(getattr(whole, rule.of))
        if amount:
            _put(variables, rule.variable, rule.value(amount))
    if sizing.gpus and size.share is not None:
        variables |= told(sizing.gpus, sizing.properties, size.share)
    return merged(variables, given or {})


def checked(pool: WorkPool, sizing: Sizing | None, sizes: Sequence[Size], given: Mapping[str, Any]) -> Sizing:
    """The sizing that holds on a pool, once it is known that the pool has every variable that it sets.

    Raises:
        WorkPoolUnusable: A variable that the base job template of the pool does not have, or a type without a sizing.
    """
    chosen = sizing or Sizing.of_type(pool.type)
    if chosen is None:
        known = ", ".join(_documents())
        raise WorkPoolUnusable(
            pool.name, f"is of type {pool.type!r}, whose sizes are not known ({known})", "Give sizing=."
        )
    properties = pool.base_job_template.get("variables", {}).get("properties", {})
    known_variables = set(properties)
    for name in given:
        if name not in known_variables:
            raise WorkPoolUnusable(pool.name, f"has no job variable {name!r}", _fix(pool, name))
    rules = tuple(rule for rule in chosen.rules if rule.name in known_variables or not rule.optional)
    needed = {chosen.machine_variable} - {""}
    needed |= {rule.name for rule in rules if any(getattr(size, rule.of) for size in sizes)}
    for name in sorted(needed - known_variables):
        raise WorkPoolUnusable(pool.name, f"has no job variable {name!r}, by which jobs are sized", _fix(pool, name))
    found = replace(chosen, rules=rules, properties=properties)
    with_gpu = [size for size in sizes if size.gpu] if pool.type != "process" else []
    if with_gpu and not chosen.gpus and not any(rule.of == "gpu" for rule in rules):
        raise WorkPoolUnusable(pool.name, "has no rule for GPUs", "Give sizing= with one, or sizes without.")
    if with_gpu and chosen.gpus and not any(resource.variable in known_variables for resource in chosen.gpus):
        raise WorkPoolUnusable(
            pool.name, f"has no job variable {GPU_VARIABLE!r}, by which jobs are sized", _fix(pool, GPU_VARIABLE)
        )
    for size in with_gpu:
        try:
            job_variables(found, size)
        except InvalidValue as error:
            if error.field != "size.gpu":
                continue  # jobs that are too large in other ways are refused when they are asked for
            raise WorkPoolUnusable(pool.name, f"cannot give {size}: {error}", _sharing(pool)) from None
    return found


def extended(pool: WorkPool, *, gpu_resource: str = "nvidia.com/gpu", turns: int = 0) -> dict[str, Any]:
    """The base job template of a pool with what sizes with a GPU need; the pool itself is left as it is.

    On Kubernetes variables that become limits of ``gpu_resource``: ``gpu_limit`` of whole devices, and for shares
    those of vGPU plugins (``tencent.com/vcuda-core``, and its memory), of partitions (``nvidia.com/mig-1g.10gb``) or of
    turns (``nvidia.com/gpu.shared``); a resource by another name is taken to be whole devices. On Docker
    ``container_create_kwargs``, for device requests and CPUs; on ECS ``resource_requirements`` of the
    container.

    Args:
        pool: The pool.
        gpu_resource: On Kubernetes, the resource.
        turns: Of ``nvidia.com/gpu.shared``, how many its plugin makes of a device (``replicas`` of its settings).

    Raises:
        WorkPoolUnusable: A type of pool whose jobs take no GPU by their template.
        InvalidValue: ``nvidia.com/gpu.shared`` without its number of turns.
    """
    template = copy.deepcopy(pool.base_job_template)
    properties = template.setdefault("variables", {}).setdefault("properties", {})
    job = template.setdefault("job_configuration", {})
    match pool.type:
        case "kubernetes":
            container = job["job_manifest"]["spec"]["template"]["spec"]["containers"][0]
            limits = container.setdefault("resources", {}).setdefault("limits", {})
            found = _resource(gpu_resource)
            for name, resource in found.names.items():
                title = name.replace("_", " ").title().replace("Gpu", "GPU")
                properties[name] = _variable(title, "integer", f"How many {resource} the job has.")
                limits[resource] = "{{ %s }}" % name  # noqa: UP031 (braces)
            if found.turns:
                properties[found.variable][TURNS] = whole(turns, "turns")
        case "docker":
            words = "Arguments of the container's creation, such as nano_cpus and device_requests."
            properties.setdefault("container_create_kwargs", _variable("Container Create Kwargs", "object", words))
            job.setdefault("container_create_kwargs", "{{ container_create_kwargs }}")
        case "ecs":
            words = "What the container has beside vCPUs and memory, such as GPUs."
            properties["resource_requirements"] = _variable("Resource Requirements", "array", words)
            container = job["task_definition"]["containerDefinitions"][0]
            container["resourceRequirements"] = "{{ resource_requirements }}"
        case _:
            raise WorkPoolUnusable(
                pool.name, f"is of type {pool.type!r}, which is not extended for GPUs", "Name another."
            )
    return template


def _resource(name: str) -> GpuResource:
    """A resource of the sizing data; one that isn't there counts whole devices."""
    sizing = Sizing.of_type("kubernetes")
    assert sizing is not None
    known = {resource.resource: resource for resource in sizing.gpus}
    return known.get(name, GpuResource(name, GPU_VARIABLE, 1))


def _sharing(pool: WorkPool) -> str:
    """What to do where a pool gives no such share."""
    if pool.type != "kubernetes":
        return "Ask for whole GPUs, or for shares on worker processes of a machine with GPUs, or on Ray."
    return (
        "Where the cluster has a plugin for shares, extend the template: prefect-slo pools extend "
        f"{pool.name} --gpu-resource nvidia.com/mig-1g.10gb (or tencent.com/vcuda-core, or nvidia.com/gpu.shared)."
    )


def _fix(pool: WorkPool, name: str) -> str:
    if name in (GPU_VARIABLE, "container_create_kwargs", "resource_requirements") and pool.type in EXTENDED:
        return f"Extend its template: prefect-slo pools extend {pool.name} -o template.json"
    return "Add it to the base job template, or give sizing= without it"


def _variable(title: str, kind: str, description: str) -> dict[str, Any]:
    return {"title": title, "description": description, "anyOf": [{"type": kind}, {"type": "null"}], "default": None}


def _put(variables: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        variables = variables.setdefault(part, {})
    variables[last] = value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Job variables with others laid over them, table by table."""
    laid = dict(base)
    for name, value in over.items():
        mine = laid.get(name)
        laid[name] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return laid
