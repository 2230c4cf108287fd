"""What a process asks of Ray's autoscaler: told again where that failed, and said to whose flow runs it concerns."""

from __future__ import annotations

from concurrent.futures import Future
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from prefect_slo.runner.backends.ray_request import PAUSES_S, Request
from prefect_slo.runner.notices import once

LIMIT_S = 60.0
SHAPES = [{"CPU": 1.0}]


class Keeper:
    """An actor that fails so often before it answers."""

    def __init__(self, *fails: bool, answer: str = "") -> None:
        self.fails, self.answer = list(fails), answer
        self.asked: SimpleQueue[Any] = SimpleQueue()
        self.ask = SimpleNamespace(remote=self._asked)

    def _asked(self, job: str, shapes: Any) -> Any:
        reply: Future[str] = Future()
        if self.fails and self.fails.pop(0):
            reply.set_exception(RuntimeError("the actor has died"))
        else:
            reply.set_result(self.answer)
        self.asked.put(shapes)
        return SimpleNamespace(future=lambda: reply)


def request(keeper: Keeper) -> tuple[Request, SimpleQueue[float]]:
    paused: SimpleQueue[float] = SimpleQueue()
    return Request(lambda: keeper, lambda: "job", paused.put), paused


def test_a_keeper_that_has_just_ended_is_asked_again_after_a_pause():
    keeper = Keeper(True, True)
    asks, paused = request(keeper)
    asks.make("run", SHAPES, pytest.fail)
    assert [keeper.asked.get(timeout=LIMIT_S) for _ in range(3)] == [SHAPES] * 3
    assert [paused.get(timeout=LIMIT_S) for _ in range(2)] == list(PAUSES_S)


def test_what_could_not_be_told_is_said_to_the_flow_run_and_told_the_next_time():
    keeper, said = Keeper(True, True, True), SimpleQueue[str]()
    asks, _ = request(keeper)
    asks.make("run", SHAPES, said.put)
    assert "the actor has died" in said.get(timeout=LIMIT_S)
    assert [keeper.asked.get(timeout=LIMIT_S) for _ in range(3)] == [SHAPES] * 3
    asks.make("run", SHAPES, said.put)
    assert keeper.asked.get(timeout=LIMIT_S) == SHAPES
    asks.make("run", SHAPES, said.put)
    assert keeper.asked.empty(), "that has been heard"


def test_each_flow_run_hears_once_that_somebody_else_has_asked():
    keeper, said = Keeper(answer="Somebody else has asked."), dict[str, list[str]](one=[], two=[])
    asks, _ = request(keeper)
    notices = {run: once(said[run].append) for run in said}
    for shapes in (SHAPES, SHAPES * 2):
        for run, notice in notices.items():
            asks.make(run, shapes, notice)
    assert said == {"one": ["Somebody else has asked."], "two": ["Somebody else has asked."]}
