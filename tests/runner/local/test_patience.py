"""A wait for a share of the machine is said once, and has an end."""

from __future__ import annotations

from prefect_slo.runner.local.patience import SAY_S, Patience


def test_a_wait_is_said_once_and_ends() -> None:
    patience = Patience(300)
    asked = 1000.0
    looks = [patience.look(asked, asked + waited) for waited in (0, SAY_S - 1, SAY_S, SAY_S + 1, 299, 300)]
    assert looks == ["wait", "wait", "say", "wait", "wait", "go"]


def test_the_next_in_line_waits_as_long_from_then_on() -> None:
    patience = Patience(300)
    assert patience.look(0.0, 300.0) == "go"
    patience.served(300.0)
    assert [patience.look(0.0, now) for now in (301.0, 300 + SAY_S, 599.0, 600.0)] == ["wait", "say", "wait", "go"]


def test_a_lease_that_asks_after_the_last_was_served_counts_from_when_it_asked() -> None:
    patience = Patience(300)
    patience.served(10.0)
    assert patience.look(200.0, 320.0) == "say"
    assert patience.look(200.0, 500.0) == "go"


def test_an_impatient_pool_says_so_before_it_goes_without() -> None:
    patience = Patience(2)
    assert [patience.look(0.0, now) for now in (0.5, 1.0, 1.5, 2.0)] == ["wait", "say", "wait", "go"]
