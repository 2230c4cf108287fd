"""AWS Lambda on this machine: moto keeps the functions, and their handlers really run, in sandboxes.

moto's ``LambdaFunction.invoke`` is where every invocation passes, whoever asks for it; it is replaced while a
``LocalLambda`` is open. Cold and warm starts, memory, timeouts, concurrency and the REPORT line are as Lambda has them.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from prefect_slo.errors import InvalidValue
from prefect_slo.testing.aws import kept
from prefect_slo.testing.aws.disk import own_file_systems, package_folder
from prefect_slo.testing.aws.guard import FAKE, WALL
from prefect_slo.testing.aws.sandbox import RUNTIME_PACKAGES, Ended, Sandbox, Spec
from prefect_slo.testing.aws.shares import cpu_limit

Cpu = Literal["shares", "modelled", "off"]
REQUEST_BYTES, REPLY_BYTES = 6_291_456, 6_291_556
EVENT_BYTES = 1_048_576
"""An asynchronous event, at most."""

LOG_TAIL_BYTES = 4096
THROTTLED_WAIT_S = (0.05, 1.0)
"""First and longest wait of an event that there is no room for; Lambda waits for minutes, and for six hours in all."""


@dataclass(frozen=True)
class Invocation:
    """One invocation that a ``LocalLambda`` has run.

    Attributes:
        function: Name of the function.
        memory_mb: Its memory.
        duration_ms: Time of the handler, as reported.
        init_ms: Time of the start, where it met one.
        billed_ms: What is billed.
        used_mb: Most memory used.
        error: Type of its error; empty for none.
        log: Its log, with START, END and REPORT.
    """

    function: str
    memory_mb: int
    duration_ms: float
    init_ms: float
    billed_ms: int
    used_mb: float
    error: str
    log: str


class Throttled(Exception):
    """An invocation that there is no room for."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"Rate Exceeded. ({reason})")


