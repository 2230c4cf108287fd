"""GPUs of this machine: which there are, and what a worker is told so that it keeps to its share of one.

``CUDA_VISIBLE_DEVICES`` shows a worker its own device and no other. Whether it is held to its share of the cores is up
to NVIDIA's Multi-Process Service: where its control daemon runs, the driver gives a client no more than its percentage
of threads and no more memory than its limit. Without it sharers take turns on the whole device, and the memory limit
is what their libraries make of it: CuPy and JAX follow the variables set here, PyTorch takes
``torch.cuda.set_per_process_memory_fraction(float(os.environ["PREFECT_SLO_GPU_MEMORY_FRACTION"]))``.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from prefect_slo.errors import InvalidValue
from prefect_slo.placement import Device, Share

logger = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
NONE = "none"
FRACTION = "PREFECT_SLO_GPU_MEMORY_FRACTION"
_QUERY = ("--query-gpu=index,uuid,memory.total,mig.mode.current", "--format=csv,noheader,nounits")
_MIG = re.compile(r"^\s*MIG\s+\S*?(\d+)gb\S*\s+Device\s+\d+:\s+\(UUID:\s*(MIG-[^)\s]+)\)", re.MULTILINE | re.IGNORECASE)
_GPU = re.compile(r"^GPU (\d+):", re.MULTILINE)
_SMI_S, _MPS_S = 20.0, 5.0
_KEEP_S = 30.0
"""What a probe has found is believed for this long."""

_lock = threading.Lock()
_listed: list[tuple[str, Device]] | None = None
_mps: tuple[float, bool] = (-_KEEP_S, False)


def devices(named: Sequence[str] = (), *, environ: Mapping[str, str] | None = None) -> tuple[Device, ...]:
    """GPUs that this process may use: those named, else those that ``nvidia-smi`` lists; none where there is no such.

    Args:
        named: ``name:memory_mb`` of each, e.g. ``("0:16384", "1:16384")``, in place of the probe; ``none`` for none.
        environ: Environment, whose ``CUDA_VISIBLE_DEVICES`` narrows what the probe finds; by default this process'.

    Raises:
        InvalidValue: A name without its memory.
    """
    if tuple(named) == (NONE,):
        return ()
    if named:
        return tuple(_named(entry) for entry in named)
    return visible(_probed(), (os.environ if environ is None else environ).get(VISIBLE))


def visible(listed: Sequence[tuple[str, Device]], wanted: str | None) -> tuple[Device, ...]:
    """Devices that a value of ``CUDA_VISIBLE_DEVICES`` leaves, in its order; as in CUDA, up to the first unknown one.

    Args:
        listed: Indices and devices of the machine.
        wanted: The value; ``None`` leaves all.
    """
    if wanted is None:
        return tuple(device for _, device in listed)
    left: list[Device] = []
    for entry in (part.strip() for part in wanted.split(",")):
        match = [d for index, d in listed if entry and (entry == index or d.name.startswith(entry))]
        if len(match) != 1 or match[0] in left:
            break
        left += match
    return tuple(left)


def parse(query: str, listing: str = "") -> list[tuple[str, Device]]:
    """Indices and devices from what ``nvidia-smi`` prints.

    A device that is cut into MIG instances is used through these; they have no index of their own.

    Args:
        query: Lines of index, UUID, memory in MB and MIG mode.
        listing: What ``nvidia-smi -L`` prints, where a device is in MIG mode.
    """
    starts = list(_GPU.finditer(listing))
    ends = (*(match.start() for match in starts[1:]), None)
    parts = {match[1]: listing[match.start() : end] for match, end in zip(starts, ends, strict=False)}
    found: list[tuple[str, Device]] = []
    for line in query.splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) != 4 or not fields[2].isdigit():
            continue
        index, uuid, memory_mb, mig = fields
        if mig == "Enabled":
            # a profile's gigabytes are rounded up: taken as decimal ones they are never more than there is
            found += [
                ("", Device(id_, float(int(gb) * 10**9 // 2**20))) for gb, id_ in _MIG.findall(parts.get(index, ""))
            ]
        else:
            found.append((index, Device(uuid, float(memory_mb))))
    return found


def mps_runs(*, now: float | None = None) -> bool:
    """Whether an MPS control daemon answers, at ``CUDA_MPS_PIPE_DIRECTORY`` or where it is by default."""
    global _mps
    now = time.monotonic() if now is None else now
    with _lock:
        if now - _mps[0] >= _KEEP_S:
            answer = _asked(("nvidia-cuda-mps-control",), _MPS_S, "get_default_active_thread_percentage\n")
            _mps = (now, answer is not None and bool(re.match(r"\s*\d", answer)))
        return _mps[1]


def forget() -> None:
    """Probe anew when next asked."""
    global _listed, _mps
    with _lock:
        _listed, _mps = None, (-_KEEP_S, False)


def environment(share: Share, placed: Iterable[Device], *, mps: bool) -> dict[str, str]:
    """Variables of a worker that has a share of these devices.

    Args:
        share: Its share.
        placed: Its devices.
        mps: Whether the driver can hold it to its share.
    """
    placed = tuple(placed)
    told = {VISIBLE: ",".join(device.name for device in placed)}
    if share.gpu >= 1:
        return told
    (device,) = placed
    memory_mb = share.memory_on(device)
    return told | limits(Share(share.gpu, memory_mb), memory_mb / device.memory_mb, mps=mps)


def limits(share: Share, fraction: float | None = None, *, mps: bool) -> dict[str, str]:
    """Variables by which libraries, and with MPS the driver, hold a worker to a share of the one device that it sees.

    Args:
        share: Its share; nothing is said of whole devices.
        fraction: Of the device's memory; where it isn't known, that of the share unless it says how many MB.
        mps: Whether the driver can hold it to its share.
    """
    if share.gpu >= 1:
        return {}
    if fraction is None and not share.memory_mb:
        fraction = share.gpu
    told = {"PREFECT_SLO_GPU_SHARE": f"{share.gpu:g}"}
    if fraction is not None:
        told |= {FRACTION: f"{fraction:.4f}", "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.4f}"}
        told["CUPY_GPU_MEMORY_LIMIT"] = f"{100 * fraction:g}%"
    if share.memory_mb:
        told["PREFECT_SLO_GPU_MEMORY_MB"] = f"{share.memory_mb:.0f}"
        told["CUPY_GPU_MEMORY_LIMIT"] = f"{int(share.memory_mb * 2**20)}"
    if mps:
        told["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{100 * share.gpu:g}"
        if share.memory_mb:
            told["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={share.memory_mb:.0f}M"  # the first device that it sees
    return told


def _probed() -> list[tuple[str, Device]]:
    """What the machine has; asked until there is an answer."""
    global _listed
    with _lock:
        if _listed is None:
            query = _asked(("nvidia-smi", *_QUERY), _SMI_S)
            if query is None and shutil.which("nvidia-smi") is not None:
                return []  # it failed, and may do better later
            listing = (_asked(("nvidia-smi", "-L"), _SMI_S) or "") if query and "Enabled" in query else ""
            _listed = parse(query or "", listing)
        return _listed


def _asked(command: Sequence[str], timeout_s: float, told: str = "") -> str | None:
    """What a program prints; ``None`` where there is none, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("%s said nothing: %s", command[0], error)
        return None
    return done.stdout


def _named(entry: str) -> Device:
    name, _, memory_mb = str(entry).rpartition(":")
    try:
        return Device(name, float(memory_mb))
    except ValueError:
        raise InvalidValue("gpu_devices", entry, "name:memory_mb, e.g. '0:16384'") from None
