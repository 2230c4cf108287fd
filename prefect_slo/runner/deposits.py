"""Results apart from what is said of them: the value of a result may stay where it was made until somebody asks for it.

A worker pickles what came of a call in two: the state, and beside it each value that may be large, to which the state
refers by number (``dump``). Where a backend keeps such a part, the flow's process gets a state whose record brings its
value when it is first read (``KeptRecord``): Prefect, the flow and whoever takes the state read it as any other. On its
way to a worker of the same backend it goes as a number again (``dump_call``), and the part comes from where it lies.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
from prefect.client.schemas.objects import State
from prefect.results import ResultRecord, ResultRecordMetadata  # type: ignore[attr-defined]
from prefect.states import Completed
from pydantic import PrivateAttr, SerializerFunctionWrapHandler, model_serializer

from prefect_slo.errors import ResultLost, Unpicklable
from prefect_slo.runner.backends.protocol import Kept
from prefect_slo.runner.calls import ATOMS, Raised, Returned, Several

Result = State[Any] | Returned | Raised | Several
Arrived = Callable[[Any], None]

SMALL = 64 * 1024
"""Texts and bytes shorter than this never go apart."""


class Deposit:
    """A value that stays with a backend until it is asked for, once for all records of it.

    Args:
        kept: The part, pickled.
    """

    def __init__(self, kept: Kept) -> None:
        self.stage = ""
        self._kept: Kept | None = kept
        self._size = kept.size
        self._arrived: Arrived = lambda value: None
        self._lock = threading.Lock()
        self._value: Any = None
        self._here = False
        self._why = ""

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

    def tell(self, stage: str, arrived: Arrived) -> None:
        """Say whose it is, and have ``arrived`` called with the value when it comes."""
        self.stage, self._arrived = stage, arrived

    def value(self) -> Any:
        """The value, brought here when it is first asked for.

        Raises:
            ResultLost: It can't be had any more.
        """
        with self._lock:
            if not self._here:
                if self._kept is None:
                    raise ResultLost(self.stage, self._size, self._why)
                try:
                    fetched = self._kept.fetch()
                except Exception as error:
                    why = str(error) if isinstance(error, LookupError) else f"{type(error).__name__}: {error}"
                    raise ResultLost(self.stage, self._size, why) from error
                try:
                    self._value, self._here = pickle.loads(fetched), True
                except Exception as error:
                    raise Unpicklable(self.stage, "result", f"{type(error).__name__}: {error}") from error
                self._arrived(self._value)
            return self._value

    def leave(self, why: str = "", *, bring: bool = True) -> None:
        """Let go of the place, which is about to close; the value is brought here first unless nobody may want it."""
        if bring:
            try:
                self.value()
            except Exception as error:
                why = error.why if isinstance(error, ResultLost) else f"{type(error).__name__}: {error}"
        with self._lock:
            self._kept, self._why = None, why


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
        try:
            value = self._deposit.value()
        except ResultLost:
            if not self.is_persisted:
                raise
            value = Completed(data=self.metadata).result(_sync=True)  # type: ignore[call-overload]
        self.__dict__["result"] = value
        return value

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

    def whole(self) -> ResultRecord[Any]:
        """A plain record of the same."""
        return _record(self.result, self.metadata, self.is_persisted)

    def __reduce__(self) -> tuple[Any, ...]:
        return _record, (self.result, self.metadata, self.is_persisted)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Any:
        return copy.deepcopy(self.whole(), memo)

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> Any:
        _ = self.result
        return handler(self)


class Deposits:
    """Those of one flow run, for as long as somebody holds their record."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Deposit] = weakref.WeakSet()

    def add(self, deposit: Deposit, stage: str, arrived: Arrived) -> None:
        """Take in a value of a stage; ``arrived`` is called with it when it comes, in whichever thread asks for it."""
        deposit.tell(stage, arrived)
        self._all.add(deposit)

    def close(self, *, at_once: bool = False) -> None:
        """Bring what somebody may still ask for, before the places close; ``at_once``, nothing."""
        if self._all:
            gc.collect()  # futures and calls refer to each other
        for deposit in list(self._all):
            deposit.leave("its flow run was cut short", bring=not at_once)
        self._all.clear()


