"""Function Definition Language files of SCAR, read into a workflow.

A file lists functions with the paths that they read and write; one that reads what another writes comes after it. The
execution mode says where a function may run: that becomes its menu.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_slo.aws import limits
from prefect_slo.control.delegation import Mode
from prefect_slo.errors import InvalidWorkflow
from prefect_slo.resources import Menu, Pool, Size
from prefect_slo.units import items, positive, text, whole
from prefect_slo.workflow import Edge, Stage, Workflow

MODES: tuple[Mode, ...] = ("lambda", "lambda-batch", "batch")
DEFAULTS = {"memory": 512, "timeout": 300, "execution_mode": "lambda", "ephemeral_storage": 512}
BATCH_DEFAULTS = {"vcpus": 1, "memory": 1024, "enable_gpu": False}
"""What SCAR takes where a file says nothing."""

_BUCKET = "the workflow's bucket"
"""Functions and jobs of a file hand on over the same one."""


@dataclass(frozen=True)
class FdlFunction:
    """A function of a file.

    Attributes:
        name: Its name.
        mode: Where it runs.
        memory_mb: Memory on Lambda.
        timeout_s: Timeout on Lambda.
        batch: What a job has on Batch; ``None`` in mode ``lambda``.
        image: Its container image.
        script: The script that it runs.
        inputs: Paths that it reads.
        outputs: Paths that it writes.
        storage_mb: Temporary disk on Lambda.
    """

    name: str
    mode: Mode
    memory_mb: int
    timeout_s: int
    batch: Size | None
    image: str
    script: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    storage_mb: int = 512

    @property
    def pools(self) -> tuple[Pool, ...]:
        """Pools that its mode allows, the one that is tried first before."""
        size = Size(limits.vcpus(self.memory_mb), self.memory_mb, hardware="lambda")
        on_lambda = Pool("lambda", (size,), "aws-lambda-x86", handing_on="storage", storage=_BUCKET)
        if self.batch is None:
            return (on_lambda,)
        prices = "aws-ec2-gpu" if self.batch.gpu else "aws-fargate-x86"
        on_batch = Pool("batch", (self.batch,), prices, handing_on="storage", storage=_BUCKET)
        return (on_batch,) if self.mode == "batch" else (on_lambda, on_batch)


def load_fdl(path: str | Path) -> tuple[Workflow, dict[str, FdlFunction]]:
    """The workflow of a file, and its functions by name.

    Raises:
        InvalidWorkflow: The file is missing, is no YAML, or describes no workflow.
    """
    import yaml

    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidWorkflow("fdl", str(path), f"a readable .yaml file ({error})") from None
    return read_fdl(document, name=path.stem)


def read_fdl(document: object, *, name: str = "workflow") -> tuple[Workflow, dict[str, FdlFunction]]:
    """The workflow of a parsed file, and its functions by name.

    Raises:
        InvalidWorkflow: Functions of AWS are missing, or one has a value that it may not hold.
    """
    listed = _at(_at(document, "functions", "fdl"), "aws", "fdl.functions")
    entries = items(listed, "fdl.functions.aws")
    functions = [_function(entry, f"fdl.functions.aws[{n}]") for n, entry in enumerate(entries)]
    by_name = {function.name: function for function in functions}
    stages = []
    for function in functions:
        parents = [
            other.name
            for other in functions
            if other is not function and any(_feeds(out, into) for out in other.outputs for into in function.inputs)
        ]
        pools = function.pools
        menu = Menu(pools[0].prices or "local", sizes=pools[0].sizes, pools=pools)
        stages.append(Stage(function.name, tuple(Edge(parent, "item") for parent in parents), menu, "given"))
    return Workflow(name, tuple(stages)), by_name


def _function(entry: object, where: str) -> FdlFunction:
    told = {**DEFAULTS, **_table(_at(entry, "lambda", where), f"{where}.lambda")}
    name = text(told.get("name"), f"{where}.lambda.name")
    mode = told["execution_mode"]
    if mode not in MODES:
        raise InvalidWorkflow(f"{name}.execution_mode", mode, f"one of {', '.join(MODES)}")
    assert isinstance(entry, Mapping)
    batch = (
        None
        if mode == "lambda"
        else _batch({**BATCH_DEFAULTS, **_table(entry.get("batch", {}), f"{name}.batch")}, name)
    )
    container = _table(told.get("container", {}), f"{name}.container")
    return FdlFunction(
        name,
        mode,
        limits.memory_mb(told["memory"]),
        limits.timeout_s(told["timeout"]),
        batch,
        str(container.get("image", "")),
        str(told.get("init_script", "")),
        _paths(told.get("input", ()), f"{name}.input"),
        _paths(told.get("output", ()), f"{name}.output"),
        limits.storage_mb(told["ephemeral_storage"]),
    )


def _batch(told: Mapping[str, Any], name: str) -> Size:
    gpu = told["enable_gpu"]
    if not isinstance(gpu, bool):
        raise InvalidWorkflow(f"{name}.batch.enable_gpu", gpu, "true or false")
    memory = whole(told["memory"], f"{name}.batch.memory")
    return Size(positive(told["vcpus"], f"{name}.batch.vcpus"), memory, float(gpu), "gpu" if gpu else "batch")


def _paths(entries: object, where: str) -> tuple[str, ...]:
    paths = (text(_at(entry, "path", where), f"{where}.path") for entry in items(entries or (), where))
    return tuple(path.strip("/") for path in paths)


def _feeds(output: str, read: str) -> bool:
    """Whether what is written to a path arrives at one that is read: at it, or below it."""
    return output == read or output.startswith(f"{read}/")


def _at(document: object, name: str, where: str) -> Any:
    table = _table(document, where)
    if name not in table:
        raise InvalidWorkflow(f"{where}.{name}", None, "to be there")
    return table[name]


def _table(document: object, where: str) -> Mapping[str, Any]:
    if not isinstance(document, Mapping) or isinstance(document, Sequence):
        raise InvalidWorkflow(where, document, "a table")
    return document
