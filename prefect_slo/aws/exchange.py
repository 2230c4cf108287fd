"""Work for a worker function and what it sends back: in the request and the reply where they fit, else over S3."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from prefect_slo.aws.invoke import NO_SPACE, Answer, Failed
from prefect_slo.aws.kept import KeptObject, Shared, Value
from prefect_slo.aws.refusals import with_packages
from prefect_slo.aws.report import Billed
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.aws.spending import Caller, SpendLimit
from prefect_slo.aws.storage import Requests, of_answer, writing
from prefect_slo.aws.worker import PROTOCOL

INLINE_BYTES = 4_500_000
"""Function and arguments that fit into a request of 6 MB once they are written as base64."""

INLINE_FUNCTION_BYTES = 64 * 1024
"""A larger function is stored once instead of travelling with every request."""

Kind = Literal["function", "program"]


class Left(NamedTuple):
    """Where a value lies that a worker has left on S3."""

    key: str
    at: int
    size: int


class Item(NamedTuple):
    """How one item ended, as the worker says it; instants are seconds since it got the event."""

    item: int
    payload: bytes
    failed: bool
    unpicklable: str
    read_s: float
    write_s: float
    started: float
    ended: float
    left: Left | None = None


@dataclass(frozen=True)
class Returned:
    """What an invocation sent back.

    Attributes:
        items: Of those that ended, in order.
        chatter: What the program emitted beside.
        overran: The item that took longer than it may.
        telemetry: The worker's own measurements.
        answer: The invocation.
        storage_usd: What reading and writing objects cost, here and there.
        stored: Names of what it has left on S3.
    """

    items: tuple[Item, ...]
    chatter: tuple[bytes, ...]
    overran: int | None
    telemetry: dict[str, Any]
    answer: Answer
    storage_usd: Decimal = Decimal()
    stored: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Order:
    """Items of one function, for one worker.

    Attributes:
        kind: What ``code`` is: a pickled function, or a pickled ``Program``.
        code: Its bytes.
        items: Ids and pickled arguments.
        key: Names this work: whatever is sent for it again is the same work.
        limit_s: An item that runs longer has overrun; ``None``: as long as it likes.
        cancelled: Set when nobody waits any more.
        parts: What arguments refer to by number: results that lie on S3, and values that other calls may take, too.
        keep: Of results that fit into no reply, values of at least so many bytes may stay on S3; ``None`` for none.
        sent: Set while something of it may be with AWS of which nothing has been heard: it may be billed.
    """

    kind: Kind
    code: bytes
    items: Sequence[tuple[int, bytes]]
    key: tuple[str, ...]
    limit_s: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    parts: Sequence[KeptObject | Value] = ()
    keep: int | None = None
    sent: threading.Event = field(default_factory=threading.Event)

    @property
    def ids(self) -> tuple[int, ...]:
        """Its items' ids, in order."""
        return tuple(item for item, _ in self.items)

    def shared(self, value: Value) -> tuple[str, ...]:
        """Names a value among all that its flow run stores."""
        return (*self.key[:2], "shared", value.sha)


class PartsGone(Failed):
    """Something that arguments refer to is not on S3 any more; nothing has run.

    Attributes:
        keys: The objects.
        again: Whether it is worth sending again: they are made or stored anew, and no worker is to blame.
    """

    def __init__(self, keys: Sequence[str], detail: str, billed: Billed) -> None:
        super().__init__("died", detail, billed=billed)
        self.keys, self.again = tuple(keys), False


class TooLarge(Exception):
    """Something that fits into no request, where there is no bucket for it."""


