"""What sharing a GPU costs, and whether shares hold: ``python tests/benchmarks/gpu_sharing.py --out gpu_sharing.json``.

Processes run one compute-bound and one memory-bound kernel on one device, alone and two to four at a time: with their
share of threads enforced by NVIDIA's MPS, and without it (the device takes turns). Reported are throughputs, the slow-
down of a sharer against one alone on the whole device (what ``Interference`` takes), whether a share of the cores and a
limit of the memory hold, and whether a worker that was placed by this package sees its device alone.

It needs an NVIDIA GPU and CuPy or PyTorch, and of this package only what imports without Prefect. It starts an MPS
control daemon of its own where none runs and ends it; where MPS does not start, it says so and measures the rest. It
ends by itself within ``--limit`` seconds. ``--engine cpu`` tries the script itself on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import queue
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from prefect_slo.placement import Device, Interference, Share  # noqa: E402
from prefect_slo.resources import Size  # noqa: E402
from prefect_slo.runner.backends.processes import ProcessBackend  # noqa: E402
from prefect_slo.runner.backends.protocol import Bundle, Finished, Lost, Opened, Outcome, Progress  # noqa: E402
from prefect_slo.runner.local import gpus  # noqa: E402
from prefect_slo.runner.local.book import MemoryBook  # noqa: E402
from prefect_slo.runner.local.gpu_ledger import GpuLedger  # noqa: E402

KERNELS = ("compute", "memory")
PERCENTAGES = {1: 100, 2: 50, 3: 33, 4: 25}
START_S = 45.0  # import of a CUDA library and its first compilation
HOLDS = 1.25  # a share holds when a kernel bound by computing gets no more than this times it


# ---- what a measured process runs -----------------------------------------------------------------------------------


class Cupy:
    """Kernels in CUDA, compiled by NVRTC."""

    SOURCE = """
    extern "C" __global__ void compute(float* out, int rounds) {
        float a = threadIdx.x * 1e-7f, b = a + 1e-7f, c = b + 1e-7f, d = c + 1e-7f;
        for (int k = 0; k < rounds; ++k) {
            a = a * 0.999f + 1e-6f; b = b * 0.999f + 1e-6f; c = c * 0.999f + 1e-6f; d = d * 0.999f + 1e-6f;
        }
        if (a + b + c + d == 12345.0f) out[0] = a;
    }
    extern "C" __global__ void memory(const float* x, float* y, long n) {
        long step = (long)blockDim.x * gridDim.x;
        for (long k = blockIdx.x * (long)blockDim.x + threadIdx.x; k < n; k += step) y[k] = 0.5f * x[k] + y[k];
    }
    """

    def __init__(self) -> None:
        import cupy
        import numpy as np

        self._cupy = cupy
        module = cupy.RawModule(code=self.SOURCE)
        n = 64 * 2**20
        x, y = cupy.ones(n, dtype=cupy.float32), cupy.zeros(n, dtype=cupy.float32)
        compute, memory = module.get_function("compute"), module.get_function("memory")
        self._launch = {
            "compute": lambda: compute((4096,), (256,), (y, np.int32(20_000))),
            "memory": lambda: [memory((4096,), (256,), (x, y, np.int64(n))) for _ in range(8)],
        }

    def run(self, kernel: str) -> None:
        self._launch[kernel]()
        self._cupy.cuda.Stream.null.synchronize()

    def seen(self) -> dict[str, Any]:
        """What this process sees, and how much memory it can take from the driver itself."""
        runtime = self._cupy.cuda.runtime
        free, total = runtime.memGetInfo()
        taken, blocks = 0, []
        limit_mb = int(os.environ.get("PREFECT_SLO_GPU_MEMORY_MB", "0"))
        with contextlib.suppress(Exception):
            while limit_mb and taken < limit_mb + 2048:
                blocks.append(runtime.malloc(256 * 2**20))
                taken += 256
        for block in blocks:
            runtime.free(block)
        properties = runtime.getDeviceProperties(0)
        uuid = bytes(properties["uuid"])[:16].hex() if "uuid" in properties else ""
        return {
            "devices": runtime.getDeviceCount(),
            "uuid": uuid,
            "multiprocessors": int(properties["multiProcessorCount"]),
            "total_mb": total // 2**20,
            "free_mb": free // 2**20,
            "taken_mb": taken,
            "limit_mb": limit_mb,
        }


class Torch:
    """The same kinds of work from PyTorch's library of kernels."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.float32)
        x, y = (torch.ones(64 * 2**20, device="cuda") for _ in range(2))
        self._launch = {
            "compute": lambda: torch.mm(a, a),
            "memory": lambda: [y.add_(x, alpha=0.5) for _ in range(8)],
        }

    def run(self, kernel: str) -> None:
        self._launch[kernel]()
        self._torch.cuda.synchronize()

    def seen(self) -> dict[str, Any]:
        cuda = self._torch.cuda
        free, total = cuda.mem_get_info()
        limit_mb = int(os.environ.get("PREFECT_SLO_GPU_MEMORY_MB", "0"))
        taken, blocks = 0, []
        with contextlib.suppress(Exception):
            while limit_mb and taken < limit_mb + 2048:
                blocks.append(self._torch.empty(256 * 2**20, dtype=self._torch.uint8, device="cuda"))
                taken += 256
        properties = cuda.get_device_properties(0)
        return {
            "devices": cuda.device_count(),
            "uuid": str(getattr(properties, "uuid", "")).replace("-", ""),
            "multiprocessors": properties.multi_processor_count,
            "total_mb": total // 2**20,
            "free_mb": free // 2**20,
            "taken_mb": taken,
            "limit_mb": limit_mb,
        }


