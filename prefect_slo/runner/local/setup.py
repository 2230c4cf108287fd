"""What a worker takes over from its parent before it runs anything."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
from dataclasses import dataclass

from prefect_slo.runner.local.limits import limit_loaded_libraries, pin, thread_environment, threads_of

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Surroundings:
    """Where the parent stands: a worker that is used again is brought up to date with it.

    Attributes:
        environ: Whole environment, overrides included.
        path: ``sys.path``.
        cwd: Working directory.
    """

    environ: dict[str, str]
    path: tuple[str, ...]
    cwd: str

    @classmethod
    def current(cls, overrides: dict[str, str]) -> Surroundings:
        """Those of this process."""
        try:
            cwd = os.getcwd()
        except OSError:  # the directory was removed
            cwd = "/"
        # An empty entry means the working directory, which a worker can only know by its name.
        return cls({**os.environ, **overrides}, tuple(os.fsdecode(entry) or cwd for entry in sys.path), cwd)

    def for_worker(self, vcpus: float, overrides: dict[str, str]) -> Surroundings:
        """The same with threads of native libraries held to ``vcpus``, unless ``overrides`` says otherwise."""
        return Surroundings({**self.environ, **thread_environment(vcpus), **overrides}, self.path, self.cwd)

    def adopt(self) -> None:
        """Make this process stand there."""
        if os.environ != self.environ:
            for name in os.environ.keys() - self.environ.keys():
                del os.environ[name]
            os.environ.update(self.environ)
        sys.path[:] = self.path
        with contextlib.suppress(OSError):  # a directory that went away is the user's code's business
            os.chdir(self.cwd)


def end(pid: int) -> None:
    """End a process group, and its leader also when it hasn't made the group yet."""
    for how in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            how(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Birth:
    """First message to a worker.

    Attributes:
        surroundings: What to take over.
        vcpus: Which thread pools are held to.
        cores: Which it is bound to.
        preload: Modules to import before reporting.
    """

    surroundings: Surroundings
    vcpus: float
    cores: tuple[int, ...]
    preload: tuple[str, ...]

    def apply(self) -> None:
        """Become that worker."""
        self.surroundings.adopt()
        if self.cores:
            pin(0, self.cores)
        preload(self.preload)
        limit_loaded_libraries(threads_of(self.vcpus))
        if "numpy" in sys.modules:  # a fork of one process: the global generator would repeat in every worker
            import numpy as np

            np.random.seed()


def preload(modules: tuple[str, ...]) -> None:
    """Import what can be imported; what can't, whatever it raises, is left to the code that needs it."""
    for module in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(module)


def die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends (Linux), even while native code holds the interpreter."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
