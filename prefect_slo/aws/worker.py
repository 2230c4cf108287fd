"""What runs on AWS: one handler for every task. It is deployed alone, with cloudpickle beside it, and imports no more.

An event brings a pickled function (or an object whose ``open`` gives one), the arguments of some items, and where
large results go. Arguments and results travel in the event itself where they fit, else over S3. Arguments may refer to
``parts`` of the event: results of others that lie on S3, and values that many calls take. An event with ``once`` is run
at most once: its run is claimed on S3 before it starts, and whoever comes second waits for the first's result.
"""

from __future__ import annotations

import asyncio
import base64
import copyreg
import io
import json
import os
import pickle
import resource
import signal
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

PROTOCOL = 2
"""Of events and replies. Both sides say theirs, and neither takes the other's where it is another: what an image was
built with may be older, or newer, than the flow's process."""

LOADED = time.time()
SANDBOX = uuid.uuid4().hex[:12]
INLINE_RESULT = 4_400_000
"""Bytes of a pickled result that fit into a reply of 6 MB once they are written as base64."""

APART = b"prefect-slo/1 "
"""How a stored result begins whose large values lie behind it, each to be read by itself: then the length of the rest
of the head in 8 bytes, then outcomes and chatter, then the values."""

PART_BYTES, STREAMS = 8 * 2**20, 4
"""Size of a part and of a range, and how many travel at once: one connection of S3 has about 90 MB/s."""

SPARE_MS = 300
"""A second run of an event stops waiting for the first one's result this long before its own time is over."""

SKEW_S = 5.0
"""Clocks of two machines differ by less: a run whose time was over so long ago leaves no result any more."""

CONFLICTS = 5
"""Tries of a write that meets another of the same object under way (409): S3 asks to try again."""

CANCEL_S = 1.0
"""What an item that overran has to end in; what goes on then is never resumed."""

_STATE: dict[str, Any] = {"calls": 0, "s3": None, "loop": None, "puts": 0, "gets": 0, "parts": [], "taken": 0}
_FUNCTIONS: dict[str, Any] = {}


class Overrun(BaseException):
    """An item took longer than it may; raised where it runs, past whatever its own code catches."""


class Gone(Exception):
    """Objects that the arguments refer to are not there any more."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys
        super().__init__(f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} not on S3 any more")


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Run the items of an event; the reply is a JSON document."""
    begun = time.time()
    cpu = time.process_time()
    _STATE["calls"] += 1
    telemetry = {
        "cold": _STATE["calls"] == 1,
        "sandbox": SANDBOX,
        "received": begun,
        "loaded": LOADED,
        "memory_mb": int(getattr(context, "memory_limit_in_mb", 0) or 0),
        "request": getattr(context, "aws_request_id", ""),
    }
    try:
        reply = _handled(event, context, telemetry, begun)
    except Exception as error:
        reply = _failure("handler", error)
    _STATE["parts"], _STATE["taken"] = [], 0
    telemetry["s3_puts"], telemetry["s3_gets"] = _STATE["puts"], _STATE["gets"]
    _STATE["puts"] = _STATE["gets"] = 0
    telemetry["cpu_s"] = time.process_time() - cpu
    telemetry["peak_mb"] = peak_mb()
    telemetry["handler_s"] = time.time() - begun
    return {**reply, "v": PROTOCOL, "telemetry": telemetry}


def _handled(event: dict[str, Any], context: Any, telemetry: dict[str, Any], begun: float) -> dict[str, Any]:
    if event.get("warm"):
        return {"ok": True}
    if event.get("v") != PROTOCOL:
        message = f"an event of protocol {event.get('v')}, where workers are of {PROTOCOL}"
        return {"ok": False, "error": {"kind": "protocol", "message": message}}
    if list(event["python"]) != list(sys.version_info[:2]):
        wanted, have = (".".join(map(str, version)) for version in (event["python"], sys.version_info[:2]))
        return {"ok": False, "error": {"kind": "python", "message": f"pickled by Python {wanted}, this is {have}"}}
    if event.get("once"):
        earlier = _claimed(event, context)
        if earlier is not None:
            return earlier
    opening = time.time()
    telemetry["claim_s"], telemetry["read_s"] = opening - begun, 0.0
    try:
        run, chatter = _opened(event, telemetry)
        arguments = _read_into(telemetry, event["args"])
        telemetry["bytes_in"] = len(arguments)
        items = pickle.loads(arguments)
        _STATE["parts"] = _parts(telemetry, event.get("parts") or [])
    except Gone as gone:
        return {"ok": False, "error": {"kind": "gone", "message": str(gone), "keys": gone.keys}}
    except Exception as error:
        return _failure("open", error)
    telemetry["load_s"] = time.time() - opening - telemetry["read_s"]
    outcomes, overran = _run_all(run, items, event.get("limit_s"), begun)
    ran = time.time()
    telemetry["bytes_in"] += _STATE["taken"]
    result = _apart(outcomes, chatter, event["keep"]) if event.get("keep") else None
    if result is None:
        result = pickle.dumps((outcomes, chatter), protocol=pickle.HIGHEST_PROTOCOL)
    telemetry["bytes_out"] = len(result)
    written = time.time()
    telemetry["dump_s"] = written - ran
    try:
        reply = {"ok": overran is None, "result": _sent(event, result)}
    except Exception as error:
        return _failure("result", error)
    if overran is not None:
        reply["error"] = {
            "kind": "overrun",
            "message": f"an item ran longer than {event['limit_s']:g} s",
            "item": overran,
        }
    telemetry["write_s"] = time.time() - written
    return reply


