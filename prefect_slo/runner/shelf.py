"""Results that several calls take, once in memory that worker processes of this machine share.

A result is pickled into a file of its own; whoever takes it gets the file's name in place of it, maps the file and
unpickles. Large buffers (arrays) lie beside the pickle and are not copied: their pages are the file's until they are
written to, and then the writer's own, so that a call that changes its argument changes nobody else's.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import cloudpickle

LEAST_BYTES = 64 * 1024
"""Smaller results travel with their call: mapping a file takes longer."""

MEMORY_SHARE = 0.25
"""Of the memory of the machine, what results may take at most."""

_SHARED = Path("/dev/shm")
_NAME, _LOCK = "prefect-slo-shelf", "lock"
_HEADER = struct.Struct("<QQ")
_LENGTH = struct.Struct("<Q")
_ALIGNED = 64  # what numpy likes its buffers to begin at
_TRIES = 5  # at a folder that nobody sweeps before it is locked


class Shelf:
    """Where the results of one flow run lie until it ends; a run that crashed leaves them until the next one's is made.

    Args:
        limit_bytes: What they may take together; a result that has no room travels with each of its calls.
        root: Folder for the run's own; by default memory that looks like a file system, else the temporary folder.
    """

    def __init__(self, limit_bytes: float, root: Path | None = None) -> None:
        self._left = limit_bytes
        self._root = root or (_SHARED if os.access(_SHARED, os.W_OK) else Path(tempfile.gettempdir()))
        self._folder: Path | None = None
        self._lock: int | None = None
        self._closed = False
        self._names = count(1)
        self._kept: dict[object, str | None] = {}
        _sweep(self._root)

    def keep(self, key: object, value: Any) -> str | None:
        """The file of a result, written when it is first asked for; ``None`` where it has to travel, as all do once
        this is closed.

        Args:
            key: Names the result.
            value: The result.

        Raises:
            Exception: Whatever pickling it raises.
        """
        if self._closed:
            return None
        if key not in self._kept:
            self._kept[key] = self._write(value)
        return self._kept[key]

    def close(self) -> None:
        """Remove the files. What is mapped stays until it is let go."""
        self._closed = True
        folder, self._folder = self._folder, None
        self._kept.clear()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _write(self, value: Any) -> str | None:
        aside: list[pickle.PickleBuffer] = []
        meta = cloudpickle.dumps(value, protocol=5, buffer_callback=aside.append)
        try:
            buffers = [buffer.raw() for buffer in aside]
        except BufferError:  # of an array that lies in memory with gaps
            aside, buffers = [], []
            meta = cloudpickle.dumps(value, protocol=5)
        lengths = b"".join(_LENGTH.pack(buffer.nbytes) for buffer in buffers)
        head = _HEADER.pack(len(meta), len(buffers)) + lengths + meta
        size = len(head) + sum(buffer.nbytes + _ALIGNED for buffer in buffers)
        if size < LEAST_BYTES or size > self._left:
            return None
        try:
            path = self._new_folder() / str(next(self._names))
            if size > shutil.disk_usage(path.parent).free:
                return None
            with _whole(path), path.open("wb") as file:
                file.write(head)
                for buffer in buffers:
                    file.write(bytes(-file.tell() % _ALIGNED))
                    file.write(buffer)
        except OSError:  # full, or not ours: it travels
            return None
        self._left -= size
        return str(path)

    def _new_folder(self) -> Path:
        for _ in range(_TRIES):
            if self._folder is not None:
                break
            made = Path(tempfile.mkdtemp(prefix=f"{_NAME}-{os.getpid()}-", dir=self._root))
            self._lock = _locked(made)
            self._folder = made if self._lock is not None else None
        if self._folder is None:
            raise OSError(f"no folder in {self._root} can be locked")
        return self._folder


def dump(content: Any, kept: Mapping[int, str]) -> bytes:
    """Pickle something in which results, by ``id``, are names of files."""
    buffer = io.BytesIO()
    _Pickler(buffer, kept).dump(content)
    return buffer.getvalue()


def load(payload: bytes) -> tuple[Any, int]:
    """What ``dump`` or any pickler has written, and how many bytes of files it holds."""
    unpickler = _Unpickler(io.BytesIO(payload))
    return unpickler.load(), unpickler.mapped


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, kept: Mapping[int, str]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_id(self, value: Any) -> str | None:
        return self._kept.get(id(value))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.mapped = 0

    def persistent_load(self, name: str) -> Any:
        with open(name, "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        self.mapped += len(view)
        meta, n = _HEADER.unpack_from(view)
        at = _HEADER.size + n * _LENGTH.size
        lengths = [_LENGTH.unpack_from(view, _HEADER.size + i * _LENGTH.size)[0] for i in range(n)]
        pickled, at, buffers = view[at : at + meta], at + meta, []
        for length in lengths:
            at += -at % _ALIGNED
            buffers.append(view[at : at + length])
            at += length
        return pickle.loads(pickled, buffers=buffers)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Inside, a file is written; what ends early leaves nothing of it."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder until it is closed; ``None`` where another does, or it is gone.

    The kernel lets go of it when the process ends, however it ends, and whichever namespace has given it its id.
    """
    from prefect_slo.telemetry.locks import hold  # workers, who import this module, lock nothing

    path = folder / _LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:  # gone, or another user's
        return None
    if hold(descriptor) and path.exists():
        return descriptor
    os.close(descriptor)
    return None


def _sweep(root: Path) -> None:
    """Remove what processes have left that ended without doing so: nobody holds its lock any more."""
    for left in root.glob(f"{_NAME}-*"):
        if (lock := _locked(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
