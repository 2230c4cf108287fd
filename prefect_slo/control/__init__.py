"""Decisions while a run is under way, as pure state machines: events in, actions out, no clock and no payloads.

The runner feeds ``Scheduler.handle(event, now)`` and does what it is told. Ids and times are all that passes, so a
recorded event log replays to the same actions.
"""

from prefect_slo.control.events import Action, Event, StageRule
from prefect_slo.control.scheduler import Scheduler

__all__ = ["Action", "Event", "Scheduler", "StageRule"]
