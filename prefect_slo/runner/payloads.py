"""Making functions of modules that workers cannot import travel by value."""

from __future__ import annotations

import inspect
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
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


_INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})
_BY_VALUE_LOCK = threading.Lock()
_BY_VALUE: dict[str, Any] = {"depth": 0, "modules": []}


@contextmanager
def by_value() -> Iterator[None]:
    """Inside, what the user's own modules define is pickled by value: workers elsewhere have only what is installed."""
    with _BY_VALUE_LOCK:
        if _BY_VALUE["depth"] == 0:
            known = cloudpickle.list_registry_pickle_by_value()
            modules = [module for module in tuple(sys.modules.values()) if _is_users_own(module)]
            _BY_VALUE["modules"] = [module for module in modules if module.__name__ not in known]
            for module in _BY_VALUE["modules"]:
                cloudpickle.register_pickle_by_value(module)
        _BY_VALUE["depth"] += 1
    try:
        yield
    finally:
        with _BY_VALUE_LOCK:
            _BY_VALUE["depth"] -= 1
            if _BY_VALUE["depth"] == 0:
                for module in _BY_VALUE["modules"]:
                    cloudpickle.unregister_pickle_by_value(module)


def _is_users_own(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    name = getattr(module, "__name__", None)
    if not file or name == "__main__" or sys.modules.get(name or "") is not module:
        return False
    if str(name).partition(".")[0] == __name__.partition(".")[0]:
        return False
    return not str(file).startswith(_INSTALLED) and "site-packages" not in str(file)