class LocalLambda:
    """Runs the functions that moto keeps.

    Args:
        concurrency: Invocations that the account may have at once; a function's reserved concurrency holds besides.
        cpu: ``shares``: a sandbox really has the share of its memory size (1 vCPU per 1,769 MB), by a control group's
            quota or, where none can be made, by being stopped in between; ``modelled``: an invocation takes as long as
            its CPU time would on that share (the difference is waited out and reported); ``off``: as long as it takes.
        cold_start_s: Added to the start of every sandbox.
        packages: Installed packages that sandboxes see beyond those of Lambda's own runtime, e.g. ``("numpy",)``;
            ``None`` for everything that is installed here.
        images: Folders that stand for container images, by URI: what is in one is what its handler sees beside Lambda's
            own runtime. Functions of other images are refused as they are invoked.
        own_tmp: Sandboxes have a ``/tmp`` of their own, for code that names paths there: as large as their function's
            disk, and empty but for what they run. What else lies in this machine's they don't see, such as files that a
            test has made.
        endpoint: Address of a server that stands for AWS, for the sandboxes' own calls.
        sleep: Waits; a test may pass its own.
    """

    def __init__(
        self,
        *,
        concurrency: int = 1000,
        cpu: Cpu = "off",
        cold_start_s: float = 0.0,
        packages: tuple[str, ...] | None = (),
        images: Mapping[str, Path] = MappingProxyType({}),
        own_tmp: bool = False,
        endpoint: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if own_tmp and own_file_systems() is None:
            raise InvalidValue("own_tmp", own_tmp, "False, or Linux as root or with user namespaces")
        self.concurrency, self.cpu, self.cold_start_s, self.endpoint = concurrency, cpu, cold_start_s, endpoint
        self.invocations: list[Invocation] = []
        self.throttled: Counter[str] = Counter()
        self._packages, self._sleep, self._own_tmp = packages, sleep, own_tmp
        self._folder = Path(tempfile.mkdtemp(prefix="prefect-slo-lambda-"))
        self._kept = kept.Kept(self._folder, images)
        self._lock = threading.Lock()
        self._idle: defaultdict[Spec, list[Sandbox]] = defaultdict(list)
        self._every: list[Sandbox] = []
        self._busy: Counter[str] = Counter()
        self._original: Any = None
        self._closing = threading.Event()

    # ---- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> LocalLambda:
        lambdas, functions = self, kept.moto_function()

        def invoke(function: Any, body: Any, request_headers: Any, response_headers: Any) -> Any:
            return lambdas._invoked(function, body, request_headers, response_headers)

        self._original, functions.invoke = functions.invoke, invoke
        kept.moto_paths()[kept.ACCOUNT_SETTINGS] = lambda request, url, headers: kept.account_settings(
            request, self.concurrency
        )
        return self

    def __exit__(self, *_: object) -> None:
        kept.moto_function().invoke = self._original
        kept.moto_paths().pop(kept.ACCOUNT_SETTINGS, None)
        self._closing.set()
        self.reap()
        shutil.rmtree(self._folder, ignore_errors=True)

    def reap(self) -> None:
        """End every sandbox: the next invocations are cold."""
        with self._lock:
            sandboxes, self._every = self._every, []
            self._idle.clear()
        for sandbox in sandboxes:
            sandbox.kill()

    @property
    def sandboxes(self) -> int:
        """How many there are."""
        with self._lock:
            return len(self._every)

    def kill(self, function: str | None = None) -> int:
        """Kill sandboxes where they stand, as an outage would; returns how many."""
        with self._lock:
            chosen = [sandbox for sandbox in self._every if function in (None, sandbox.spec.name)]
        for sandbox in chosen:
            sandbox.kill()
        return len(chosen)

    # ---- invocations ------------------------------------------------------------------------------------------------

    def run(self, spec: Spec, body: bytes, *, reserved: int | None = None) -> tuple[Invocation, bytes]:
        """Run one invocation; its reply beside what it took.

        Raises:
            Throttled: There is no room.
        """
        sandbox = self._admit(spec, reserved)
        request = str(uuid.uuid4())
        ended = Ended(b"", alive=False)
        try:
            ended = sandbox.invoke(request, body)
            self._model(ended, spec)
            if len(ended.payload) > REPLY_BYTES and not ended.error:
                ended.error = "Function.ResponseSizeTooLarge"
                words = f"Response payload size exceeded maximum allowed payload size ({REPLY_BYTES} bytes)."
                ended.payload = json.dumps({"errorType": ended.error, "errorMessage": words}).encode()
        finally:
            self._release(spec, sandbox, ended.alive)
        done = _reported(spec, request, ended)
        with self._lock:
            self.invocations.append(done)
        return done, ended.payload

    def _admit(self, spec: Spec, reserved: int | None) -> Sandbox:
        with self._lock:
            if reserved is not None and self._busy[spec.name] >= reserved:
                raise self._refused("ReservedFunctionConcurrentInvocationLimitExceeded")
            if sum(self._busy.values()) >= self.concurrency:
                raise self._refused("ConcurrentInvocationLimitExceeded")
            if self._closing.is_set():
                raise self._refused("CallerRateLimitExceeded")
            self._busy[spec.name] += 1
            while self._idle[spec]:
                idle = self._idle[spec].pop()
                if idle.alive:
                    return idle
                self._every.remove(idle)  # killed while it waited: nothing runs on it again
        try:
            if self.cold_start_s:
                self._sleep(self.cold_start_s)
            limit = cpu_limit(spec.share) if self.cpu == "shares" else None
            folder, packages = self._folder / uuid.uuid4().hex[:12], self._packages_seen()
            seen = self._seen(packages) if self._own_tmp else None
            sandbox = Sandbox(spec, folder, packages, self._environment(), limit, seen)
        except BaseException:
            with self._lock:
                self._busy[spec.name] -= 1
            raise
        with self._lock:
            self._every.append(sandbox)
            late = self._closing.is_set()
        if late:  # nobody else would end it
            sandbox.kill()
        return sandbox

    def _refused(self, reason: str) -> Throttled:
        self.throttled[reason] += 1
        return Throttled(reason)

    def _release(self, spec: Spec, sandbox: Sandbox, alive: bool) -> None:
        with self._lock:
            self._busy[spec.name] -= 1
            if not alive:
                self._every = [other for other in self._every if other is not sandbox]
            elif sandbox in self._every:
                self._idle[spec].append(sandbox)

    def _model(self, ended: Ended, spec: Spec) -> None:
        """Wait out what the invocation would have taken on its share of a vCPU, of which threads get no more either."""
        ended.init_ms += 1000 * self.cold_start_s if ended.init_ms else 0.0
        if self.cpu != "modelled" or spec.share >= 1 or ended.error in ("Sandbox.Timedout", "Runtime.OutOfMemory"):
            return
        extra_s = ended.cpu_s / spec.share - min(ended.cpu_s, ended.duration_ms / 1000)
        self._sleep(extra_s)
        ended.duration_ms += 1000 * extra_s

    def _seen(self, packages: list[str]) -> list[Path]:
        """What a sandbox runs, wherever it lies: the bed's own files, this Python, packages and images."""
        python = map(Path, (sys.prefix, sys.base_prefix, *packages))
        return [path.resolve() for path in (self._folder, WALL, *python, *self._kept.images.values())]

    def _packages_seen(self) -> list[str]:
        if self._packages is None:
            import sysconfig

            return [str(Path(__file__).parents[3]), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        return [package_folder(self._folder / "packages", (*RUNTIME_PACKAGES, *self._packages))]

    def _environment(self) -> dict[str, str]:
        return {**FAKE, **({"AWS_ENDPOINT_URL": self.endpoint} if self.endpoint else {})}

    # ---- what moto asks ---------------------------------------------------------------------------------------------

    def _invoked(self, function: Any, body: Any, request_headers: Any, response_headers: Any) -> Any:
        raw = body if isinstance(body, bytes) else (body or "").encode()
        headers = {str(name).lower(): value for name, value in dict(request_headers or {}).items()}
        if headers.get("x-amz-invocation-type") == "DryRun":
            return b""
        asynchronous = headers.get("x-amz-invocation-type") == "Event"
        if len(raw) > (most := EVENT_BYTES if asynchronous else REQUEST_BYTES):
            words = f"{len(raw)} byte payload is too large for the {most} bytes of this kind of invocation"
            raise kept.refusal(413, "RequestEntityTooLargeException", words)
        spec, reserved = self._kept.spec(function), kept.reserved(function)
        if asynchronous:
            told = (spec, raw, reserved, kept.retries(function))
            threading.Thread(target=self._asynchronous, args=told, daemon=True).start()
            return b""
        try:
            done, payload = self.run(spec, raw, reserved=reserved)
        except Throttled as error:
            raise kept.refusal(429, "TooManyRequestsException", str(error), Reason=error.reason) from None
        if done.error:
            response_headers["x-amz-function-error"] = "Unhandled"
        response_headers["x-amz-executed-version"] = spec.version
        response_headers["x-amz-log-result"] = base64.b64encode(done.log.encode()[-LOG_TAIL_BYTES:]).decode()
        return payload

    def _asynchronous(self, spec: Spec, raw: bytes, reserved: int | None, retries: int) -> None:
        """An event: as many more tries after an error as its function says, without Lambda's minutes between.

        One that there is no room for waits, and that is no try; of a function that never has room it is dropped.
        """
        tries, (wait_s, longest_s) = 0, THROTTLED_WAIT_S
        while tries <= retries and not self._closing.is_set() and reserved != 0:
            try:
                done, _ = self.run(spec, raw, reserved=reserved)
            except Throttled:
                self._sleep(wait_s)
                wait_s = min(2 * wait_s, longest_s)
                continue
            if not done.error:
                return
            tries += 1


def _reported(spec: Spec, request: str, ended: Ended) -> Invocation:
    """The invocation with its log; billed is the time of handler and start together, in whole milliseconds."""
    billed = math.ceil(round(ended.duration_ms, 2) + round(ended.init_ms, 2))
    report = (
        f"REPORT RequestId: {request}\tDuration: {ended.duration_ms:.2f} ms\tBilled Duration: {billed} ms\t"
        f"Memory Size: {spec.memory_mb} MB\tMax Memory Used: {math.ceil(ended.used_mb)} MB\t"
    )
    if ended.init_ms:
        report += f"Init Duration: {ended.init_ms:.2f} ms\t"
    if ended.error in ("Sandbox.Timedout", "Runtime.OutOfMemory"):
        report += f"Status: {'timeout' if ended.error == 'Sandbox.Timedout' else 'error'}\t"
    lines = f"START RequestId: {request} Version: {spec.version}\n{ended.log}"
    log = f"{lines}{'' if lines.endswith(chr(10)) else chr(10)}END RequestId: {request}\n{report}\n"
    return Invocation(
        spec.name, spec.memory_mb, ended.duration_ms, ended.init_ms, billed, ended.used_mb, ended.error, log
    )
