"""The calls of one flow run that are under way: what their workers have said of each, and how it ends by that."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prefect.logging import get_logger

from prefect_slo.control import events as control
from prefect_slo.plan import Record
from prefect_slo.runner import endings
from prefect_slo.runner.backends.protocol import ItemReport, Lost, Outcome
from prefect_slo.runner.calls import Call
from prefect_slo.runner.endings import Endings
from prefect_slo.runner.leases import Leases
from prefect_slo.runner.measure import Measure


class CallsUnderWay:
    """Calls from their submission to their end, by item. For the session's thread.

    Args:
        endings: Completes them.
        leases: Know what was sent together.
        measure: Hears what was measured of each.
        notice: Tells the user something, once each.
    """

    def __init__(
        self, endings: Endings, leases: Leases, measure: Measure, notice: Callable[[str, str | None], None]
    ) -> None:
        self._endings, self._leases, self._measure, self._notice = endings, leases, measure, notice
        self._calls: dict[int, Call] = {}
        self._reports: dict[int, ItemReport] = {}
        self._records: dict[int, Record] = {}

    def __getitem__(self, item: int) -> Call:
        return self._calls[item]

    def get(self, item: int) -> Call | None:
        """The call of an item; ``None`` where it has ended."""
        return self._calls.get(item)

    def add(self, call: Call) -> None:
        """A call was submitted."""
        self._calls[call.item] = call

    def sent(self, items: Iterable[int], record: Record) -> None:
        """Calls are on their way, to be recorded at that level."""
        self._records.update(dict.fromkeys(items, record))

    def stuck(self, item: int, error: BaseException) -> None:
        """A call cannot travel: it never left."""
        self._reports[item] = _unran(item, Outcome(b"", True, f"{type(error).__name__}: {error}"))

    def barred(self, item: int, error: BaseException) -> None:
        """A call never will run: something that it takes can't be had."""
        self._reports[item] = _unran(item, Outcome(error, True))

    def reported(self, lease: int, reports: Iterable[ItemReport]) -> list[control.Event]:
        """What the reports of a worker mean to the scheduler; what they say of each call is kept for its end."""
        done, stuck = [], []
        for whole in reports:
            together = self._leases.together(lease, whole.item)
            for report in endings.shares(whole, together):
                call = self._calls.get(report.item)
                if call is None:
                    continue
                self._reports[report.item] = report
                if report.outcome.unpicklable:
                    stuck.append(report)
                    continue
                self._measure.item(lease, report, ready=call.ready, batch=len(together))
                done.append(report.item)
        events: list[control.Event] = [control.ItemDone(lease, tuple(done))] if done else []
        for report in stuck:
            get_logger("slo").debug("Item of lease %s is stuck: %s", lease, report.outcome.unpicklable)
            if (pool := self._leases.pool_of(lease)) is not None and self._leases.capabilities(pool).hosted:
                stage = self._calls[report.item].stage
                self._notice(f"A call of stage {stage!r} cannot travel: {report.outcome.unpicklable}.", None)
            events.append(control.Rejected(lease, (report.item,), ran=not report.outcome.failed))
        return events

    def settle(self, ended: control.Settle, loss: Lost | None) -> None:
        """Calls are over.

        Args:
            ended: How, as the scheduler has it.
            loss: The loss of a worker that they end with, where they do.
        """
        for item in ended.items:
            if (call := self._calls.pop(item, None)) is None:
                continue
            report, record = self._reports.pop(item, None), self._records.pop(item, None)
            try:
                if ended.ending == "done" and report is not None:
                    self._endings.done(call, report, record)
                elif ended.ending == "cancelled" and (loss is None or item in loss.untouched):
                    self._endings.dropped(call)
                else:
                    self._endings.lost(call, ended.ending, ended.attempts, loss=loss, report=report)
            except BaseException as error:
                get_logger("slo").exception("The end of a call of stage %r could not be told.", call.stage)
                self._endings.broken(call, error)

    def abandon(self, error: BaseException) -> None:
        """The runner failed: all of them end with that."""
        for call in self._calls.values():
            self._endings.broken(call, error)
        self._calls.clear()


def _unran(item: int, outcome: Outcome) -> ItemReport:
    """Stands for the report of an item that no worker has run."""
    return ItemReport(item, outcome, 0.0, 0.0)
