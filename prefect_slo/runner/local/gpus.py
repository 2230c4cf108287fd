"""GPUs of this machine: which there are, and what a worker is told so that it keeps to its share of one.

A device goes by its UUID, whoever names it and however: what is held of it is one account. ``CUDA_VISIBLE_DEVICES``
shows a worker its own device and no other. Whether it is held to its share of the cores is up to NVIDIA's
Multi-Process Service (``mps``): the driver gives a client no more than its percentage of threads and no more memory
than its limit. Without it sharers take turns on the whole device, and the memory limit is what their libraries make of
it: CuPy and JAX follow the variables set here, PyTorch takes
``torch.cuda.set_per_process_memory_fraction(float(os.environ["PREFECT_SLO_GPU_MEMORY_FRACTION"]))``.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from prefect_slo.errors import InvalidValue
from prefect_slo.placement import Device, Share
from prefect_slo.runner.local.probe import Probe, output

VISIBLE = "CUDA_VISIBLE_DEVICES"
NONE = "none"
SHARE, FRACTION = "PREFECT_SLO_GPU_SHARE", "PREFECT_SLO_GPU_MEMORY_FRACTION"
_QUERY = ("--query-gpu=index,uuid,memory.total,mig.mode.current", "--format=csv,noheader,nounits")
_MIG = re.compile(r"^\s*MIG\s+\S*?(\d+)gb\S*\s+Device\s+\d+:\s+\(UUID:\s*(MIG-[^)\s]+)\)", re.MULTILINE | re.IGNORECASE)
_GPU = re.compile(r"^GPU (\d+):", re.MULTILINE)
_WHOLE = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}:")
_SMI_S, _MPS_S, _MPS_KEEP_S = 20.0, 5.0, 30.0

Sharing = Literal["mps", "turns"]
"""What keeps sharers of a device apart: NVIDIA's Multi-Process Service, or nothing, so that they take turns."""

Listed = list[tuple[str, Device]]
"""Indices and devices of a machine, as ``nvidia-smi`` counts them; partitions have no index."""

_UNHEARD: Listed = []
"""What holds where the program is there and says nothing."""


def devices(named: Sequence[str] = (), *, environ: Mapping[str, str] | None = None) -> tuple[Device, ...]:
    """GPUs that this process may use: those named, else those that ``nvidia-smi`` lists; none where there is no such.

    Args:
        named: ``name:memory_mb`` of each, e.g. ``("0:16384", "1:16384")``, in place of all that there are; ``none``
            for none.
        environ: Environment, whose ``CUDA_VISIBLE_DEVICES`` narrows what the probe finds; by default this process'.

    Raises:
        InvalidValue: A name without its memory, or one that ``nvidia-smi`` does not list beside others.
    """
    return () if tuple(named) == (NONE,) else _usable(_LISTED.get(), named, environ)


def devices_now(named: Sequence[str] = ()) -> tuple[Device, ...] | None:
    """The same without waiting; ``None`` while ``nvidia-smi`` is being asked.

    And as long as it hangs or fails, where somebody has named devices: nobody can say which an index or a part of a
    UUID means, and by that name it would have an account of its own beside the one that others hold shares in.
    """
    if tuple(named) == (NONE,):
        return ()
    listed = _LISTED.look()
    if listed is None or (listed is _UNHEARD and not all(_WHOLE.match(entry) for entry in named)):
        return None
    return _usable(listed, named, None)


def visible(listed: Listed, wanted: str | None) -> tuple[Device, ...]:
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


def parse(query: str, listing: str = "") -> Listed:
    """Indices and devices from what ``nvidia-smi`` prints.

    A device that is cut into MIG instances is used through these; they have no index of their own.

    Args:
        query: Lines of index, UUID, memory in MB and MIG mode.
        listing: What ``nvidia-smi -L`` prints, where a device is in MIG mode.
    """
    starts = list(_GPU.finditer(listing))
    ends = (*(match.start() for match in starts[1:]), None)
    parts = {match[1]: listing[match.start() : end] for match, end in zip(starts, ends, strict=False)}
    found: Listed = []
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


def sharing() -> Sharing:
    """What keeps sharers apart here: whether an MPS control daemon answers, where it is by default or where
    ``CUDA_MPS_PIPE_DIRECTORY`` says."""
    return _SHARING.get()


def sharing_now() -> Sharing | None:
    """The same without waiting; ``None`` while it is being asked."""
    return _SHARING.look()


def forget() -> None:
    """Probe anew when next asked."""
    global _LISTED, _SHARING
    _LISTED, _SHARING = _probes()