# ---- functions and items --------------------------------------------------------------------------------------------


def _opened(event: dict[str, Any], telemetry: dict[str, Any]) -> tuple[Any, list[bytes]]:
    """The function that runs one item, and the list of what it emits beside results."""
    function = event["fn"]
    telemetry["warm_fn"] = function["sha"] in _FUNCTIONS
    if not telemetry["warm_fn"]:
        _FUNCTIONS.clear()  # one task at a time: what the last one held is let go
        import cloudpickle  # noqa: F401 (what it pickled needs it to load)

        loaded = pickle.loads(_read_into(telemetry, function))
        chatter: list[bytes] = []
        if event["kind"] == "program":
            _FUNCTIONS[function["sha"]] = loaded.open(lambda payload: chatter.append(payload)), chatter
        else:
            _FUNCTIONS[function["sha"]] = _caller(loaded), chatter
    run, chatter = _FUNCTIONS[function["sha"]]
    chatter.clear()
    return run, chatter


def _caller(function: Any) -> Any:
    """A function of ``(item, pickled arguments)`` that gives an outcome, as the programs of a worker process do."""
    import cloudpickle

    def run(item: int, payload: bytes) -> tuple[Any, ...]:
        begun = time.time()
        try:
            args, kwargs = _Unpickler(io.BytesIO(payload)).load()
        except Exception as error:
            return _outcome(b"", failed=True, unpicklable=_words(error))
        read = time.time()
        try:
            value, failed = _called(function, args, kwargs), False
        except Exception as error:
            value, failed = error, True
        ran = time.time()
        return _dumped(cloudpickle, value, failed, read - begun, ran)

    return run


