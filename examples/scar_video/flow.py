"""SCAR's workflow for films, as a Prefect flow: each function of its file a task, each mode a pool.

A film is split into picture and sound, sound becomes subtitles, and objects in the picture get boxes. Here it runs in a
mocked AWS account with programs that stand in for the real ones; on AWS only the images, layers and queues differ.

    python flow.py                      # needs prefect-slo[testing] and Linux
"""

from __future__ import annotations

import array
import io
import math
import os
import subprocess
import tarfile
import tempfile
import wave
from pathlib import Path
from typing import Any, NamedTuple

from prefect import flow, task, unmapped

from prefect_slo import SLOTaskRunner, slo_task
from prefect_slo.aws.fdl import FdlFunction, load_fdl
from prefect_slo.runner.scar import pools_of
from prefect_slo.testing.aws import LocalAws, local_aws

FOLDER = Path(__file__).parent
WORKFLOW = FOLDER / "av-workflow.yaml"
STAND_INS = FOLDER / "stand_ins"


class File(NamedTuple):
    """A file on its way from function to function."""

    name: str
    content: bytes


def run_script(script: str, given: list[File]) -> list[File]:
    """Run a script on files as SCAR does: one at a time, what it leaves in its output folder is what it gives."""
    made = []
    for file in given:
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder) / file.name, Path(folder) / "out"
            source.write_bytes(file.content)
            out.mkdir()
            told = {"INPUT_FILE_PATH": str(source), "TMP_OUTPUT_DIR": str(out)}
            ran = subprocess.run(
                ["sh", "-ec", script], env={**os.environ, **told}, capture_output=True, text=True, check=False
            )
            if ran.returncode:
                raise RuntimeError(f"the script failed on {file.name}: {ran.stderr or ran.stdout}")
            made += [File(path.name, path.read_bytes()) for path in sorted(out.iterdir())]
    return made


@slo_task(pool="ffmpeg")
@task
def ffmpeg(film: File, script: str) -> list[File]:
    return run_script(script, [film])


@slo_task(pool="audio2srt")
@task
def audio2srt(files: list[File], script: str) -> list[File]:
    return run_script(script, files)


@slo_task(pool="yolov3")
@task
def yolov3(files: list[File], script: str) -> list[File]:
    return run_script(script, files)


def av_workflow(films: list[File], functions: dict[str, FdlFunction]) -> dict[str, bytes]:
    """What the workflow makes of films, by file name."""
    scripts = {name: (FOLDER / function.script).read_text() for name, function in functions.items()}
    split = ffmpeg.map(films, unmapped(scripts["ffmpeg"]))
    subtitles = audio2srt.map(split, unmapped(scripts["audio2srt"]))
    boxes = yolov3.map(split, unmapped(scripts["yolov3"]))
    return {file.name: file.content for made in (*subtitles.result(), *boxes.result()) for file in made}


def run(account: LocalAws, films: list[File], workflow: str | Path | dict[str, Any] = WORKFLOW) -> dict[str, bytes]:
    """Run the workflow of a file in a mocked account."""
    from prefect_slo.aws.fdl import read_fdl

    functions = (read_fdl(workflow) if isinstance(workflow, dict) else load_fdl(workflow))[1]
    layer = account.layer("stand-ins", STAND_INS)
    queue = account.batch.queue(f"jobs-{os.urandom(3).hex()}")
    pools = pools_of(
        functions, bucket=account.bucket, queue=queue, job={"poll_s": (0.05, 0.5), "region": "us-east-1"},
        role=account.role, layers=(layer,), region="us-east-1",
    )  # fmt: skip
    for pool in pools:
        pool.deploy()  # type: ignore[attr-defined]
    runner = SLOTaskRunner(pools=pools, max_workers=2)
    return flow(av_workflow, task_runner=runner, validate_parameters=False)(films, functions)


def images() -> dict[str, Path]:
    """The programs stand in for each image of the file."""
    return {function.image: STAND_INS for function in load_fdl(WORKFLOW)[1].values()}


def film(name: str, *, tones: tuple[tuple[float, float, int], ...], box: tuple[int, int, int, int], n: int = 6) -> File:
    """A film of ``n`` frames: a bright box that moves to the right, and tones as ``(from s, to s, Hz)``."""
    rate, width, height = 32_000, 64, 48
    left, top, right, bottom = box
    picture = [f"YUV4MPEG2 W{width} H{height} F10:1 Cmono\n".encode()]
    for number in range(n):
        frame = bytearray(width * height)
        for y in range(top, bottom + 1):
            frame[y * width + left + 2 * number : y * width + right + 2 * number + 1] = b"\xff" * (right - left + 1)
        picture.append(b"FRAME\n" + bytes(frame))
    samples = array.array("h", bytes(4 * int(rate * n / 10)))
    for begin, end, hertz in tones:
        for i in range(int(begin * rate), min(int(end * rate), len(samples) // 2)):
            samples[2 * i] = samples[2 * i + 1] = int(20_000 * math.sin(2 * math.pi * hertz * i / rate))
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for member, content in (("picture.y4m", b"".join(picture)), ("sound.wav", sound.getvalue())):
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return File(f"{name}.film", tar.getvalue())


if __name__ == "__main__":
    films = [film("one", tones=((0.1, 0.3, 440),), box=(4, 8, 11, 19)), film("two", tones=(), box=(0, 0, 3, 3))]
    with local_aws(gpus=1, images=images()) as account:
        for name, content in sorted(run(account, films).items()):
            print(f"{name}: {len(content)} bytes")
        jobs = account.batch.states["SUCCEEDED"]
        print(f"{len(account.lambdas.invocations)} invocations on Lambda, {jobs} jobs on Batch")
