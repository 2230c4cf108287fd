"""Whatever happens to workers, and whenever: every lease ends once, and every item is accounted for."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time

import pytest

from prefect_slo.resources import Size
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import Bundle, Finished, Lost, Opened, Progress


def make_step():
    def step(kind):  # not a module's function, so that it travels by value
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            sys.exit(3)
        if kind == "raise":
            raise ValueError
        if kind == "sleep":
            time.sleep(0.02)
        if kind == "hang":
            time.sleep(600)
        return kind

    return step


class Run:
    """One lease at a time, from a thread of its own: bundles, cancels, kills from outside, closes."""

    def __init__(self, backend, seed):
        self.backend, self.random = backend, random.Random(seed)
        self.reports, self.news = [], threading.Condition()
        self.sent = {}

    def sink(self, report):
        with self.news:
            self.reports.append(report)
            self.news.notify_all()

    def wait(self, lease, *kinds):
        def found():
            return [report for report in self.reports if report.lease == lease and isinstance(report, kinds)]

        with self.news:
            assert self.news.wait_for(found, 60), f"nothing of {kinds} for lease {lease}"
            return found()[-1]

    def live(self, program, leases):
        for lease in range(leases):
            self.backend.open(lease, Size(self.random.choice([0.5, 1, 2]), self.random.choice([256, 300])), self.sink)
            if self.random.random() < 0.15:
                self.backend.cancel(lease)
            self.use(lease, program)
            if not any(isinstance(report, Lost) and report.lease == lease for report in self.reports):
                self.backend.close(lease)

    def use(self, lease, program):
        opened = self.wait(lease, Opened, Lost)
        kinds = ["ok"] * 20 + ["sleep"] * 6 + ["kill", "exit", "raise", "hang"]
        for bundle in range(self.random.randrange(4)):
            if isinstance(opened, Lost):
                return
            payloads = [self.random.choice(kinds) for _ in range(self.random.randrange(1, 6))]
            bundle_id = lease * 100 + bundle
            self.sent[lease, bundle_id] = payloads
            program(self.backend, lease, bundle_id, payloads)
            fate = self.random.random()
            if fate < 0.1:
                self.backend.cancel(lease)
            elif fate < 0.2 and isinstance(opened, Opened):
                os.kill(opened.pid, signal.SIGKILL)
            with self.news:
                assert self.news.wait_for(lambda done=bundle_id: self.over(lease, done), 60)
            if any(isinstance(report, Lost) and report.lease == lease for report in self.reports):
                return

    def over(self, lease, bundle):
        return any(
            report.lease == lease and (isinstance(report, Lost) or getattr(report, "bundle", None) == bundle)
            for report in self.reports
            if isinstance(report, (Lost, Finished))
        )

    def check(self):
        for (lease, bundle), payloads in self.sent.items():
            mine = [report for report in self.reports if report.lease == lease]
            told = [
                item
                for report in mine
                if isinstance(report, Progress) and report.bundle == bundle
                for item in report.items
            ]
            lost = [report for report in mine if isinstance(report, Lost)]
            assert len(lost) <= 1
            assert [item.item for item in told] == list(range(len(told)))
            if any(isinstance(report, Finished) and report.bundle == bundle for report in mine):
                assert len(told) == len(payloads)
                continue
            assert lost, "a bundle without an end"
            if lost[0].bundle != bundle:
                assert not told
                continue
            untouched, running = lost[0].untouched, lost[0].running
            assert set(untouched) == set(range(len(payloads) - len(untouched), len(payloads)))
            assert not set(untouched) & {item.item for item in told}
            assert running is None or running not in {item.item for item in told} | set(untouched)
            if lost[0].reason == "timeout":
                assert payloads[running] == "hang"
            assert running in (None, len(payloads) - len(untouched) - 1)
            assert len(told) + len(untouched) + (running is not None) <= len(payloads)


@pytest.mark.parametrize("seed", range(3))
def test_every_lease_ends_once_and_every_item_is_accounted_for(ledger, seed, by_value):
    backend = ProcessBackend(ledger=ledger, max_idle=3, start="zygote")
    program, dumps = by_value
    step = program(make_step())

    def send(backend, lease, bundle, payloads):
        items = tuple((item, dumps(payload)) for item, payload in enumerate(payloads))
        backend.submit(lease, Bundle(bundle, "step", step, items, timeout_s=1.5))

    runs = [Run(backend, f"{seed} {n}") for n in range(3)]
    fronts = [ProcessBackend(_pool=backend._pool) for _ in runs]
    for run, front in zip(runs, fronts, strict=True):
        run.backend = front
    threads = [threading.Thread(target=run.live, args=(send, 12)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    stuck = [thread for thread in threads if thread.is_alive()]
    backend.shutdown()
    assert not stuck
    for run in runs:
        assert run.sent
        run.check()
    reports = [report for run in runs for report in run.reports]
    assert {"died", "cancelled"} <= {report.reason for report in reports if isinstance(report, Lost)}
    assert any(isinstance(report, Opened) and not report.cold for report in reports)
    assert sum(isinstance(report, Finished) for report in reports) > 5
    assert ledger.used() == 0
    assert backend.pids == ()