def dump(result: Result) -> tuple[bytes, tuple[bytes, ...]]:
    """What came of a call, pickled, and pickled beside it the values in it that may be large.

    Raises:
        Exception: Whatever pickling them raises.
    """
    several = result.results if isinstance(result, Several) else [result]
    apart = [found for found in map(_value_in, several) if found is not None]
    if not apart:
        return bytes(cloudpickle.dumps(result)), ()
    numbers = {id(holder): number for number, (holder, _) in enumerate(apart)}

    def name(value: Any) -> Name | None:
        if (number := numbers.get(id(value))) is None:
            return None
        if isinstance(value, Returned):
            return "returned", number, None, False
        return "record", number, value.metadata, value.is_persisted

    return _dumped(result, name), tuple(bytes(cloudpickle.dumps(value)) for _, value in apart)


def load(payload: bytes, parts: Sequence[bytes | Kept]) -> Any:
    """What was pickled by ``dump``; parts that are kept elsewhere stay there.

    Raises:
        Exception: Whatever unpickling it raises.
    """
    return _Unpickler(payload, parts).load() if parts else pickle.loads(payload)


def dump_call(content: Any, place: object, parts: list[Kept]) -> bytes:
    """Pickle something in which results that lie at a place are numbers of ``parts``, which they are added to.

    Raises:
        ResultLost: One can't be had any more.
        Exception: Whatever pickling the rest raises.
    """

    def name(value: Any) -> Name | None:
        if not isinstance(value, KeptRecord) or (kept := value.at(place)) is None:
            return None
        if kept not in parts:
            parts.append(kept)
        return "record", parts.index(kept), value.metadata, value.is_persisted

    return _dumped(content, name)


def load_call(payload: bytes, parts: Sequence[bytes]) -> tuple[Any, int]:
    """What ``dump_call`` has pickled, and how many bytes of the parts it holds."""
    unpickler = _Unpickler(payload, parts)
    return unpickler.load(), unpickler.taken


Name = tuple[str, int, ResultRecordMetadata | None, bool]


def _value_in(result: Any) -> tuple[Any, Any] | None:
    """What holds the value of a success, and the value, where that may be large."""
    holder: Any
    if isinstance(result, Returned):
        holder, value = result, result.value
    elif isinstance(result, State) and result.is_completed() and isinstance(result.data, ResultRecord):
        holder, value = result.data, result.data.result
    else:
        return None
    return None if isinstance(value, State) or _is_small(value) else (holder, value)


def _is_small(value: Any) -> bool:
    return isinstance(value, ATOMS) and (not isinstance(value, str | bytes) or len(value) < SMALL)


def _record(value: Any, metadata: ResultRecordMetadata, persisted: bool) -> ResultRecord[Any]:
    record: ResultRecord[Any] = ResultRecord.model_construct(metadata=metadata, result=value)
    if persisted:
        record.mark_persisted()
    return record


def _dumped(content: Any, name: Callable[[Any], Name | None]) -> bytes:
    buffer = io.BytesIO()
    pickler = cloudpickle.Pickler(buffer)
    pickler.persistent_id = name
    pickler.dump(content)
    return buffer.getvalue()


class _Unpickler(pickle.Unpickler):
    def __init__(self, payload: bytes, parts: Sequence[bytes | Kept]) -> None:
        super().__init__(io.BytesIO(payload))
        self._parts = parts
        self._records: dict[int, Any] = {}  # a record that is named twice is one object
        self.taken = 0

    def persistent_load(self, name: Name) -> Any:
        kind, number, metadata, persisted = name
        if number not in self._records:
            part, known = self._parts[number], metadata or ResultRecordMetadata()
            record: Any
            if isinstance(part, bytes):
                self.taken += len(part)
                record = _record(pickle.loads(part), known, persisted)
            else:
                record = KeptRecord.of(Deposit(part), known, persisted=persisted)
            self._records[number] = record if kind == "record" else Returned(_bare(record))
        return self._records[number]


def _bare(record: ResultRecord[Any]) -> Any:
    """What a call that ran without Prefect's engine returned: the value, or the record where that stays elsewhere."""
    return record if isinstance(record, KeptRecord) else record.result
