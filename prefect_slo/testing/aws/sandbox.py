"""One execution environment: AWS's own runtime client in a process, and the Runtime API that it talks to.

The process runs the unpacked deployment package. It sees the packages that Lambda's Python runtime brings (boto3) and
those it is given, and nothing else of this interpreter's, so that a handler that imports what was not deployed fails
here as it would there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from prefect_slo.testing.aws.shares import CpuLimit
from prefect_slo.testing.aws.watch import WATCH_S, Watch

RUNTIME_PACKAGES = (
    "awslambdaric", "runtime_client", "simplejson", "snapshot_restore_py",
    "boto3", "botocore", "s3transfer", "jmespath", "dateutil", "six", "urllib3",
)  # fmt: skip
"""What Lambda's runtime for Python brings, as this interpreter has it."""

SHUTDOWN_S = 1.0
"""How often a sandbox's server looks whether it is to end; nobody waits for that."""

INIT_LIMIT_S = 10.0
_CPU_CLOCK = 2  # Linux: the clock of another process's CPU time, in the low bits of its clock id
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
_EXITED, _FULL, _LATE = "#exited", "#full", "#late"
_WATCH = Watch()
_API = "/2018-06-01/runtime/"


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
    """

    def __init__(
        self,
        spec: Spec,
        folder: Path,
        packages: list[str],
        environment: dict[str, str],
        limit: CpuLimit | None = None,
    ) -> None:
        self.spec, self._limit = spec, limit
        self._inbox: SimpleQueue[tuple[str, bytes, float] | None] = SimpleQueue()
        self._outbox: SimpleQueue[tuple[str, bytes]] = SimpleQueue()
        self._ready = threading.Event()
        self._killing, self._killed = threading.Lock(), False
        self._server = _Server(("127.0.0.1", 0), _Api)
        self._server.sandbox = self
        threading.Thread(target=self._server.serve_forever, args=(SHUTDOWN_S,), daemon=True).start()
        self._log = folder / "log"
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self._begun = time.monotonic()
        opt, command = _opt(spec, folder)
        variables = {
            "PATH": os.pathsep.join([*_paths(opt, "bin"), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join([str(spec.code), *_paths(opt, "python", *_SITE), *packages]),
            **({"LD_LIBRARY_PATH": os.pathsep.join(_paths(opt, "lib"))} if _paths(opt, "lib") else {}),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(folder / "tmp"),
            "LAMBDA_TASK_ROOT": str(spec.code),
            "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{self._server.server_port}",
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
                [*command, sys.executable, "-S", "-s", "-m", "awslambdaric", spec.handler],
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
        self._inbox.put((request, body, time.time() + self.spec.timeout_s))
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
        self._server.shutdown()
        self._server.server_close()

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
        return Ended(payload, kind, took, used_mb=max(used, self._peak_mb()))

    def _look(self, request: str) -> None:
        """What the watch does: say that the process has ended, or holds more memory than it may."""
        if self._process.poll() is not None:
            self._outbox.put((_EXITED, request.encode()))
            return
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_bytes().split()[1])
        except (OSError, IndexError):
            return
        self._used_mb = max(self._used_mb, pages * _PAGE_MB)
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
        try:
            return time.clock_gettime((~self.pid << 3) | _CPU_CLOCK)
        except OSError:
            return 0.0

    def _new_log(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._read)
            written = log.read()
        self._read += len(written)
        return written.decode("utf-8", "replace")

    # ---- the Runtime API --------------------------------------------------------------------------------------------

    def next_event(self) -> tuple[str, bytes, float] | None:
        if self._limit is not None and not self._ready.is_set():
            self._limit.begin()
        self._ready.set()
        event = self._inbox.get()
        if event is None:
            self._inbox.put(None)  # for whoever else waits
        return event

    def ended(self, kind: str, payload: bytes) -> None:
        self._outbox.put((kind, payload))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    sandbox: Sandbox


class _Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        sandbox = self.server.sandbox
        event = sandbox.next_event()
        if event is None:
            self.close_connection = True
            return
        request, body, deadline = event
        headers = {
            "Lambda-Runtime-Aws-Request-Id": request,
            "Lambda-Runtime-Deadline-Ms": str(int(1000 * deadline)),
            "Lambda-Runtime-Invoked-Function-Arn": sandbox.spec.arn,
            "Content-Type": "application/json",
        }
        with contextlib.suppress(OSError):  # killed while it waited
            self._reply(200, body, headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = ""
        if self.path.endswith("/error"):
            with contextlib.suppress(ValueError):
                kind = str(json.loads(body).get("errorType", ""))
            kind = kind or self.headers.get("Lambda-Runtime-Function-Error-Type", "Unhandled")
        self._reply(202, b'{"status":"OK"}', {})
        self.server.sandbox.ended(kind, body)

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


_SITE = (f"python/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages",)
_MOUNTED = 'mount --bind "$0" /opt && exec "$@"'


def _opt(spec: Spec, folder: Path) -> tuple[Path | None, list[str]]:
    """Where a sandbox finds its layers, and what its command begins with so that it does.

    ``/opt`` itself where the system lets a process have file systems of its own; else a folder, which is on its paths.
    """
    if not spec.layers:
        return None, []
    opt = folder / "opt"
    for layer in spec.layers:  # later ones are laid over earlier ones
        shutil.copytree(layer, opt, dirs_exist_ok=True, symlinks=True)
    if _may_mount():
        return Path("/opt"), ["unshare", "--mount", "sh", "-c", _MOUNTED, str(opt)]
    return opt, []


def _paths(opt: Path | None, *names: str) -> list[str]:
    return [str(opt / name) for name in names] if opt is not None else []


@cache
def _may_mount() -> bool:
    """Whether a process here may have an ``/opt`` of its own; not where this Python itself lies there."""
    if Path(sys.prefix).is_relative_to("/opt") or Path(sys.base_prefix).is_relative_to("/opt"):
        return False
    if not Path("/opt").is_dir():
        return False
    try:
        tried = ["unshare", "--mount", "sh", "-c", _MOUNTED, "/tmp", "true"]
        return subprocess.run(tried, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def package_folder(folder: Path, names: tuple[str, ...]) -> str:
    """A folder with links to installed packages, and to nothing else beside them.

    Sandboxes that start at once may all be at it: whoever comes second finds a link there, and the folder is whole for
    each of them when this returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        target = Path(spec.origin)
        if target.name == "__init__.py":
            target = target.parent
        for installed in (target, *target.parent.glob(f"{name}.libs")):  # the latter: shared libraries of a wheel
            with contextlib.suppress(FileExistsError):
                (folder / installed.name).symlink_to(installed)
    return str(folder)


def _error(kind: str, message: str) -> bytes:
    return json.dumps({"errorType": kind, "errorMessage": message}).encode()
