"""Facts about the machine and the versions that a run was measured with."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil


@cache
def machine_facts() -> Mapping[str, Any]:
    """Host name, kind of processor, vCPUs that this process may use, memory, and versions."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "host": platform.node(),
        "system": platform.system(),
        "processor": platform.machine(),
        "vcpus": usable,
        "memory_mb": psutil.virtual_memory().total // 2**20,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("prefect-slo", "prefect", "numpy")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
