"""Every error carries its data, says the next step, and survives the way from a worker process."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo import errors
from prefect_slo.errors import InfeasibleSlo, InvalidValue, Nearest, OutOfMemory, SloError

ERRORS = [
    errors.InvalidValue("percentile", 95, "a fraction in (0, 1)"),
    errors.InvalidWorkflow("stages", (), "at least one stage"),
    errors.InvalidPlan("plan.schema", 9, "1"),
    errors.InvalidObservation("wall_s (row 3)", -1.0, "a finite number above 0"),
    errors.UnknownStage("trian", ("train", "test")),
    errors.NothingProposed("letters", "no plan waits for approval", "Run replan first."),
    errors.OtherPlanProposed("letters", "3fa2b1", "9b1c44d0aa17"),
    errors.OtherPlanProposed("letters", "3fa2b1", ""),
    errors.SpendLimitReached(0.5, 0.5),
    errors.AwsRefused("CreateFunction", "AccessDeniedException: no", "Allow it."),
    errors.ResultLost("make", 8 << 20, "the Dask worker that kept it is gone"),
    errors.WorkPoolUnusable("gpu", "is paused", "Let it go on."),
    errors.UnknownPool("clout", ("process", "cloud"), "train"),
    errors.UnknownPrices("menu.prices", "moon", "one of local"),
    errors.UnknownFlow("letters", "Run it once."),
    errors.NotEnoughObservations("train", 2, 6, "Profile it with prefect-slo profile."),
    errors.InfeasibleSlo("p95 latency <= 12 s", Nearest(14.1, 14.1, 0.083), "train", 0.71),
    errors.InfeasibleSlo("p95 cost <= $0.01", Nearest(0.02, 40.0, 0.02), "train", 0.9),
    errors.InfeasibleSlo("p95 latency <= 12 s", None, "train", 0.0),
    errors.WorkerLost("train", "killed by signal 9", 2),
    errors.OutOfMemory("train", 1900.0, 1792.0),
    errors.OutOfMemory("train", 0.0, 1792.0, 2, "job 7 failed", on_batch=True),
    errors.TaskTimedOut("train", 30.0),
    errors.TaskTimedOut("train", 30.0, 2, "its function ran for 60 s"),
    errors.Unpicklable("train", "argument", "cannot pickle '_thread.lock' object"),
    errors.GpuShareTooLarge("0.5 GPU", ("0 with 16,384 MB",), "stage 'train'"),
    errors.NothingProposed("etl", "no plan waits for approval", "Run replan first."),
    errors.UnsupportedTaskRunner("MyRunner", ("ThreadPoolTaskRunner",)),
]


def test_no_error_class_is_left_out_here() -> None:
    def all_of(kind: type[SloError]) -> set[type[SloError]]:
        return {kind}.union(*(all_of(child) for child in kind.__subclasses__()))

    ours = {kind for kind in all_of(SloError) if kind.__module__ == errors.__name__}
    assert ours - {type(error) for error in ERRORS} == {SloError}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_crosses_a_process_border_unchanged(error: SloError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_value_errors_can_be_caught_as_such() -> None:
    assert isinstance(ERRORS[0], ValueError)
    assert not isinstance(ERRORS[-1], ValueError)


def test_an_infeasible_latency_says_bound_best_bottleneck_and_next_step() -> None:
    message = str(InfeasibleSlo("p95 latency <= 12 s", Nearest(14.1, 14.1, 0.083), "train", 0.71))
    assert message == (
        "p95 latency <= 12 s cannot be met: the best plan reaches 14.1 s at $0.083, and 'train' is 71% of its "
        "latency. Raise the bound to 14.1 s or widen the menu of 'train'."
    )


@given(st.floats(1e-6, 1e6))
def test_the_bound_that_is_advised_can_be_met(nearest: float) -> None:
    message = str(InfeasibleSlo("p95 latency <= 1 s", Nearest(nearest, nearest, 1.0), "train", 0.5))
    advised = float(message.split("Raise the bound to ")[1].split(" s ")[0])
    assert nearest * (1 - 1e-9) <= advised <= nearest * 1.0011


@given(st.floats(0, 1e6), st.floats(1, 1e6))
def test_the_memory_that_is_advised_is_more_than_was_there(peak_mb: float, limit_mb: float) -> None:
    advised = int(str(OutOfMemory("train", peak_mb, limit_mb)).split("memory_mb=")[1].split(")")[0])
    assert advised >= 1.25 * max(peak_mb, limit_mb)
    assert advised <= max(256, 2.5 * max(peak_mb, limit_mb))


@pytest.mark.parametrize("peak_mb", [float("inf"), float("nan"), 0.0, -1.0])
def test_a_peak_that_nobody_measured_still_makes_an_error(peak_mb: float) -> None:
    assert "memory_mb=1024" in str(OutOfMemory("train", peak_mb, 512.0))


def test_who_ran_out_of_memory_on_batch_is_told_what_to_raise_there() -> None:
    message = str(OutOfMemory("train", 0.0, 2048.0, 1, "on Lambda: this; then on Batch: that", on_batch=True))
    assert "BatchJobs(memory_mb=4096)" in message
    assert "slo_task" not in message
    assert message.endswith("on Lambda: this; then on Batch: that")


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


ENDLESS = {
    "text": "x" * 10**6,
    "list": list(range(10**6)),
    "digits": 10**5000,
    "broken": Broken(),
    "table": {i: i for i in range(10**5)},
}


@pytest.mark.parametrize("value", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_message_stays_short_whatever_was_passed(value: object) -> None:
    error = InvalidValue("workers", value, "a whole number")
    assert error.value is value
    assert len(str(error)) < 300
