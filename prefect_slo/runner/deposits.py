"""Results that stay where they were made until somebody asks for them.

Where a backend keeps a part of an outcome (``apart``), the flow's process gets a state whose record brings its value
when it is first read (``KeptRecord``): Prefect, the flow and whoever takes the state read it as any other. One that is
lost is made again by the call that made it, once, where that call may run again (``remaking``).
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from decimal import Decimal
from typing import Any

from prefect.client.schemas.objects import State
from prefect.results import ResultRecord, ResultRecordMetadata  # type: ignore[attr-defined]
from prefect.states import Completed
from pydantic import PrivateAttr, SerializerFunctionWrapHandler, model_serializer

from prefect_slo.errors import ResultLost, Unpicklable
from prefect_slo.runner.backends.protocol import Kept
from prefect_slo.runner.origins import Origin

Arrived = Callable[[Any, Decimal], None]
"""Takes a value that has come, and what bringing it here has cost, in US dollars."""


class Deposit:
    """A value that stays with a backend until it is asked for, once for all records of it.

    Args:
        kept: The part, pickled.
    """

    def __init__(self, kept: Kept) -> None:
        self.stage = ""
        self.origin: Origin | None = None
        self.remade: Future[bool] | None = None
        self._kept: Kept | None = kept
        self._size = kept.size
        self._arrived: Arrived = lambda value, usd: None
        self._again: Callable[[Deposit], bool] = lambda deposit: False
        self._fetching = threading.Lock()
        self._value: Any = None
        self._here = False
        self._why = ""

    def tell(self, stage: str, arrived: Arrived, origin: Origin | None, again: Callable[[Deposit], bool]) -> None:
        """Say whose it is.

        Args:
            stage: Stage that made it.
            arrived: Called when the value comes, in whichever thread asks for it.
            origin: How it can be made again, where it may be.
            again: Has that done, and waits for it; whether it stands for a value again.
        """
        self.stage, self._arrived, self.origin, self._again = stage, arrived, origin, again

    def at(self, place: object) -> Kept | None:
        """The part where it lies at a place; ``None`` where it doesn't, or its value is here and may have been changed.

        Raises:
            ResultLost: It can't be had any more.
        """
        kept = self._kept
        if kept is None or kept.place is not place or (self._here and not isinstance(self._value, str | bytes)):
            return None
        if why := kept.gone():
            if self._here:
                return None
            raise ResultLost(self.stage, self._size, why)
        return kept

    def goes_to(self, place: object) -> bool:
        """Whether it can go to a place as it is: its value is here, or it lies there."""
        kept = self._kept
        return self._here or (kept is not None and kept.place is place and not kept.gone())

    def lost(self) -> ResultLost | None:
        """Why it can't be had any more, as far as that is known."""
        if self._here:
            return None
        why = self._why or (self._kept.gone() if self._kept is not None else "")
        return ResultLost(self.stage, self._size, why) if why else None

    def bring(self) -> Any:
        """The value, brought here when it is first asked for.

        Raises:
            ResultLost: It can't be had any more.
        """
        with self._fetching:
            while not self._here:
                if (kept := self._kept) is None:
                    raise ResultLost(self.stage, self._size, self._why)
                try:
                    fetched = self._fetched(kept)
                except Exception as error:
                    if self._kept is not kept:
                        continue  # it was made again meanwhile
                    self._why = str(error) if isinstance(error, LookupError) else f"{type(error).__name__}: {error}"
                    raise ResultLost(self.stage, self._size, self._why) from error
                try:
                    value = pickle.loads(fetched)
                except (Exception, SystemExit) as error:
                    raise Unpicklable(self.stage, "result", f"{type(error).__name__}: {error}") from error
                self._arrive(value, kept.fetch_usd)
            return self._value

    def value(self) -> Any:
        """The value, made again first where it is lost and may be. Not for the thread that has calls made again.

        Raises:
            ResultLost: It can't be had any more.
        """
        try:
            return self.bring()
        except ResultLost:
            if not self._again(self):
                raise
        return self.bring()

    def renew(self, state: State[Any] | None) -> bool:
        """Stand for what the call that made it has returned once more; whether it has.

        Args:
            state: Final state of the call; ``None`` where it has none.
        """
        record = state.data if state is not None and state.is_completed() else None
        if isinstance(record, KeptRecord):
            self._kept, self._size, self._why = record.deposit._kept, record.deposit._size, ""
            return self._kept is not None
        if isinstance(record, ResultRecord):
            self._arrive(record.result, Decimal())
            self._kept = None
            return True
        ended = state.name if state is not None else "Cancelled"
        self._why = f"{self._why or (self._kept.gone() if self._kept else '')}; its task ran again, and ended {ended}"
        return False

    def leave(self, why: str = "", *, bring: bool = True) -> None:
        """Let go of the place, which is about to close; the value is brought here first unless nobody may want it."""
        if bring:
            try:
                self.bring()
            except Exception as error:
                why = error.why if isinstance(error, ResultLost) else f"{type(error).__name__}: {error}"
        self._why, self._kept, self.origin = why, None, None

    def _fetched(self, kept: Kept) -> bytes:
        """A part, asked for once more where its place may only have stumbled: what is lost is made again, and once."""
        try:
            return kept.fetch()
        except LookupError:
            raise
        except Exception:
            if self._kept is not kept or kept.gone():
                raise
            return kept.fetch()

    def _arrive(self, value: Any, usd: Decimal) -> None:
        self._value, self._here = value, True
        self._arrived(value, usd)


