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
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import cloudpickle

LEAST_BYTES = 64 * 1024
"""Smaller results travel with their call: mapping a file takes longer."""

MEMORY_SHARE = 0.25
"""Of the memory of the machine, what results may take at most."""

_SHARED = Path("/dev/shm")
_NAME = "prefect-slo-shelf"
_HEADER = struct.Struct("<QQ")
_LENGTH = struct.Struct("<Q")
_ALIGNED = 64  # what numpy likes its buffers to begin at


class Shelf:
    """Where the results of one flow run lie until it ends.

    Args:
        limit_bytes: What they may take together; a result that has no room travels with each of its calls.
        root: Folder for the run's own; by default memory that looks like a file system, else the temporary folder.
    """

    def __init__(self, limit_bytes: float, root: Path | None = None) -> None:
        self._left = limit_bytes
        self._root = root or (_SHARED if os.access(_SHARED, os.W_OK) else Path(tempfile.gettempdir()))
        self._folder: Path | None = None
        self._names = count(1)
        self._kept: dict[object, str | None] = {}

    def keep(self, key: object, value: Any) -> str | None:
        """The file of a result, written when it is first asked for; ``None`` where it has to travel.

        Args:
            key: Names the result.
            value: The result.

        Raises:
            Exception: Whatever pickling it raises.
        """
        if key not in self._kept:
            self._kept[key] = self._write(value)
        return self._kept[key]

    def close(self) -> None:
        """Remove the files. What is mapped stays until it is let go."""
        folder, self._folder = self._folder, None
        self._kept.clear()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

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
            with path.open("wb") as file:
                if size > shutil.disk_usage(path.parent).free:
                    return None
                file.write(head)
                for buffer in buffers:
                    file.write(bytes(-file.tell() % _ALIGNED))
                    file.write(buffer)
        except OSError:  # full, or not ours: it travels
            return None
        self._left -= size
        return str(path)

    def _new_folder(self) -> Path:
        if self._folder is None:
            _sweep(self._root)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{_NAME}-{os.getpid()}-", dir=self._root))
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


def _sweep(root: Path) -> None:
    """Remove what processes have left that ended without doing so."""
    for left in root.glob(f"{_NAME}-*"):
        owner = left.name.removeprefix(f"{_NAME}-").partition("-")[0]
        if not owner.isdigit():
            continue
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except OSError:  # another user's
            continue