class Cpu:
    """Stands in where there is no GPU: shows that the script works, and nothing about GPUs."""

    def run(self, kernel: str) -> None:
        sum(k * k for k in range(20_000 if kernel == "compute" else 10_000))

    def seen(self) -> dict[str, Any]:
        shown = os.environ.get(gpus.VISIBLE, "")
        limit_mb = int(os.environ.get("PREFECT_SLO_GPU_MEMORY_MB", "0"))
        return {"devices": len(shown.split(",")), "uuid": shown, "taken_mb": limit_mb, "limit_mb": limit_mb}


ENGINES = {"cupy": Cupy, "torch": Torch, "cpu": Cpu}


def measured(engine: str, seconds: float) -> None:
    """A measured process: says what it sees, then runs each kernel for so long whenever it is told to."""
    work = ENGINES[engine]()
    for kernel in KERNELS:
        for _ in range(2):
            work.run(kernel)
    print(json.dumps({"ready": work.seen()}), flush=True)
    for line in sys.stdin:
        kernel, runs, begun = line.strip(), 0, time.monotonic()
        while time.monotonic() < begun + seconds:
            work.run(kernel)
            runs += 1
        print(json.dumps({"runs": runs, "seconds": time.monotonic() - begun}), flush=True)


class Look:
    """A program of this package's workers: what a worker sees of the GPU, after it has used it."""

    def open(self, emit: Any) -> Any:
        return self

    def __call__(self, item: int, payload: bytes) -> Outcome:
        engine = ENGINES[payload.decode()]()
        for kernel in KERNELS:
            engine.run(kernel)
        shown = {name: os.environ.get(name, "") for name in (gpus.VISIBLE, gpus.FRACTION)}
        return Outcome(json.dumps({**engine.seen(), **shown, "pid": os.getpid()}).encode())


# ---- processes, as the script sees them -----------------------------------------------------------------------------


@dataclass
class Sharer:
    """A measured process."""

    process: subprocess.Popen[str]
    _lines: queue.Queue[str] = field(default_factory=queue.Queue)

    @classmethod
    def start(cls, engine: str, seconds: float, environ: Mapping[str, str]) -> Sharer:
        command = [sys.executable, __file__, "--measured", engine, "--seconds", str(seconds)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environ}, start_new_session=True,
        )  # fmt: skip
        sharer = cls(process)
        threading.Thread(target=sharer._listen, daemon=True).start()
        return sharer

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """Its next line.

        Raises:
            RuntimeError: It ended, or said nothing in time.
        """
        try:
            line = self._lines.get(timeout=max(timeout_s, 0.1))
        except queue.Empty:
            raise RuntimeError(f"said nothing for {timeout_s:.0f} s") from None
        if not line:
            raise RuntimeError(self._last_words())
        read: dict[str, Any] = json.loads(line)
        return read

    def tell(self, kernel: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kernel}\n")
        self.process.stdin.flush()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def _last_words(self) -> str:
        assert self.process.stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stderr, selectors.EVENT_READ)
            said = os.read(self.process.stderr.fileno(), 65_536).decode() if selector.select(1) else ""
        return f"ended with {self.process.returncode}: {said.strip()[-600:]}"


