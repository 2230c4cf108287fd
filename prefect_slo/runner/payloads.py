"""Making functions of modules that workers cannot import travel by value."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import cloudpickle


def importable_by_workers(fn: Callable[..., Any]) -> None:
    """See to it that ``fn`` reaches a worker: by reference where its module is on ``sys.path``, by value elsewhere.

    A flow that Prefect loaded from a file, or a test module imported by path, is in ``sys.modules`` here under a name
    that means nothing, or something else, in another process.
    """
    module = inspect.getmodule(fn)
    if module is None or module.__name__ == "__main__" or _found_on_path(module.__name__, module.__file__):
        return
    if module.__name__ in sys.modules:
        cloudpickle.register_pickle_by_value(module)


def _found_on_path(name: str, file: str | None) -> bool:
    """Whether a fresh process with the same ``sys.path`` would import that very file under that name."""
    if file is None:
        return True
    path: list[str] | None = None
    spec = None
    parts = name.split(".")
    for depth in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: depth + 1]), path)
        if spec is None:
            return False
        path = list(spec.submodule_search_locations or ())
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(file).resolve()
