"""Who is in a film: find its shots, take stills, even out their contrast, look for people.

``plain`` is a Prefect flow as it is; ``sized`` at the end is all that prefect_slo asks for. The last stage has two
variants, and which one a worker runs is a matter of where it is: see ``pools``.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

from film import Frame, bikes, prepared, shots, still
from people import Person, on_arrays, on_cores
from prefect import Flow, flow, task, unmapped

from prefect_slo import Plan, SLOTaskRunner, WorkPool, slo, slo_task
from prefect_slo.resources import Size

ARRAYS = "VIDEO_ARRAYS"
"""Environment variable that names the arrays of a worker's machine: ``cupy`` where there is a GPU, unset elsewhere."""


@slo_task(pool="cpu")
@task
def split(film: str, every: int) -> list[int]:
    """Frames to look at: the first of each shot, and every so many after it."""
    return [number for shot in shots(film) for number in shot[::every]]


@slo_task(pool="cpu")
@task
def extract(number: int, film: str) -> Frame:
    """A still."""
    return still(film, number)


@slo_task(pool="cpu")
@task
def preprocess(frame: Frame) -> Frame:
    """A still that light and shadow matter less in."""
    return prepared(frame)


@slo_task(batched=True, pool=("cpu", "gpu"), menu={"batch": (1, 2, 4, 8, 16, 32, 64)})
@task
def detect(frames: list[Frame]) -> list[list[Person]]:
    """People in stills, by OpenCV on cores or by array code on a GPU."""
    xp = arrays()
    return on_cores(frames) if xp is None else on_arrays(frames, xp)


def arrays() -> ModuleType | None:
    """What this worker's machine has for arrays, ``None`` where it has cores only."""
    name = os.environ.get(ARRAYS)
    return import_module(name) if name else None


@flow(name="video-analytics", validate_parameters=False)
def plain(film: str | None = None, every: int = 4) -> dict[int, list[Person]]:
    """People in a film, by the number of the frame; frames without any are left out."""
    film = film or str(bikes())
    numbers = split.submit(film, every)
    stills = extract.map(numbers, film=unmapped(film))
    found = detect.map(preprocess.map(stills))
    return {number: people for number, people in zip(numbers.result(), found.result(), strict=True) if people}


def pools(storage: str, device: str = "cupy") -> list[WorkPool]:
    """The work pools ``cpu`` and ``gpu``.

    Args:
        storage: A folder that the flow and both pools reach.
        device: Arrays of the workers in ``gpu``.
    """
    cpu = WorkPool("cpu", tuple(Size(v, 4096) for v in (1, 2, 4, 8)), storage, prices="aws-ec2-cpu", workers=(1,))
    env = {"env": {ARRAYS: device}}
    h100 = (Size(1, 4096, gpu=1, hardware="h100"),)
    return [cpu, WorkPool("gpu", h100, storage, prices="aws-ec2-gpu", workers=(1,), job_variables=env)]


def planned(plan: Plan, storage: str, device: str = "cupy") -> Flow[..., dict[int, list[Person]]]:
    """The flow by a plan, on the pools ``cpu`` and ``gpu``."""
    return plain.with_options(task_runner=SLOTaskRunner(plan, pools=pools(storage, device)))


def sized(storage: str, device: str = "cupy") -> Flow[..., dict[int, list[Person]]]:
    """The flow with a deadline, on the pools ``cpu`` and ``gpu``."""
    return slo(latency="30s", pools=pools(storage, device))(plain)


if __name__ == "__main__":
    for number, people in plain().items():
        print(f"frame {number}: {len(people)} at {', '.join(f'{p.left},{p.top}' for p in people)}")
