"""SCAR's workflow for films runs from its file, in each of its modes, and its programs really change what they get."""

from __future__ import annotations

import importlib.util
import io
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from prefect_slo.errors import InvalidValue
from prefect_slo.testing.aws import LocalAws, local_aws

FLOW = Path(__file__).parents[2] / "examples" / "scar_video" / "flow.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("scar_video_example", FLOW)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def account(example: ModuleType) -> Iterator[LocalAws]:
    with local_aws(gpus=1, images=example.images()) as account:
        yield account


def check(made: dict[str, bytes]) -> None:
    """What the two films below must become."""
    assert set(made) == {f"{name}.{kind}" for name in ("one", "two") for kind in ("srt", "boxes", "boxed.y4m")}
    assert made["one.srt"].decode() == "1\n00:00:00,100 --> 00:00:00,300\n[a tone of 440 Hz]\n\n"
    assert made["two.srt"] == b"", "it is silent"
    boxes = [f"{n} {2 + n} 4 {5 + n} 9" for n in range(4)]  # half the film's size, a pixel to the right each frame
    assert made["one.boxes"].decode().splitlines() == boxes
    header, _, frames = made["one.boxed.y4m"].partition(b"\n")
    assert header.startswith(b"YUV4MPEG2 W32 H24")
    first = frames[6 : 6 + 32 * 24]
    assert first[4 * 32 + 2] == 128, "the corner of the box"
    assert first[6 * 32 + 3] == 255, "what is inside it"


@pytest.fixture
def films(example: ModuleType) -> list[Any]:
    return [
        example.film("one", tones=((0.1, 0.3, 440),), box=(4, 8, 11, 19), n=4),
        example.film("two", tones=(), box=(0, 0, 3, 3), n=4),
    ]


def test_the_stand_in_makes_a_real_sound_file(
    example: ModuleType, films: list[Any], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("PATH", str(example.STAND_INS / "bin"), prepend=":")
    script = (example.FOLDER / "scripts/ffmpeg.sh").read_text()
    sound, picture = example.run_script(script, films[:1])
    with wave.open(io.BytesIO(sound.content)) as read:
        assert (read.getframerate(), read.getnchannels(), read.getnframes()) == (16_000, 1, 6400)
    assert picture.content.startswith(b"YUV4MPEG2 W32 H24")
    with pytest.raises(RuntimeError, match=r"one\.film"):
        example.run_script("exit 3", films[:1])


def test_it_runs_by_its_file(prefect_server: str, example: ModuleType, account: LocalAws, films: list[Any]) -> None:
    before = account.batch.states["SUCCEEDED"]
    account.lambdas.invocations.clear()
    check(example.run(account, films))
    assert len(account.lambdas.invocations) == 4, "two films split, two sounds written down"
    assert account.batch.states["SUCCEEDED"] - before == 2, "two pictures looked at, on the GPU"
    assert account.batch.most_gpus == 1


@pytest.mark.parametrize(("mode", "jobs"), [("lambda", 2), ("batch", 6)])
def test_it_gives_the_same_in_each_mode(
    prefect_server: str, example: ModuleType, account: LocalAws, films: list[Any], mode: str, jobs: int
) -> None:
    document = yaml.safe_load(example.WORKFLOW.read_text())
    for entry in document["functions"]["aws"][:2]:
        entry["lambda"]["execution_mode"] = mode
    before = account.batch.states["SUCCEEDED"]
    check(example.run(account, films, document))
    assert account.batch.states["SUCCEEDED"] - before == jobs


def test_what_lambda_has_no_time_or_disk_for_goes_to_batch(
    prefect_server: str, example: ModuleType, account: LocalAws, films: list[Any], monkeypatch
) -> None:
    """A function that sleeps past its timeout gives the same, from a job."""
    document = yaml.safe_load(example.WORKFLOW.read_text())
    document["functions"]["aws"][1]["lambda"]["timeout"] = 1
    slow = 'if [ -n "$AWS_LAMBDA_FUNCTION_NAME" ]; then sleep 60; fi\n'
    original = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: (slow if self.name == "audio2srt.sh" else "") + original(self, *a, **k)
    )
    before = account.batch.states["SUCCEEDED"]
    account.lambdas.invocations.clear()
    check(example.run(account, films[:1] + films[1:], document))
    assert account.batch.states["SUCCEEDED"] - before == 4
    assert [one.error for one in account.lambdas.invocations].count("Sandbox.Timedout") == 2


def test_pools_need_a_queue_where_a_function_may_run_on_batch(example: ModuleType, account: LocalAws) -> None:
    functions = example.load_fdl(example.WORKFLOW)[1]
    with pytest.raises(InvalidValue, match="job queue"):
        example.pools_of(functions, bucket=account.bucket)
    ffmpeg, _, yolov3 = example.pools_of(functions, bucket=account.bucket, queue="q", gpu_queue="g", role=account.role)
    assert (ffmpeg.storage_mb, ffmpeg.timeout_s, ffmpeg.batch.queue) == (2048, 900, "q")
    assert (yolov3.jobs.queue, yolov3.jobs.gpu, yolov3.jobs.memory_mb) == ("g", 1, 12_288)