class KeptRecord(ResultRecord[Any]):
    """A record whose result comes when it is first read; out of result storage where it is lost and lies there too."""

    _deposit: Deposit = PrivateAttr()

    @classmethod
    def of(cls, deposit: Deposit, metadata: ResultRecordMetadata, *, persisted: bool) -> KeptRecord:
        """The record of a value that stays elsewhere."""
        record = cls.model_construct(metadata=metadata)
        record._deposit, record._persisted = deposit, persisted
        return record

    @property
    def deposit(self) -> Deposit:
        """What stands for its value."""
        return self._deposit

    def __getattr__(self, name: str) -> Any:  # not asked for what is there
        if name != "result":
            return super().__getattr__(name)  # type: ignore[misc]
        return self._bring(self._deposit.value)

    def bring(self) -> None:
        """Have its value here, unless it is lost: it is not made again for this.

        Raises:
            ResultLost: It can't be had any more.
        """
        if "result" not in self.__dict__:
            self._bring(self._deposit.bring)

    def at(self, place: object) -> Kept | None:
        """Its part where it lies at a place; ``None`` where it has to travel.

        Raises:
            ResultLost: It can't be had any more.
        """
        try:
            return self._deposit.at(place)
        except ResultLost:
            if not self.is_persisted:
                raise
            return None

    def goes_to(self, place: object) -> bool:
        """Whether it can go to a place as it is: its value is here, or it lies there."""
        return "result" in self.__dict__ or self._deposit.goes_to(place)

    def lost(self) -> ResultLost | None:
        """Why it can't be had any more, as far as that is known."""
        return None if self.is_persisted else self._deposit.lost()

    def whole(self) -> ResultRecord[Any]:
        """A plain record of the same."""
        return plain_record(self.result, self.metadata, self.is_persisted)

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_record, (self.result, self.metadata, self.is_persisted)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Any:
        return copy.deepcopy(self.whole(), memo)

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> Any:
        _ = self.result
        return handler(self)

    def _bring(self, fetch: Callable[[], Any]) -> Any:
        try:
            value = fetch()
        except ResultLost:
            if not self.is_persisted:
                raise
            value = Completed(data=self.metadata).result(_sync=True)  # type: ignore[call-overload]
        self.__dict__["result"] = value
        return value


class Deposits:
    """Those of one flow run, for as long as somebody holds their record.

    Args:
        again: Has a lost one made again, and waits for it; whether it stands for a value again.
    """

    def __init__(self, again: Callable[[Deposit], bool] = lambda deposit: False) -> None:
        self._again = again
        self._all: weakref.WeakSet[Deposit] = weakref.WeakSet()
        self._gate = threading.Lock()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._all)

    def add(self, deposit: Deposit, stage: str, arrived: Arrived, origin: Origin | None = None) -> None:
        """Take in a value of a stage; ``arrived`` is called when it comes, in whichever thread asks for it."""
        deposit.tell(stage, arrived, origin, self._again)
        with self._gate:
            self._all.add(deposit)

    def bring(self) -> None:
        """Bring what somebody may still ask for; what is lost is made again where it may be."""
        gc.collect()  # futures and calls refer to each other
        for deposit in self._held():
            with suppress(BaseException):  # whoever asks for it is told
                deposit.value()

    def close(self, *, bring: bool = True, why: str = "its flow run was cut short") -> None:
        """Bring what somebody may still ask for, before the places close; or nothing, and ``why``."""
        if self._all:
            gc.collect()
        for deposit in self._held():
            deposit.leave(why, bring=bring)
        self._all.clear()

    def _held(self) -> list[Deposit]:
        with self._gate:  # others come in meanwhile
            return list(self._all)


def plain_record(value: Any, metadata: ResultRecordMetadata, persisted: bool) -> ResultRecord[Any]:
    """A record whose value is there."""
    record: ResultRecord[Any] = ResultRecord.model_construct(metadata=metadata, result=value)
    if persisted:
        record.mark_persisted()
    return record
