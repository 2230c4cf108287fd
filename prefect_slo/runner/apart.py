"""Pickles results in two: what is said of them, and apart from it the values in them that may be large.

What came of a call is pickled by ``dump_result``: the state, and beside it each value that may be large, to which the
state refers by number. A part that a backend keeps becomes a ``KeptRecord`` where the rest is loaded. On its way to a
worker of the same backend it is a number again (``dump_call``), and the part comes from where it lies.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
from prefect.client.schemas.objects import State
from prefect.results import ResultRecord, ResultRecordMetadata  # type: ignore[attr-defined]

from prefect_slo.runner.backends.protocol import Kept
from prefect_slo.runner.calls import ATOMS, Raised, Returned, Several
from prefect_slo.runner.deposits import Deposit, KeptRecord, plain_record

Result = State[Any] | Returned | Raised | Several

SMALL = 64 * 1024
"""Texts and bytes shorter than this never go apart."""


def dump_result(result: Result) -> tuple[bytes, tuple[bytes, ...]]:
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


def load_parts(payload: bytes, parts: Sequence[bytes | Kept]) -> Any:
    """What was pickled by ``dump_result``; parts that are kept elsewhere stay there.

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
                record = plain_record(pickle.loads(part), known, persisted)
            else:
                record = KeptRecord.of(Deposit(part), known, persisted=persisted)
            self._records[number] = record if kind == "record" else Returned(_bare(record))
        return self._records[number]


def _bare(record: ResultRecord[Any]) -> Any:
    """What a call that ran without Prefect's engine returned: the value, or the record where that stays elsewhere."""
    return record if isinstance(record, KeptRecord) else record.result
