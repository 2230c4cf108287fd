"""The watch: has Prefect's API start the jobs of an office's pilots, and asks it, gently, what became of them.

Nothing depends on events being delivered, or on the API's being there all the time: what can't be asked now is asked
again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger

from prefect_slo.errors import WorkPoolUnusable
from prefect_slo.resources import Size
from prefect_slo.runner.workpool.contact import Contact
from prefect_slo.runner.workpool.jobs import Jobs

WAIT_AND_SEE = (408, 429)
"""Refusals of the API that say nothing of what was asked for."""

UNSTARTED = "has not started a job yet: look at its worker's log"
NO_ROOM = "has started them, and their workers wait for a share of their machine: others hold its GPUs or vCPUs"
"""Of jobs that are waited for: those that are not up, and those that are. The latter wait as long as it takes."""

LOOK_S = 2.0
"""Between two looks at the states of jobs."""

if TYPE_CHECKING:
    from prefect_slo.runner.workpool.office import Office


class Watch:
    """Speaks to the API for an office, one errand after another, in a thread of its own.

    Args:
        office: Whose pilots they are.
        jobs: The pool's jobs, for this thread alone.
        variables: Job variables of a size.
        context: In which the API is spoken to.

    Attributes:
        blocked: Whether the pool could start no job when it was last looked at.
    """

    def __init__(
        self, office: Office, jobs: Jobs, variables: Callable[[Size], Mapping[str, Any]], context: Context
    ) -> None:
        self._office, self._jobs, self._variables = office, jobs, variables
        self.blocked = False
        self._noticed = ""
        self._called_off: list[str] = []
        self._going_home: dict[UUID, str] = {}
        self._looked = office.clock()
        self._errands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="prefect-slo-watch", daemon=True)
        self._thread.start()

    def start(self, pilot: Contact) -> None:
        """Ask for a pilot's job; again later where the API is not there."""
        self._errands.put(lambda: self._start(pilot))

    def call_off(self, pilot: Contact) -> None:
        """Want a pilot's job no more, which may just be asked for; its box goes unless it runs, and reads it yet."""
        self._errands.put(lambda: self._call_off(pilot))

    def write_off(self, pilot: Contact, why: str) -> None:
        """A pilot's job is gone without having said so: no flow run is left running."""
        if (flow_run := pilot.flow_run) is not None:
            self._errands.put(lambda: self._jobs.crashed(flow_run, why))

    def end(self, patience_s: float) -> None:
        """Do what was asked for before, and no more; waits for that so long at most."""
        self._errands.put(None)
        self._thread.join(patience_s)

    # ---- errands ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        looked = 0.0
        while True:
            try:
                errand = self._errands.get(timeout=max(looked + LOOK_S - time.monotonic(), 0.01))
            except Empty:
                looked = time.monotonic()
                if not self._office.over.is_set():
                    self._carefully(self._look)
                continue
            if errand is None:
                for last in (self._clear_up, self._jobs.close):
                    self._carefully(last)
                return
            self._carefully(errand)

    def _carefully(self, errand: Callable[[], None]) -> None:
        try:
            errand()
        except Exception as error:  # the API may be back in a moment; jobs and mailboxes do without it
            get_logger("slo").debug("Prefect's API could not be asked about pool %r: %r", self._office.name, error)

    def _start(self, pilot: Contact) -> None:
        if pilot.gone.is_set():
            return
        office = self._office
        try:
            try:
                pilot.flow_run = self._ask_for(pilot)
            except ObjectNotFound:  # somebody has deleted the deployment
                self._jobs.prepare()
                pilot.flow_run = self._ask_for(pilot)
        except Exception as error:
            if isinstance(error, WorkPoolUnusable):
                pilot.lose("start", str(error))
                return
            code = getattr(getattr(error, "response", None), "status_code", 0)
            if (400 <= code < 500 and code not in WAIT_AND_SEE) or isinstance(error, ObjectNotFound):
                pilot.lose("start", f"its job in work pool {office.name!r} was refused: {error}")
                return
            if office.clock() - pilot.born > office.terms.give_up_s:
                pilot.lose("start", f"no job could be asked for in work pool {office.name!r}: {error!r}")
                return
            retry = threading.Timer(LOOK_S, self.start, [pilot])
            retry.daemon = True
            retry.start()

    def _ask_for(self, pilot: Contact) -> UUID:
        name = f"pilot-{self._office.name}-{pilot.box[-6:]}"
        return self._jobs.start(name, pilot.order(), self._variables(pilot.size))

    def _call_off(self, pilot: Contact) -> None:
        flow_run, found = pilot.flow_run, "unbegun"
        if flow_run is not None and (found := self._jobs.cancel(flow_run)) == "running":
            self._going_home[flow_run] = pilot.box
        elif found == "unbegun":
            self._office.clear(pilot.box)
        else:
            self._called_off.append(pilot.box)

    def _clear_up(self) -> None:
        """Delete boxes that nobody reads: of jobs that are over, or that their worker ends before they are up.

        What lies in that of a job that still runs is how it hears that it is to go; it deletes its box itself.
        """
        for box in self._called_off:
            self._office.clear(box)
        if self._going_home:
            states = self._jobs.states(self._going_home)
            for flow_run, box in self._going_home.items():
                state = states.get(flow_run)
                if flow_run not in states or (state is not None and state.is_final()):
                    self._office.clear(box)

    # ---- looks ------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        pilots = {pilot.flow_run: pilot for pilot in self._office.pilots if pilot.flow_run is not None}
        if not pilots:
            return
        states = self._jobs.states([flow_run for flow_run in pilots if flow_run is not None])
        looked, self._looked = self._looked, self._office.clock()
        scheduled = [run for run, state in states.items() if state is not None and state.type == StateType.SCHEDULED]
        for flow_run, pilot in pilots.items():
            state = states.get(flow_run) if flow_run is not None else None
            if flow_run not in states:
                pilot.job_ended("its flow run or its work pool was deleted")
            elif state is not None and state.is_final():
                words = f": {state.message}" if state.message else ""
                pilot.job_ended(f"its job has ended as {state.name}{words}")
            elif state is not None and state.type == StateType.SCHEDULED:
                self._office.call_off_spare(pilot)
        self._complain([pilot for pilot in pilots.values() if not pilot.ready and pilot.lease is not None])
        self._look_at_pool([pilots[flow_run] for flow_run in scheduled], looked)

    def _look_at_pool(self, scheduled: list[Contact], since: float) -> None:
        """Whether it can start jobs; what was waited for one since the look before is no start where it can't."""
        self.blocked = bool(scheduled or self._office.waited_for) and self._jobs.blocked()
        if not self.blocked:
            return
        for pilot in scheduled:
            pilot.blocked_s += self._looked - max(since, pilot.born)
        self._office.stall(since)

    def _complain(self, starting: list[Contact]) -> None:
        office, now = self._office, self._office.clock()
        late = [pilot for pilot in starting if now - pilot.since > office.terms.patience_s]
        if not late:
            self._noticed = self._noticed if starting else ""
            return
        unheard = [pilot for pilot in late if not pilot.heard_of]
        late, missing = (unheard, UNSTARTED) if unheard else (late, NO_ROOM)
        trouble = (self._jobs.trouble() if unheard else "") or missing
        if self._noticed != missing:
            self._noticed = missing
            lease = late[0].lease
            if lease is not None:
                lease.notice(
                    f"{len(late)} jobs have waited {now - late[0].since:.0f} s: work pool {office.name!r} {trouble}."
                )
        for pilot in unheard:
            if now - pilot.born > office.terms.give_up_s:
                pilot.lose("start", f"work pool {office.name!r} {trouble}")
