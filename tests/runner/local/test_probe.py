"""Programs that are asked what they know: believed for a while, and left alone where they hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from prefect_slo.runner.local.probe import Probe, output


class Program:
    """Says what it is told to, or hangs until it is let go."""

    def __init__(self) -> None:
        self.says: str | None = "yes"
        self.asked = 0
        self.let_go = threading.Event()
        self.let_go.set()

    def ask(self) -> str | None:
        self.asked += 1
        self.let_go.wait(60)
        return self.says


class Scene:
    def __init__(self) -> None:
        self.now = 1000.0
        self.program = Program()
        self.probe = Probe(
            "program", self.program.ask, "no", "there is none", timeout_s=5, keep_s=30, clock=lambda: self.now
        )

    def heard(self) -> str:
        """What holds once the program has had its say."""
        deadline = time.monotonic() + 30
        while (known := self.probe.look()) is None or self.probe._asked is not None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return known


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.program.let_go.set()


def test_an_answer_is_believed_for_a_while(scene: Scene) -> None:
    assert scene.probe.get() == "yes"
    scene.program.says = "maybe"
    scene.now += 29
    assert scene.probe.get() == "yes"
    scene.now += 2
    assert scene.probe.get() == "maybe"
    assert scene.program.asked == 2


def test_a_program_that_fails_is_asked_again_after_a_while(scene: Scene) -> None:
    scene.program.says = None
    assert [scene.probe.get(), scene.probe.get()] == ["no", "no"]
    assert scene.program.asked == 1
    scene.program.says = "yes"
    scene.now += 31
    assert scene.probe.get() == "yes"


def test_while_it_is_asked_for_the_first_time_nothing_is_known(scene: Scene) -> None:
    scene.program.let_go.clear()
    assert scene.probe.look() is None
    scene.now += 4
    assert scene.probe.look() is None
    scene.program.let_go.set()
    assert scene.heard() == "yes"


def test_one_that_hangs_is_done_without_and_left_alone_for_longer_each_time(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.program.let_go.clear()
    assert scene.probe.look() is None
    scene.now += 5
    assert scene.probe.look() == "no"
    assert "program has not answered for 5 s: there is none. It is asked again in 60 s" in caplog.text
    scene.now += 61
    assert scene.probe.look() == "no", "nobody waits for it again"
    assert "in 120 s" in caplog.text
    assert scene.program.asked == 1, "what still hangs is not asked a second time"


def test_an_answer_that_comes_late_counts(scene: Scene) -> None:
    scene.program.let_go.clear()
    scene.probe.look()
    scene.now += 5
    assert scene.probe.look() == "no"
    scene.program.let_go.set()
    assert scene.heard() == "yes"


def test_what_ends_a_program_that_hangs_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert output(("sleeper",), 0.1) is None
    (tmp_path / "sleeper").write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    (tmp_path / "sleeper").chmod(0o755)
    with pytest.raises(TimeoutError):
        output(("sleeper",), 0.1)