class _Unpickler(pickle.Unpickler):
    """Loads arguments that refer to parts; every item has values of its own, and equal ones share a part."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._values: dict[tuple[int, int], Any] = {}  # a value that is named twice is one object

    def persistent_load(self, named: tuple[int, int]) -> Any:
        if named not in self._values:
            part = _STATE["parts"][named[0]]
            _STATE["taken"] += len(part)
            self._values[named] = pickle.loads(part)
        return self._values[named]


def _called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = function(*args, **kwargs)
    if not asyncio.iscoroutine(result):
        return result
    if _STATE["loop"] is None:
        _STATE["loop"] = asyncio.new_event_loop()
    try:
        return _STATE["loop"].run_until_complete(result)
    except Exception:
        raise
    except BaseException:
        _abandoned(_STATE["loop"])
        raise


def _abandoned(loop: asyncio.AbstractEventLoop) -> None:
    """End what an item that was interrupted has left in its loop; it would go on with the next item, or invocation."""
    _STATE["loop"] = None
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=CANCEL_S))
    loop.close()


def _dumped(cloudpickle: Any, value: Any, failed: bool, read_s: float, ran: float) -> tuple[Any, ...]:
    try:
        payload = _raised(cloudpickle, value) if failed else cloudpickle.dumps(value)
    except Exception as error:
        return _outcome(b"", unpicklable=_words(error))
    return _outcome(payload, failed=failed, read_s=read_s, write_s=time.time() - ran)


def _raised(cloudpickle: Any, error: Exception) -> bytes:
    """An exception with its traceback; one that would not arrive as what it is is made without its constructor.

    As ``prefect_slo.runner.exceptions`` does, which isn't here.
    """
    text, kind = "".join(traceback.format_exception(error)), type(error)
    payload = _alike(cloudpickle, error, text)
    if payload is not None:
        return payload
    before = copyreg.dispatch_table.get(kind)
    copyreg.pickle(kind, _without_constructor)
    try:
        payload = _alike(cloudpickle, error, text)
    finally:
        if payload is None:
            copyreg.dispatch_table.pop(kind, None)
            if before is not None:
                copyreg.pickle(kind, before)
    return cloudpickle.dumps((RuntimeError(_words(error)), text)) if payload is None else payload


def _alike(cloudpickle: Any, error: Exception, text: str) -> bytes | None:
    """An exception with its traceback; ``None`` where it would arrive as another class, or with other words."""
    try:
        payload: bytes = cloudpickle.dumps((error, text))
        again, words = pickle.loads(payload)[0], str(error)
        if type(again) is not type(error):
            return None
        # Words that differ from copy to copy, for the address of an object in them, say nothing.
        alike = str(again) == words or str(pickle.loads(payload)[0]) != str(again)
    except Exception:  # whatever classes of users raise
        return None
    return payload if alike else None


def _without_constructor(error: BaseException) -> tuple[Any, ...]:
    return copyreg.__newobj__, (type(error), *error.args), error.__dict__ or None  # type: ignore[attr-defined]


def _run_all(
    run: Any, items: list[tuple[int, bytes]], limit_s: float | None, begun: float
) -> tuple[list[tuple[Any, ...]], int | None]:
    """Outcomes of items in order, with instants in seconds since ``begun``, and the item that overran, if one did."""
    outcomes: list[tuple[Any, ...]] = []
    for item, payload in items:
        started = time.time() - begun
        try:
            with _limited(limit_s):
                out = run(item, payload)
        except Overrun:
            return outcomes, item
        if not isinstance(out, tuple):
            out = _outcome(out.payload, out.failed, out.unpicklable, out.read_s, out.write_s)
        outcomes.append((item, *out, started, time.time() - begun))
    return outcomes, None


class _limited:
    """Raises ``Overrun`` in the main thread once its time is over; where it isn't entered by that, nothing happens."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s if limit_s and threading.current_thread() is threading.main_thread() else None

    def __enter__(self) -> None:
        if self._limit_s:
            signal.signal(signal.SIGALRM, _overrun)
            signal.setitimer(signal.ITIMER_REAL, self._limit_s)

    def __exit__(self, *_: object) -> None:
        if self._limit_s:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _overrun(*_: object) -> None:
    raise Overrun


def _outcome(
    payload: bytes, failed: bool = False, unpicklable: str = "", read_s: float = 0.0, write_s: float = 0.0
) -> tuple[Any, ...]:
    return payload, failed, unpicklable, read_s, write_s


# ---- S3 -------------------------------------------------------------------------------------------------------------


def _read_into(telemetry: dict[str, Any], place: dict[str, Any]) -> bytes:
    """What lies at a place; the time that getting it took is noted."""
    begun = time.time()
    content = _fetched(place)
    telemetry["read_s"] += time.time() - begun
    return content


def _fetched(place: dict[str, Any]) -> bytes:
    if "b64" in place:
        return base64.b64decode(place["b64"])
    return _read(place["bucket"], place["key"])


def _read(bucket: str, key: str) -> bytes:
    """An object; of a large one the first range tells the size, and the others are read side by side."""
    s3, where = _s3(), {"Bucket": bucket, "Key": key}
    _STATE["gets"] += 1
    got = s3.get_object(Range=f"bytes=0-{PART_BYTES - 1}", **where)
    first, size = bytes(got["Body"].read()), int(got["ContentRange"].rpartition("/")[2])
    if size <= len(first):
        return first
    starts = range(PART_BYTES, size, PART_BYTES)
    _STATE["gets"] += len(starts)

    def part(start: int) -> bytes:
        end = min(start + PART_BYTES, size) - 1
        return bytes(s3.get_object(Range=f"bytes={start}-{end}", IfMatch=got["ETag"], **where)["Body"].read())

    with ThreadPoolExecutor(STREAMS) as pool:
        return b"".join([first, *pool.map(part, starts)])