@dataclass
class Bench:
    """Runs configurations while there is time.

    Attributes:
        engine: What processes run.
        seconds: How long each kernel is measured.
        deadline: When everything is to be over (monotonic).
    """

    engine: str
    seconds: float
    deadline: float

    def together(self, environs: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """Throughputs of processes that run at once, in launches a second by kernel; or what went wrong."""
        left = self.deadline - time.monotonic()
        if left < 3 * self.seconds + 8:
            return {"skipped": f"{left:.0f} s were left"}
        sharers = [Sharer.start(self.engine, self.seconds, environ) for environ in environs]
        try:
            return self._measured(sharers)
        except (RuntimeError, OSError, ValueError) as error:
            return {"failed": str(error)}
        finally:
            for sharer in sharers:
                sharer.end()

    def _measured(self, sharers: list[Sharer]) -> dict[str, Any]:
        seen = [sharer.answer(min(START_S, self.deadline - time.monotonic()))["ready"] for sharer in sharers]
        found: dict[str, Any] = {"seen": seen}
        for kernel in KERNELS:
            for sharer in sharers:
                sharer.tell(kernel)
            patience_s = min(self.seconds + 15, self.deadline + 5 - time.monotonic())
            answers = [sharer.answer(patience_s) for sharer in sharers]
            found[kernel] = [answer["runs"] / answer["seconds"] for answer in answers]
        return found


# ---- MPS ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mps() -> Iterator[tuple[dict[str, str], str]]:
    """Environment in which MPS is used, and why it is not (empty where it is). What is started here is ended here."""
    gpus.forget()
    if gpus.sharing() == "mps":
        yield {}, ""
        return
    if shutil.which("nvidia-cuda-mps-control") is None:
        yield {}, "there is no nvidia-cuda-mps-control"
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        own = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in own.values():
            Path(path).mkdir()
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            why = _control(["nvidia-cuda-mps-control", "-d"], "")[1]
            gpus.forget()
            yield own, "" if gpus.sharing() == "mps" else f"its control daemon does not answer: {why or _log(folder)}"
        finally:
            _control(["nvidia-cuda-mps-control"], "quit -t 5\n")
            _end_daemon(Path(own["CUDA_MPS_PIPE_DIRECTORY"]) / "nvidia-cuda-mps-control.pid")
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            gpus.forget()


def _control(command: Sequence[str], told: str) -> tuple[int, str]:
    """Run it; its output goes to a file, as a daemon that it leaves behind may keep a pipe open."""
    with tempfile.TemporaryFile("w+") as said:
        try:
            done = subprocess.run(command, input=told, stdout=said, stderr=said, text=True, timeout=15)
        except (OSError, subprocess.SubprocessError) as error:
            return 1, str(error)
        said.seek(0)
        return done.returncode, said.read().strip() if done.returncode else ""


def _end_daemon(pid_file: Path) -> None:
    """The daemon that was started here, where it did not leave when told to."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        for _ in range(20):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


def _log(folder: str) -> str:
    said = ""
    for path in Path(folder, "log").glob("*.log"):
        with contextlib.suppress(OSError):
            said += path.read_text()[-400:]
    return said.strip() or "it has logged nothing"


# ---- the measurement ------------------------------------------------------------------------------------------------


def measure(bench: Bench, device: Device) -> dict[str, Any]:
    """Every configuration on one device."""
    shown = {gpus.VISIBLE: device.name}
    report: dict[str, Any] = {"device": {"name": device.name, "memory_mb": device.memory_mb}}
    report["alone"] = bench.together([shown])
    report["turns"] = {k: bench.together([shown] * k) for k in (2, 3, 4)}
    with mps() as (own, why):
        report["mps"] = {"runs": not why, "why": why}
        if not why:
            percent = {p: {**shown, **own, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(p)} for p in PERCENTAGES.values()}
            report["mps_alone"] = {p: bench.together([percent[p]]) for p in (100, 50, 25)}
            report["mps_shared"] = {k: bench.together([percent[PERCENTAGES[k]]] * k) for k in (2, 3, 4)}
        told = own if not why else {}
        report["slot"] = slot(bench, device, told, mps=not why)
        try:
            report["workers"] = workers(bench, device, told)
        except Exception as error:  # what was measured so far is worth more than this
            report["workers"] = {"failed": repr(error)}
    report["summary"] = summary(report)
    return report


def slot(bench: Bench, device: Device, own: Mapping[str, str], *, mps: bool) -> dict[str, Any]:
    """What a worker sees that has a quarter of the device and 4,096 MB of its memory, by this package's own hand."""
    share = Share(0.25, min(4_096.0, device.memory_mb / 4))
    environ = gpus.environment(share, (device,), "mps" if mps else "turns")
    found = bench.together([{**environ, **own}])
    return {"share": str(share), "environment": environ, **found}


def workers(bench: Bench, device: Device, own: Mapping[str, str]) -> dict[str, Any]:
    """Three worker processes of this package with half a device each, on one device: the third has to wait."""
    left = bench.deadline - time.monotonic()
    if left < 15:
        return {"skipped": f"{left:.0f} s were left"}
    import gpu_sharing  # by its name, so that workers find it

    ledger = GpuLedger((device,), MemoryBook())
    backend = ProcessBackend(env=own, start="spawn", gpus=ledger)
    reports: queue.Queue[Any] = queue.Queue()
    size = Size(1, 8192, 0.5, "gpu")
    waits: dict[int, float] = {}
    looks: list[dict[str, Any]] = []
    most = 0.0
    try:
        for lease in (1, 2, 3):
            backend.open(lease, size, reports.put)
        while len(looks) < 3 and time.monotonic() < bench.deadline:
            report = reports.get(timeout=max(bench.deadline - time.monotonic(), 0.1))
            most = max(most, ledger.used()[device.name][0])
            if isinstance(report, Opened):
                waits[report.lease] = report.wait_s
                program = pickle.dumps(gpu_sharing.Look())
                items = ((report.lease, bench.engine.encode()),)
                backend.submit(report.lease, Bundle(report.lease, "look", program, items))
            elif isinstance(report, Progress):
                looks += [json.loads(item.outcome.payload) for item in report.items]
            elif isinstance(report, Finished):
                backend.close(report.lease)
            elif isinstance(report, Lost):
                return {"failed": report.detail}
    except queue.Empty:
        return {"failed": "a worker said nothing in time", "looks": looks}
    finally:
        backend.shutdown()
    return {
        "looks": looks,
        "each_sees_one_device": all(look["devices"] == 1 for look in looks),
        "waited_s": waits,
        "most_of_the_device_held": most,
        "left_held": ledger.used()[device.name][0],
    }


def _monotone(slowdown: Mapping[int, float]) -> dict[int, float]:
    """A lucky run of many sharers makes none faster than fewer."""
    return dict(zip(sorted(slowdown), accumulate((slowdown[k] for k in sorted(slowdown)), max), strict=True))


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Slow-downs and whether shares hold, by kernel."""
    found: dict[str, Any] = {}
    for kernel in KERNELS:
        whole = _mean(report["alone"], kernel)
        if whole is None:
            continue
        row: dict[str, Any] = {"alone_per_s": whole}
        for how in ("turns", "mps_shared"):
            means = {k: mean for k, run in report.get(how, {}).items() if (mean := _mean(run, kernel))}
            slowdown = {k: whole / mean for k, mean in means.items()}
            row[how] = {
                "slowdown": slowdown,
                "total_of_alone": {k: k * mean / whole for k, mean in means.items()},
                "interference": dict(Interference(_monotone({1: 1.0, **slowdown})).slowdown),
            }
        means = {p: mean for p, run in report.get("mps_alone", {}).items() if (mean := _mean(run, kernel))}
        row["mps_alone_of_whole"] = {p: mean / whole for p, mean in means.items()}
        if kernel == "compute":
            row["share_holds"] = {p: mean / whole <= HOLDS * p / 100 for p, mean in means.items() if p < 100}
        else:  # bandwidth is common: less than all cores may take all of it
            row["beside_others_of_alone_at_share"] = {
                k: _mean(run, kernel) / means[PERCENTAGES[k]]
                for k, run in report.get("mps_shared", {}).items()
                if PERCENTAGES[k] in means and _mean(run, kernel)
            }
        found[kernel] = row
    found["workers"] = report["workers"]
    seen = (report["slot"].get("seen") or [{}])[0]
    if seen:
        uuid = report["device"]["name"].removeprefix("GPU-").replace("-", "")
        found["slot"] = {
            "sees_one_device": seen["devices"] == 1,
            "sees_its_own": seen["uuid"] in (uuid, report["device"]["name"]),
            "memory_limit_holds": seen["taken_mb"] <= seen["limit_mb"],
            **seen,
        }
    return found


def _mean(run: Mapping[str, Any] | None, kernel: str) -> float | None:
    return statistics.mean(run[kernel]) if run and kernel in run else None


def table(report: Mapping[str, Any]) -> str:
    """The same for people."""
    rows = [f"{'configuration':<26}{'kernel':<10}{'each, of alone':>16}{'together':>10}{'slow-down':>11}"]
    runs = [("alone, whole device", 1, report["alone"])]
    runs += [(f"{k} in turns", k, run) for k, run in report["turns"].items()]
    runs += [(f"alone at {p} % (MPS)", 1, run) for p, run in report.get("mps_alone", {}).items()]
    runs += [(f"{k} at {PERCENTAGES[k]} % (MPS)", k, run) for k, run in report.get("mps_shared", {}).items()]
    runs += [("a worker's slot, 25 %", 1, report["slot"])]
    for name, k, run in runs:
        for kernel in KERNELS:
            whole, mean = _mean(report["alone"], kernel), _mean(run, kernel)
            if whole is None or mean is None:
                rows.append(f"{name:<26}{kernel:<10}{run.get('skipped') or run.get('failed') or 'nothing measured'}")
                continue
            rows.append(f"{name:<26}{kernel:<10}{mean / whole:>16.3f}{k * mean / whole:>10.3f}{whole / mean:>11.2f}")
    return "\n".join(rows)


def chosen_engine(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    said = ""
    for name in ("cupy", "torch"):
        command = [sys.executable, __file__, "--measured", name, "--seconds", "0"]
        try:
            tried = subprocess.run(command, input="", capture_output=True, text=True, timeout=START_S)
        except (OSError, subprocess.SubprocessError) as error:
            said += f"\n{name}: {error}"
            continue
        if tried.returncode == 0:
            return name
        said += f"\n{name}: {tried.stderr.strip()[-400:]}"
    raise SystemExit(f"Neither CuPy nor PyTorch reaches a GPU here.{said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the report, as JSON")
    parser.add_argument("--engine", choices=("auto", *ENGINES), default="auto")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each kernel is measured")
    parser.add_argument("--limit", type=float, default=110.0, help="when everything is over, in seconds")
    parser.add_argument("--measured", choices=tuple(ENGINES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measured:
        measured(options.measured, options.seconds)
        return
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # what was started here is ended
    listed = gpus.devices()
    print("devices:", *(listed or ("none",)), sep="\n  ", flush=True)
    if not listed and options.engine != "cpu":
        raise SystemExit("There is no NVIDIA GPU here (nvidia-smi lists none).")
    device = listed[0] if listed else Device("none", 16_384)
    engine = chosen_engine(options.engine)
    report = measure(Bench(engine, options.seconds, begun + options.limit), device)
    report |= {"engine": engine, "seconds": time.monotonic() - begun, "devices": [str(each) for each in listed]}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    print(json.dumps(report["summary"], indent=1))
    print(f"MPS: {report['mps']['why'] or 'used'}; engine {engine}; {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