@dataclass(frozen=True)
class Exchange:
    """Sends work to worker functions.

    Attributes:
        invoker: Calls them.
        store: Where large things go; ``None`` where there is no bucket.
        once: Whether every run is claimed on S3, so that one whose reply was lost never runs twice.
        limit: A cap that what is stored here counts against, too.
        shared: Values of this process that several calls take.
    """

    invoker: Caller
    store: S3Prefix | None = None
    once: bool = False
    limit: SpendLimit | None = None
    shared: Shared = field(default_factory=Shared)

    def run(self, function: str, order: Order) -> Returned:
        """Have a worker run items.

        Args:
            function: Name of the Lambda function; for a job, nothing that matters.
            order: The items.

        Raises:
            TooLarge: Arguments take a bucket, and there is none; nothing has run.
            Failed: The invocation gave no result.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            event, used = self._event(order)
        except (ClientError, BotoCoreError) as error:  # boto3 has tried several times; nothing has run
            raise Failed("start", f"what it takes cannot be stored ({error})") from None
        self.paid(used.usd)
        sent = self.shared.clock()
        answer: Answer | None = None
        try:
            answer = self.invoker.call(function, event, again=self.once, cancelled=order.cancelled, sent=order.sent)
            used += of_answer(answer)
            returned = self.received(answer, order.ids)
        except Failed as failed:
            failed.storage_usd = used.usd
            failed.lost = answer.lost if answer is not None else failed.lost
            if isinstance(failed, PartsGone):
                failed.again = self._lose(order, failed.keys, sent)
            raise
        result = answer.reply.get("result", {})
        left = self.once or "key" in event["args"] or "key" in result or "left" in result or answer.stored
        return replace(returned, storage_usd=used.usd, stored=(order.key,) if left else ())

    def paid(self, usd: Decimal) -> None:
        """Something beside was paid for."""
        if self.limit is not None:
            self.limit.add(usd)

    def _lose(self, order: Order, keys: Sequence[str], sent: float) -> bool:
        """Some of what an order refers to is gone: results are made again, or said to be lost; values stored again.

        Returns:
            Whether sending it again may help.
        """
        helps = []
        for part in order.parts:
            if isinstance(part, KeptObject):
                if part.key in keys:
                    part.place.lose(part.key)
                    helps.append(True)
            elif self.store is not None and self._key_of(order, part) in keys:
                helps.append(self.shared.lose(part, sent))
        return bool(helps) and all(helps)

    def _key_of(self, order: Order, value: Value) -> str:
        """Under which a value lies that calls of its flow run take."""
        assert self.store is not None
        return f"{self.store.key(*order.shared(value))}/args"

    def _event(self, order: Order) -> tuple[dict[str, Any], Requests]:
        """The request, and what storing took."""
        code, arguments = order.code, pickle.dumps(list(order.items), protocol=pickle.HIGHEST_PROTOCOL)
        sha = hashlib.sha256(code).hexdigest()
        apart = self.store is not None and len(code) > INLINE_FUNCTION_BYTES
        left = INLINE_BYTES - (0 if apart else len(code))
        function, written = self._place(code, ("code", sha), inline=not apart, again=True)
        carried, more = self._place(arguments, order.key, inline=len(arguments) <= left, part="/args")
        parts, beside = self._parts(order, left - len(arguments) if "b64" in carried else left)
        event: dict[str, Any] = {
            "v": PROTOCOL,
            "python": list(sys.version_info[:2]),  # "py" of protocol 1: its workers, which look at no "v", stop there
            "kind": order.kind,
            "fn": {"sha": sha, **function},
            "args": carried,
            "limit_s": order.limit_s,
        }
        if parts:
            event["parts"] = parts
        if self.store is not None:
            out = {"bucket": self.store.bucket, "key": self.store.key(*order.key), "encryption": self.store.encryption}
            event.update(out=out, once=self.once)
            if order.keep is not None:
                event["keep"] = order.keep
        return event, written + more + beside

    def _parts(self, order: Order, room: int) -> tuple[list[dict[str, Any]], Requests]:
        """Where the parts of an order are, and what storing took; ``room`` is what still fits into its request."""
        room -= sum(len(json.dumps(part.document)) for part in order.parts if isinstance(part, KeptObject))
        places, written = list[dict[str, Any]](), Requests()
        for part in order.parts:
            if isinstance(part, KeptObject):
                places.append(part.document)
                continue
            if self.store is None or self.shared.travels(part, room):
                place, more = self._place(part.content, (), inline=len(part.content) <= room)
                room -= len(part.content)
            else:
                key = self._key_of(order, part)
                more = self.shared.store(part, self.store, key)
                place = {"bucket": self.store.bucket, "key": key, "at": 0, "size": len(part.content)}
            places.append(place)
            written += more
        return places, written

    def received(self, answer: Answer, sent: Sequence[int]) -> Returned:
        """What a reply to ``sent`` items says, its result fetched.

        Where the result fits into no reply, and there is no bucket, all have run, and none can say what came of it.

        Raises:
            Failed: The worker could not do its work, or its result cannot be read.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        reply = answer.reply
        if reply.get("v") != PROTOCOL:
            raise Failed(
                "start",
                f"its worker is of another release of prefect-slo: it speaks protocol {reply.get('v', 1)}, and this "
                f"process {PROTOCOL}; build its image with the release that the flow's process has",
                billed=answer.billed,
            )
        error = reply.get("error") or {}
        kind = error.get("kind", "")
        telemetry = reply.get("telemetry", {})
        if kind == "result" and "does not fit" in error["message"]:
            why_stuck, ended = f"{error['message']}; give the pool a bucket", float(telemetry.get("handler_s", 0.0))
            stuck = tuple(Item(item, b"", False, why_stuck, 0.0, 0.0, 0.0, ended) for item in sent)
            return Returned(stuck, (), None, telemetry, answer)
        if not reply.get("ok") and kind != "overrun":
            why: Any = {"claimed": "unknown", "result": "died", "handler": "died"}.get(kind, "start")
            message = with_packages(str(error.get("message", "a reply that says nothing")))
            if kind == "gone":
                raise PartsGone(error["keys"], message, answer.billed)
            raise Failed("disk" if f"OSError: {NO_SPACE}" in message else why, message, billed=answer.billed)
        place = reply["result"]
        if "b64" in place:
            content = base64.b64decode(place["b64"])
        else:
            assert self.store is not None
            try:
                content = self.store.get(place["key"], place["size"])
            except (ClientError, BotoCoreError) as gone:
                raise Failed("unknown", f"its result cannot be read ({gone})", billed=answer.billed) from None
        outcomes, chatter = pickle.loads(content)
        return Returned(
            tuple(_item(outcome, place.get("left")) for outcome in outcomes),
            tuple(chatter),
            error.get("item") if kind == "overrun" else None,
            telemetry,
            answer,
        )

    def _place(
        self, content: bytes, names: tuple[str, ...], *, inline: bool, again: bool = False, part: str = ""
    ) -> tuple[dict[str, Any], Requests]:
        if inline:
            return {"b64": base64.b64encode(content).decode()}, Requests()
        if self.store is None:
            raise TooLarge(
                f"{len(content)} bytes do not fit into a request to Lambda of {INLINE_BYTES}; give the pool a bucket"
            )
        key, written = self.store.key(*names) + part, True
        if again:
            written = self.store.put_once(key, content)
        else:
            self.store.put(key, content)
        return {"bucket": self.store.bucket, "key": key}, writing(len(content)) if written else Requests()


def _item(outcome: tuple[Any, ...], beside: Mapping[str, Any] | None) -> Item:
    """An item as the worker tells it; where its value lies ``beside`` the result, with where that is."""
    item = Item(*outcome)
    if item.left is None:
        return item
    assert beside is not None
    at, size = item.left  # type: ignore[misc]
    return item._replace(left=Left(beside["key"], beside["at"] + at, size))