def environment(share: Share, placed: Sequence[Device], sharing: Sharing) -> dict[str, str]:
    """Variables of a worker that has a share of these devices.

    Args:
        share: Its share.
        placed: Its devices.
        sharing: What keeps it apart from others on its device.
    """
    told = {VISIBLE: ",".join(device.name for device in placed)}
    if share.gpu >= 1:
        return told | limits(share, sharing)
    (device,) = placed
    memory_mb = share.memory_on(device)
    return told | limits(Share(share.gpu, memory_mb), sharing, memory_mb / _memory_mb(device))


def limits(share: Share, sharing: Sharing, fraction: float | None = None) -> dict[str, str]:
    """Variables by which libraries, and with MPS the driver, hold a worker to a share of the one device that it sees.

    Args:
        share: Its share; whole devices are held to nothing.
        sharing: What keeps it apart from others on its device.
        fraction: Of the device's memory; where it isn't known, that of the share unless it says how many MB.
    """
    told = {SHARE: f"{share.gpu:g}"}
    if share.gpu >= 1:
        return told
    if fraction is None and not share.memory_mb:
        fraction = share.gpu
    if fraction is not None:
        told |= {FRACTION: f"{fraction:.4f}", "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.4f}"}
        told["CUPY_GPU_MEMORY_LIMIT"] = f"{100 * fraction:g}%"
    if share.memory_mb:
        told["PREFECT_SLO_GPU_MEMORY_MB"] = f"{share.memory_mb:.0f}"
        told["CUPY_GPU_MEMORY_LIMIT"] = f"{int(share.memory_mb * 2**20)}"
    if sharing == "mps":
        told["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{100 * share.gpu:g}"
        if share.memory_mb:
            told["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={share.memory_mb:.0f}M"  # the first device that it sees
    return told


def _usable(listed: Listed, named: Sequence[str], environ: Mapping[str, str] | None) -> tuple[Device, ...]:
    if not named:
        return visible(listed, (os.environ if environ is None else environ).get(VISIBLE))
    found = tuple(_named(entry, listed) for entry in named)
    if len({device.name for device in found}) < len(found):
        raise InvalidValue("gpu_devices", tuple(named), "every device once")
    return found


def _named(entry: str, listed: Listed) -> Device:
    """A device that somebody has named: the one of that index or UUID, where the machine shows any."""
    name, _, memory_mb = str(entry).rpartition(":")
    try:
        device = Device(name, float(memory_mb))
    except ValueError:
        raise InvalidValue("gpu_devices", entry, "name:memory_mb, e.g. '0:16384'") from None
    if not listed:  # nobody here can say whether it is there
        return device
    known = visible(listed, name)
    if len(known) != 1:
        there = ", ".join(f"{index or '-'} {each.name}" for index, each in listed)
        raise InvalidValue("gpu_devices", entry, f"the index or the UUID of a device that is here: {there}")
    if device.memory_mb > known[0].memory_mb:
        raise InvalidValue("gpu_devices", entry, f"at most the {known[0].memory_mb:,.0f} MB that the device has")
    return replace(device, name=known[0].name)


def _memory_mb(device: Device) -> float:
    """All of a device's memory, of which one that was named may have less."""
    whole = (each.memory_mb for _, each in _LISTED.look() or () if each.name == device.name)
    return next(whole, device.memory_mb)


def _list() -> Listed | None:
    if shutil.which("nvidia-smi") is None:
        return []
    query = output(("nvidia-smi", *_QUERY), _SMI_S)
    if query is None:
        return None  # it failed, and may do better later
    listing = (output(("nvidia-smi", "-L"), _SMI_S) or "") if "Enabled" in query else ""
    return parse(query, listing)


def _ask_mps() -> Sharing | None:
    answer = output(("nvidia-cuda-mps-control",), _MPS_S, "get_default_active_thread_percentage\n")
    return "mps" if answer is not None and re.match(r"\s*\d", answer) else "turns"


def _probes() -> tuple[Probe[Listed], Probe[Sharing]]:
    return (
        Probe("nvidia-smi", _list, _UNHEARD, "no GPU is used", timeout_s=_SMI_S, keep_s=math.inf),
        Probe(
            "nvidia-cuda-mps-control", _ask_mps, "turns", "sharers of a GPU take turns", timeout_s=_MPS_S,
            keep_s=_MPS_KEEP_S,
        ),
    )  # fmt: skip


_LISTED, _SHARING = _probes()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