def _parts(telemetry: dict[str, Any], places: list[dict[str, Any]]) -> list[bytes]:
    """What arguments refer to, in order; ranges of all of it are read side by side.

    Raises:
        Gone: Some of it is not there any more.
    """
    begun = time.time()
    ranges = [
        (number, start, min(start + PART_BYTES, place["at"] + place["size"]) - 1)
        for number, place in enumerate(places)
        if "key" in place
        for start in range(place["at"], place["at"] + place["size"], PART_BYTES)
    ]
    _STATE["gets"] += len(ranges)
    read: list[bytes | None] = []
    if ranges:
        _s3()  # one client, made by one thread
        with ThreadPoolExecutor(STREAMS) as pool:
            read = list(pool.map(lambda wanted: _range(places[wanted[0]], *wanted[1:]), ranges))
    found: list[list[bytes]] = [[base64.b64decode(place["b64"])] if "b64" in place else [] for place in places]
    gone: set[str] = set()
    for (number, _, _), piece in zip(ranges, read, strict=True):
        if piece is None:
            gone.add(places[number]["key"])
        else:
            found[number].append(piece)
    telemetry["read_s"] += time.time() - begun
    if gone:
        raise Gone(sorted(gone))
    return [pieces[0] if len(pieces) == 1 else b"".join(pieces) for pieces in found]


def _range(place: dict[str, Any], first: int, last: int) -> bytes | None:
    """Bytes of an object; ``None`` where it is not there, or is not what it was."""
    from botocore.exceptions import ClientError

    try:
        got = _s3().get_object(Bucket=place["bucket"], Key=place["key"], Range=f"bytes={first}-{last}")
    except ClientError as error:
        if error.response["ResponseMetadata"].get("HTTPStatusCode") in (404, 416):
            return None
        raise
    return bytes(got["Body"].read())


def _written(bucket: str, key: str, body: bytes, encryption: dict[str, Any]) -> None:
    """Write an object that isn't there yet; a large one in parts, side by side.

    Raises:
        ClientError: It is there (412), or another is being written (409).
    """
    s3, where = _s3(), {"Bucket": bucket, "Key": key}
    if len(body) <= PART_BYTES:
        _STATE["puts"] += 1
        s3.put_object(Body=body, IfNoneMatch="*", **where, **encryption)
        return
    starts = range(0, len(body), PART_BYTES)
    _STATE["puts"] += len(starts) + 2
    upload = {**where, "UploadId": s3.create_multipart_upload(**where, **encryption)["UploadId"]}

    def part(number: int) -> dict[str, Any]:
        chunk = body[starts[number] : starts[number] + PART_BYTES]
        return {
            "PartNumber": number + 1,
            "ETag": s3.upload_part(PartNumber=number + 1, Body=chunk, **upload)["ETag"],
        }

    try:
        with ThreadPoolExecutor(STREAMS) as pool:
            parts = list(pool.map(part, range(len(starts))))
        s3.complete_multipart_upload(MultipartUpload={"Parts": parts}, IfNoneMatch="*", **upload)
    except BaseException:
        with suppress(Exception):  # what went wrong first is what is told
            s3.abort_multipart_upload(**upload)
        raise


def _sent(event: dict[str, Any], result: bytes) -> dict[str, Any]:
    """Where the result is: in the reply, or on S3."""
    out = event.get("out")
    inline = len(result) <= INLINE_RESULT
    if out is None and not inline:
        raise ValueError(f"a result of {len(result)} bytes does not fit into a reply of {INLINE_RESULT}")
    if out is not None and (event.get("once") or not inline):
        written = _put(out, "result", result)
        if not inline and not written:  # an earlier attempt's result stays, and need not be the same
            result = _found(out, "result") or result
    return _place(out, result)


def _place(out: dict[str, Any] | None, result: bytes) -> dict[str, Any]:
    """What a reply says of a result: itself; or where it lies; or all but its large values, and where these lie."""
    if out is None or len(result) <= INLINE_RESULT:
        return {"b64": base64.b64encode(result).decode()}
    stored = {"bucket": out["bucket"], "key": f"{out['key']}/result"}
    if not result.startswith(APART):
        return {**stored, "size": len(result)}
    begins = len(APART) + 8
    ends = begins + int.from_bytes(result[len(APART) : begins], "big")
    return {"b64": base64.b64encode(result[begins:ends]).decode(), "left": {**stored, "at": ends}}


def _apart(outcomes: list[tuple[Any, ...]], chatter: list[bytes], keep: int) -> bytes | None:
    """A result whose values of ``keep`` bytes and more lie behind the rest.

    ``None`` where it fits into a reply as it is, or its rest does not.
    """
    if sum(len(outcome[1]) for outcome in outcomes) <= INLINE_RESULT:
        return None
    said: list[tuple[Any, ...]] = []
    values: list[bytes] = []
    at = 0
    for item, payload, failed, *more in outcomes:
        if failed or len(payload) < keep:
            said.append((item, payload, failed, *more))
            continue
        said.append((item, b"", failed, *more, (at, len(payload))))
        values.append(payload)
        at += len(payload)
    head = pickle.dumps((said, chatter), protocol=pickle.HIGHEST_PROTOCOL)
    if not values or len(head) > INLINE_RESULT:
        return None
    return b"".join([APART, len(head).to_bytes(8, "big"), head, *values])


