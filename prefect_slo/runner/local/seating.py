"""Seats of leases: a share of a GPU first, where they want one, then a share of the machine's vCPUs.

Always in that order: whoever holds vCPUs never waits for a GPU, so that no two wait for each other. A device is never
overfilled, and a lease waits for its share of one as long as it takes; vCPUs it goes without when it has waited too
long, as their holder may be waiting for it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

from prefect_slo.errors import GpuShareTooLarge, InvalidValue
from prefect_slo.placement import check
from prefect_slo.runner.local.account import Account
from prefect_slo.runner.local.gpu_ledger import GpuClaim, GpuLedger
from prefect_slo.runner.local.gpus import devices_now, sharing_now
from prefect_slo.runner.local.ledger import Claim, Ledger
from prefect_slo.runner.local.member import Lease
from prefect_slo.runner.local.patience import Patience

logger = logging.getLogger(__name__)

_POLL_S = 0.02  # between two looks at an account while a lease waits
_AGAIN_S = 5.0  # before a share that could not be given back is given back again


class Seating:
    """The leases of one pool that wait for their seats, and the shares that are to be given back.

    Leases join and leave from any thread, at once. Accounts are asked by ``serve`` and ``give_back`` alone, which one
    thread calls and which may take a while.

    Args:
        ledger: The machine's vCPUs.
        gpus: Its GPUs; by default those that there are, looked for when a lease first asks for one.
        gpu_devices: GPUs by name and memory, in place of those that ``nvidia-smi`` lists.
        patience_s: How long the first lease in line waits for vCPUs before it goes without.
    """

    def __init__(
        self, ledger: Ledger, gpus: GpuLedger | None, *, gpu_devices: tuple[str, ...], patience_s: float
    ) -> None:
        self.ledger, self._gpus, self._named, self._patience_s = ledger, gpus, gpu_devices, patience_s
        self._patience, self._gpu_patience = Patience(patience_s), Patience(patience_s)
        self._lock = threading.Lock()
        self._for_gpus: list[Lease] = []
        self._for_vcpus: list[Lease] = []
        self._freed: list[tuple[Account[Any], Any]] = []
        self._unreleased: list[tuple[Account[Any], Any]] = []
        self._asked_in_vain = False

    def join(self, lease: Lease) -> None:
        """Get in line."""
        with self._lock:
            (self._for_gpus if lease.size.gpu else self._for_vcpus).append(lease)

    def leave(self, lease: Lease) -> None:
        """A lease is over: its seat is free, but for a share of a GPU that its worker holds as long as it lives."""
        with self._lock:
            for line in (self._for_gpus, self._for_vcpus):
                if lease in line:
                    line.remove(lease)
            self._free(lease.claim)
            if lease.worker is None:
                self._free(lease.gpus)

    def vacate(self, claim: GpuClaim | None) -> None:
        """The worker has ended that held a share of a GPU."""
        with self._lock:
            self._free(claim)

    @property
    def pending(self) -> bool:
        """Whether something is to be given back at once."""
        return bool(self._freed)

    @property
    def due(self) -> float:
        """When to serve or to give back again (monotonic); infinite where nothing waits."""
        if self._for_gpus or self._for_vcpus:
            return time.monotonic() + _POLL_S
        return time.monotonic() + _AGAIN_S if self._unreleased else math.inf

    def serve(self) -> Iterator[tuple[Lease, str]]:
        """Leases that have their seats now, in turn, and those that never will, with why."""
        yield from self._on_gpus()
        yield from self._on_vcpus()

    def give_back(self) -> None:
        """Give back what is free. What an account does not take is tried again: it would be lost to the machine."""
        with self._lock:
            freed, self._freed = [*self._unreleased, *self._freed], []
        self._unreleased = []
        for account, claim in freed:
            try:
                account.release(claim)
            except OSError as error:
                logger.warning("A share of this machine could not be given back yet (%s).", error)
                self._unreleased.append((account, claim))

    def _on_gpus(self) -> Iterator[tuple[Lease, str]]:
        with self._lock:
            line = list(self._for_gpus)
        for lease in line:
            try:
                seated = self._seat(lease)
            except (InvalidValue, GpuShareTooLarge) as error:
                if self._taken_out(self._for_gpus, lease):
                    yield lease, str(error)
                continue
            except OSError as error:  # nobody goes without a GPU: it is asked again
                if not self._asked_in_vain:
                    logger.warning("The account of GPUs could not be asked (%s); what wants one waits.", error)
                self._asked_in_vain = True
                continue
            self._asked_in_vain = False
            if seated:
                self._gpu_patience.served(time.monotonic())
                self._move_on(lease)

    def _seat(self, lease: Lease) -> bool:
        """Whether a lease has its share of a GPU, and what keeps it apart from others there is known."""
        share = lease.size.share
        assert share is not None  # only those that ask for one are here
        if self._gpus is None:
            found = devices_now(self._named)
            if found is None:
                self._say_waiting(lease, "nvidia-smi has not said yet which devices there are")
                return False
            check(share, found)  # there may be none for now: the program that lists them may do better later
            self._gpus = GpuLedger(found)
        claim = lease.gpus
        if claim is None:
            claim = self._gpus.claim(share)
            with self._lock:
                lease.gpus = claim
                if lease not in self._for_gpus:  # it has left meanwhile
                    self._free(claim)
        elif not claim.granted:
            self._gpus.retry(claim)
        if not claim.granted:
            held = ", ".join(f"{cores:g} of {name}" for name, (cores, _) in self._gpus.used().items())
            self._say_waiting(lease, f"other runs hold them ({held}), or more workers were asked for than fit")
            return False
        sharing = sharing_now() if share.gpu < 1 else "turns"
        lease.sharing = sharing or "turns"
        return sharing is not None

    def _say_waiting(self, lease: Lease, why: str) -> None:
        """That a lease waits is said now and again."""
        now = time.monotonic()
        if self._gpu_patience.look(lease.asked, now) == "wait":
            return
        if now - lease.asked >= self._patience_s:
            self._gpu_patience.served(now)
        waited_s = now - lease.asked
        logger.warning(
            "A worker has waited for %s for %.0f s. It goes on waiting: %s.", lease.size.share, waited_s, why
        )

    def _on_vcpus(self) -> Iterator[tuple[Lease, str]]:
        while self._for_vcpus:
            with self._lock:
                lease = next(iter(self._for_vcpus), None)
            if lease is None:
                return
            try:
                claim = self._claim(lease)
            except InvalidValue as error:
                if self._taken_out(self._for_vcpus, lease):
                    yield lease, str(error)
                continue
            if not claim.granted and not self._goes_without(lease, claim):
                return
            if self._taken_out(self._for_vcpus, lease):
                lease.granted = time.monotonic()
                self._patience.served(lease.granted)
                yield lease, ""

    def _claim(self, lease: Lease) -> Claim:
        """The lease's share of the machine, asked for or asked again."""
        claim = lease.claim
        try:
            if claim is not None:
                self.ledger.retry(claim)
                return claim
            claim = self.ledger.claim(lease.size.vcpus)
        except OSError as error:
            logger.warning("The vCPU ledger could not be asked (%s); a lease goes without a share.", error)
            with self._lock:
                self._free(claim)
            claim = Claim.unaccounted(lease.size.vcpus)
        with self._lock:
            lease.claim = claim
            if lease not in self._for_vcpus:  # it has left meanwhile
                self._free(claim)
        return claim

    def _goes_without(self, lease: Lease, claim: Claim) -> bool:
        """Whether a lease has waited for its share for so long that it goes without one."""
        verdict = self._patience.look(max(lease.asked, lease.seated), time.monotonic())
        if verdict == "wait":
            return False
        waits = (
            f"A worker of {lease.size.vcpus:g} vCPUs waits for its share of this machine, all of which other workers "
            f"hold (capacity: {self.ledger.capacity:g} vCPUs)."
        )
        if verdict == "say":
            logger.warning("%s It goes without one after %g s.", waits, self._patience_s)
            return False
        logger.warning(
            "%s It goes without one now, after %g s: more runs than was planned for.", waits, self._patience_s
        )
        with self._lock:
            self._free(claim)
            lease.claim = Claim.unaccounted(lease.size.vcpus)
        return True

    def _move_on(self, lease: Lease) -> None:
        """From the line for a GPU to that for vCPUs, unless it has left meanwhile."""
        with self._lock:
            if lease in self._for_gpus:
                self._for_gpus.remove(lease)
                self._for_vcpus.append(lease)
                lease.seated = time.monotonic()

    def _taken_out(self, line: list[Lease], lease: Lease) -> bool:
        """Take a lease out of a line; ``False`` where it has left it meanwhile."""
        with self._lock:
            if lease not in line:
                return False
            line.remove(lease)
            return True

    def _free(self, claim: Claim | GpuClaim | None) -> None:
        if isinstance(claim, Claim):
            self._freed.append((self.ledger, claim))
        elif claim is not None and self._gpus is not None:
            self._freed.append((self._gpus, claim))
