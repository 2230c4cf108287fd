"""Flows that commands take: by module or file, with the inputs to run them on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_slo.errors import InvalidValue

if TYPE_CHECKING:
    from prefect import Flow

ENTRY = "a flow by module or file, such as package.module:flow or path/to/file.py:flow"


def load_flow(entrypoint: str) -> Flow[Any, Any]:
    """The flow at ``module:name`` or ``path.py:name``; modules are also looked for in the working directory.

    Raises:
        InvalidValue: Nothing there, not a flow, or its code fails; the message says what happened.
    """
    from prefect.exceptions import MissingFlowError, ScriptError
    from prefect.flows import load_flow_from_entrypoint

    if ":" not in entrypoint:
        raise InvalidValue("flow", entrypoint, ENTRY)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except ScriptError as error:
        cause = error.user_exc if getattr(error, "user_exc", None) is not None else error
        raise InvalidValue("flow", entrypoint, f"{ENTRY} ({type(cause).__name__}: {cause})") from error
    except (MissingFlowError, ImportError, OSError) as error:
        raise InvalidValue("flow", entrypoint, f"{ENTRY} ({type(error).__name__}: {error})") from error


def load_object(entrypoint: str) -> Any:
    """What ``module:name`` or ``path.py:name`` names; modules are also looked for in the working directory.

    Raises:
        InvalidValue: Nothing there, or its code fails; the message says what happened.
    """
    from prefect.utilities.importtools import import_object

    expected = "package.module:name or path/to/file.py:name"
    if ":" not in entrypoint:
        raise InvalidValue("entry point", entrypoint, expected)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_object(entrypoint)
    except Exception as error:
        cause = getattr(error, "user_exc", None) or error
        raise InvalidValue("entry point", entrypoint, f"{expected} ({type(cause).__name__}: {cause})") from error


def read_inputs(params: Sequence[str], file: Path | None) -> list[dict[str, Any]]:
    """Parameters of runs: a list of inputs from a file, each with the single parameters on top.

    Raises:
        InvalidValue: A parameter that is not ``name=value``, or a file that holds no list of inputs.
    """
    single = dict(_param(param) for param in params)
    if file is None:
        return [single]
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidValue("params", str(file), f"a readable .json file ({error})") from None
    inputs = document if isinstance(document, list) else [document]
    if not inputs or not all(isinstance(entry, dict) for entry in inputs):
        raise InvalidValue("params", str(file), 'a list of inputs, such as [{"n": 10}, {"n": 100}]')
    return [{**entry, **single} for entry in inputs]


def _param(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InvalidValue("param", text, "name=value, such as n=100; values are JSON, or else text")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value