def _claimed(event: dict[str, Any], context: Any) -> dict[str, Any] | None:
    """The reply to an event that another run has claimed; ``None`` where this run is the one to do the work."""
    out, job, run = event["out"], os.environ.get("AWS_BATCH_JOB_ID", ""), uuid.uuid4().hex
    until = None if job else time.time() + context.get_remaining_time_in_millis() / 1000
    if _put(out, "claim", json.dumps({"run": run, "job": job, "until": until}).encode()):
        return None
    held = json.loads(_found(out, "claim") or b"{}")
    if held.get("run") == run:  # it was written, its reply was lost, and boto3 has written it once more
        return None
    wait_s = 0.05
    while True:
        result = _found(out, "result")
        if result is not None:
            return {"ok": True, "again": True, "result": _place(out, result)}
        if _over(held, job) or context.get_remaining_time_in_millis() <= SPARE_MS + 1000 * wait_s:
            break
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 2.0)
    return {"ok": False, "error": {"kind": "claimed", "message": "an earlier run claimed this work and left no result"}}


def _over(held: dict[str, Any], job: str) -> bool:
    """Whether nobody is left to wait for: an earlier attempt of this very job, or a run whose time is over."""
    if job and held.get("job") == job:
        return True
    return held.get("until") is not None and time.time() > held["until"] + SKEW_S


def _put(out: dict[str, Any], name: str, body: bytes) -> bool:
    """Write an object that isn't there yet; whether it was this call that wrote it, as far as S3 says."""
    from botocore.exceptions import ClientError

    for attempt in range(CONFLICTS):
        try:
            _written(out["bucket"], f"{out['key']}/{name}", body, out.get("encryption") or {})
        except ClientError as error:
            status = error.response["ResponseMetadata"].get("HTTPStatusCode")
            if status == 409:
                time.sleep(0.05 * 2**attempt)
                continue
            if status == 412:
                return False
            raise
        return True
    return False


def _found(out: dict[str, Any], name: str) -> bytes | None:
    from botocore.exceptions import ClientError

    try:
        return _read(out["bucket"], f"{out['key']}/{name}")
    except ClientError as error:
        if error.response["ResponseMetadata"].get("HTTPStatusCode") == 404:
            return None
        raise


def _s3() -> Any:
    if _STATE["s3"] is None:
        import boto3
        from botocore.config import Config

        config = Config(connect_timeout=5, read_timeout=60, retries={"total_max_attempts": 6, "mode": "standard"})
        _STATE["s3"] = boto3.client("s3", config=config)
    return _STATE["s3"]


# ---- words and numbers ----------------------------------------------------------------------------------------------


def _failure(kind: str, error: Exception) -> dict[str, Any]:
    return {"ok": False, "error": {"kind": kind, "message": _words(error), "traceback": traceback.format_exc()[-4000:]}}


def _words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # it cannot say itself
        return type(error).__name__


def peak_mb() -> float:
    """High-water mark of this process's resident memory; ``ru_maxrss`` would be that of its parent, too."""
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if os.uname().sysname == "Linux" else 2**20)


# ---- outside Lambda -------------------------------------------------------------------------------------------------


class _Job:
    """What a job on AWS Batch is to the handler: it has all the time that Batch gives it."""

    def __init__(self) -> None:
        self.aws_request_id = os.environ.get("AWS_BATCH_JOB_ID", "")
        self.memory_limit_in_mb = 0

    def get_remaining_time_in_millis(self) -> int:
        return 3_600_000


def _document(uri: str) -> Any:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return json.loads(_fetched({"bucket": bucket, "key": key}))


def main(arguments: list[str]) -> int:
    """Run the event that lies at ``s3://bucket/key``, and leave the reply beside it.

    A job of an array finds a list there, and its own event by its index.
    """
    if len(arguments) != 1 or not arguments[0].startswith("s3://"):
        print("usage: python -m prefect_slo.worker s3://bucket/key", file=sys.stderr)
        return 2
    event = _document(arguments[0])
    if isinstance(event, list):
        event = _document(event[int(os.environ["AWS_BATCH_JOB_ARRAY_INDEX"])])
    reply = handler(event, _Job())
    reply["telemetry"]["s3_puts"] += 1  # the reply itself
    body, out = json.dumps(reply).encode(), event["out"]
    _s3().put_object(Bucket=out["bucket"], Key=f"{out['key']}/reply", Body=body, **(out.get("encryption") or {}))
    return 0
