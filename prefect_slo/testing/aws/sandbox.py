"""One execution environment: AWS's own runtime client in a process, watched and timed.

The process runs the unpacked deployment package. It sees the packages that Lambda's Python runtime brings (boto3) and
those it is given, and nothing else of this interpreter's, so that a handler that imports what was not deployed fails
here as it would there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from prefect_slo.testing.aws.disk import Disk
from prefect_slo.testing.aws.guard import WALL
from prefect_slo.testing.aws.runtime_api import Event, RuntimeApi
from prefect_slo.testing.aws.shares import CpuLimit
from prefect_slo.testing.aws.watch import WATCH_S, Watch

RUNTIME_PACKAGES = (
    "awslambdaric", "runtime_client", "simplejson", "snapshot_restore_py",
    "boto3", "botocore", "s3transfer", "jmespath", "dateutil", "six", "urllib3",
)  # fmt: skip
"""What Lambda's runtime for Python brings, as this interpreter has it."""

_START = "import sitecustomize, runpy; runpy.run_module('awslambdaric', run_name='__main__', alter_sys=True)"
"""The runtime's client behind the wall, which Python does not import by itself where it sees no packages of its own."""

INIT_LIMIT_S = 10.0
_CPU_CLOCK = 2  # Linux: the clock of another process's CPU time, in the low bits of its clock id
_PAGE_MB, _TICKS_S = os.sysconf("SC_PAGE_SIZE") / 2**20, os.sysconf("SC_CLK_TCK")
_EXITED, _FULL, _LATE = "#exited", "#full", "#late"
_WATCH = Watch()


@dataclass(frozen=True)
class Spec:
    """A version of a function.

    Attributes:
        name: Its name.
        arn: Its ARN.
        version: ``$LATEST`` or a number.
        code: Folder of its unpacked package.
        handler: ``module.function``.
        memory_mb: Its memory.
        timeout_s: Its timeout.
        environment: Its variables.
        layers: Folders of its unpacked layers, in order; together they are ``/opt``.
        storage_mb: Its temporary disk.
    """

    name: str
    arn: str
    version: str
    code: Path
    handler: str
    memory_mb: int
    timeout_s: float
    environment: tuple[tuple[str, str], ...] = ()
    layers: tuple[Path, ...] = ()
    storage_mb: int = 512

    @property
    def share(self) -> float:
        """vCPUs that come with its memory."""
        return self.memory_mb / 1769


@dataclass
class Ended:
    """How one invocation ended in its sandbox.

    Attributes:
        payload: Its reply.
        error: Type of its error; empty for none.
        duration_ms: Time of the handler.
        init_ms: Time of the start, where it met one.
        cpu_s: CPU time.
        used_mb: Most memory used.
        log: What it wrote.
        alive: Whether the sandbox can serve another.
    """

    payload: bytes
    error: str = ""
    duration_ms: float = 0.0
    init_ms: float = 0.0
    cpu_s: float = 0.0
    used_mb: float = 0.0
    log: str = ""
    alive: bool = True


class Sandbox:
    """A process that runs a function's handler, one invocation at a time.

    Args:
        spec: The function.
        folder: For its log and its temporary files.
        packages: Folders of packages that it sees.
        environment: Variables beyond those of the function.
        limit: Keeps it to its share of the CPU; ``None`` for no limit.
        seen: Where it has a ``/tmp`` of its own, what it sees of this machine's; else ``None``.
    """

    def __init__(
        self,
        spec: Spec,
        folder: Path,
        packages: list[str],
        environment: dict[str, str],
        limit: CpuLimit | None = None,
        seen: Sequence[Path] | None = None,
    ) -> None:
        self.spec, self._limit = spec, limit
        self._inbox: SimpleQueue[Event | None] = SimpleQueue()
        self._outbox: SimpleQueue[tuple[str, bytes]] = SimpleQueue()
        self._ready = threading.Event()
        self._killing, self._killed = threading.Lock(), False
        self._api = RuntimeApi(self)
        self._disk, self._log = Disk.made(folder, spec.storage_mb, spec.layers, seen), folder / "log"
        self._begun = time.monotonic()
        variables = {
            **self._disk.variables,
            "PYTHONPATH": os.pathsep.join([str(WALL), str(spec.code), *self._disk.python, *packages]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LAMBDA_TASK_ROOT": str(spec.code),
            "AWS_LAMBDA_RUNTIME_API": self._api.address,
            "AWS_LAMBDA_FUNCTION_NAME": spec.name,
            "AWS_LAMBDA_FUNCTION_VERSION": spec.version,
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(spec.memory_mb),
            "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{spec.name}",
            "AWS_LAMBDA_LOG_STREAM_NAME": folder.name,
            "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
            **environment,
            **dict(spec.environment),
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._disk.own, sys.executable, "-S", "-s", "-P", "-c", _START, spec.handler],
                cwd=spec.code, env=variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        if limit is not None:
            limit.add(self._process.pid)
        self._fresh, self._used_mb = True, 0.0
        self._read = 0

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def invoke(self, request: str, body: bytes) -> Ended:
        """Run the handler on an event, within the function's limits."""
        init_ms = 0.0
        if self._fresh:
            self._fresh = False
            if (failed := self._start()) is not None:
                return failed
            init_ms = 1000 * (time.monotonic() - self._begun)
        begun, cpu = time.monotonic(), self._cpu_s()
        self._inbox.put(Event(request, body, time.time() + self.spec.timeout_s, self.spec.arn))
        ended = self._await(request, begun)
        ended.init_ms = init_ms
        ended.cpu_s = max(self._cpu_s() - cpu, 0.0) if ended.alive else 0.0
        ended.log = self._new_log()
        if not ended.alive:
            self.kill()
        return ended

    @property
    def alive(self) -> bool:
        """Whether its process is."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End its process, and everything that it started; once."""
        with self._killing:
            if self._killed:
                return
            self._killed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._limit is not None:
            self._limit.close()
        threading.Thread(target=self._close, daemon=True).start()  # its poll for shutdown takes a moment

    def _close(self) -> None:
        self._inbox.put(None)  # whoever waits there for its next event
        self._api.close()

    def _start(self) -> Ended | None:
        """Wait until its runtime asks for work; how it ended, where it doesn't."""
        deadline = self._begun + INIT_LIMIT_S + self.spec.timeout_s
        while not self._ready.wait(WATCH_S):
            if self._process.poll() is not None or not self._outbox.empty() or time.monotonic() > deadline:
                kind, payload = "Runtime.ExitError", _error("Runtime.ExitError", "Error: Runtime exited during init")
                with contextlib.suppress(Empty):
                    kind, payload = self._outbox.get_nowait()
                self.kill()
                return Ended(payload, kind, log=self._new_log(), alive=False)
        return None

    def _await(self, request: str, begun: float) -> Ended:
        """Wait for the reply to a request, or for what the watch finds in its place."""
        self._used_mb = 0.0
        deadline = begun + self.spec.timeout_s
        _WATCH.begin(self, lambda: self._look(request))
        try:
            while True:
                kind, payload = self._outbox.get(timeout=max(deadline - time.monotonic(), 0.0))
                if kind not in (_EXITED, _FULL) or payload == request.encode():  # not of an earlier one
                    break
        except Empty:
            kind, payload = _LATE, b""
        finally:
            _WATCH.end(self)
        took, used = 1000 * (time.monotonic() - begun), self._used_mb
        failed = f"RequestId: {request} Error: "
        if kind == _EXITED:
            code = self._process.poll() or 0
            how = f"signal: {'killed' if code == -9 else -code}" if code < 0 else f"exit status {code}"
            words = _error("Runtime.ExitError", f"{failed}Runtime exited with error: {how}")
            return Ended(words, "Runtime.ExitError", took, used_mb=used, alive=False)
        if kind == _FULL:
            words = _error("Runtime.OutOfMemory", f"{failed}Runtime exited with error: signal: killed")
            return Ended(words, "Runtime.OutOfMemory", took, used_mb=float(self.spec.memory_mb), alive=False)
        if kind == _LATE:
            words = _error("Sandbox.Timedout", f"{failed}Task timed out after {self.spec.timeout_s:.2f} seconds")
            return Ended(words, "Sandbox.Timedout", 1000 * self.spec.timeout_s, used_mb=used, alive=False)
        if not kind and self._disk.overfull:
            kind, payload = "OSError", _error("OSError", str(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        return Ended(payload, kind, took, used_mb=max(used, self._peak_mb()))

    def _look(self, request: str) -> None:
        """What the watch does: say that the process has ended, or holds more memory than it may."""
        if self._process.poll() is not None:
            self._outbox.put((_EXITED, request.encode()))
            return
        self._used_mb = max(self._used_mb, held_mb(self.pid, self.spec.memory_mb))
        if self._used_mb > self.spec.memory_mb:
            self._outbox.put((_FULL, request.encode()))

    def _peak_mb(self) -> float:
        """The most memory that the process has held so far."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0.0
        found = next((line for line in status.splitlines() if line.startswith("VmHWM")), "x 0")
        return int(found.split()[1]) / 1024

    def _cpu_s(self) -> float:
        """CPU time of the process, and of what it has started and waited for."""
        try:
            own = time.clock_gettime((~self.pid << 3) | _CPU_CLOCK)
            fields = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return 0.0
        return own + (int(fields[13]) + int(fields[14])) / _TICKS_S  # cutime and cstime, behind the name

    def _new_log(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._read)
            written = log.read()
        self._read += len(written)
        return written.decode("utf-8", "replace")

    # ---- what its runtime asks and tells ----------------------------------------------------------------------------

    def next_event(self) -> Event | None:
        """Wait for the next event; the first time its start is over."""
        if self._limit is not None and not self._ready.is_set():
            self._limit.begin()
        self._ready.set()
        event = self._inbox.get()
        if event is None:
            self._inbox.put(None)  # for whoever else waits
        return event

    def ended(self, kind: str, payload: bytes) -> None:
        """A reply, or an error of some kind."""
        self._outbox.put((kind, payload))


def held_mb(pid: int, limit_mb: float) -> float:
    """Memory that a process holds together with what its main thread has started, and so on.

    Pages that several of them share count for each, unless that makes more than the limit: then they count once.
    """
    every = _family(pid)
    held = sum(_resident_mb(each) for each in every)
    return held if held <= limit_mb or len(every) == 1 else sum(_own_mb(each) for each in every)


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_bytes().split()
    except OSError:
        return [pid]
    return [pid, *(one for child in children for one in _family(int(child)))]


def _resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE_MB
    except (OSError, IndexError):
        return 0.0


def _own_mb(pid: int) -> float:
    """Its resident memory, of what it shares with others its part."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_bytes().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(b"Pss:")), 0.0)


def _error(kind: str, message: str) -> bytes:
    return json.dumps({"errorType": kind, "errorMessage": message}).encode()
