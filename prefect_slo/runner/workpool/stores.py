"""Storage that a flow and its jobs both reach: a folder, S3, or whatever fsspec opens.

Objects lie in *boxes*, so that all of a job's can be deleted at once. A job finds its way there by a ``reference`` of
plain JSON, which holds no credentials: those come from the job's own surroundings, or from a block by its name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from prefect.blocks.core import Block
from prefect.filesystems import LocalFileSystem, RemoteFileSystem

from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.errors import InvalidValue

EXPECTED = (
    "a folder that flow and workers share, an address such as s3://bucket/prefix, or a block (LocalFileSystem, a saved "
    "RemoteFileSystem, S3PrefixBlock, S3Bucket)"
)


class Store(Protocol):
    """Small objects by box and name; what is written is there whole or not at all, or is seen to be incomplete."""

    @property
    def poll_s(self) -> float:
        """How often it is worth looking for news."""
        ...

    @property
    def reference(self) -> dict[str, Any]:
        """What a job needs to find it, as JSON."""
        ...

    def read(self, box: str, name: str) -> bytes | None:
        """An object, or ``None`` where there is none."""
        ...

    def write(self, box: str, name: str, body: bytes) -> None:
        """Make or replace an object."""
        ...

    def discard(self, box: str, name: str) -> None:
        """Delete an object that has been read, where that costs nothing."""
        ...

    def clear(self, box: str) -> None:
        """Delete a box with all that is in it."""
        ...


@dataclass(frozen=True)
class FolderStore:
    """A folder: of one machine, or one that several have mounted."""

    path: str
    poll_s: float = 0.01

    @property
    def reference(self) -> dict[str, Any]:
        return {"folder": self.path}

    def read(self, box: str, name: str) -> bytes | None:
        try:
            return self._at(box, name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, box: str, name: str, body: bytes) -> None:
        target = self._at(box, name)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            try:
                partial.write_bytes(body)
            except FileNotFoundError:
                partial.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(body)
            os.replace(partial, target)
        except OSError:  # on a full disk, what there is of it would keep signs of life out
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def discard(self, box: str, name: str) -> None:
        self._at(box, name).unlink(missing_ok=True)

    def clear(self, box: str) -> None:
        shutil.rmtree(Path(self.path, box), ignore_errors=True)
        if "/" in box:
            with contextlib.suppress(OSError):  # other boxes are in it
                Path(self.path, box).parent.rmdir()

    def _at(self, box: str, name: str) -> Path:
        return Path(self.path, box, name)


@dataclass(frozen=True)
class S3Store:
    """A prefix of an S3 bucket. Read messages stay until their box is cleared: S3 deletes many at once for nothing."""

    prefix: S3Prefix
    poll_s: float = 0.1

    @property
    def reference(self) -> dict[str, Any]:
        return {"s3": {name: value for name, value in asdict(self.prefix).items() if name != "_known"}}

    def read(self, box: str, name: str) -> bytes | None:
        from botocore.exceptions import ClientError

        try:
            return self.prefix.get(self._key(box, name))
        except ClientError as error:
            if error.response["ResponseMetadata"].get("HTTPStatusCode") == 404:
                return None
            raise

    def write(self, box: str, name: str, body: bytes) -> None:
        self.prefix.put(self._key(box, name), body)

    def discard(self, box: str, name: str) -> None:
        """It goes with its box."""

    def clear(self, box: str) -> None:
        self.prefix.delete(box)

    def _key(self, box: str, name: str) -> str:
        return f"{self.prefix.key(box)}/{name}"


@dataclass(frozen=True)
class FsspecStore:
    """A place that fsspec opens: by its address, or by the name of a ``RemoteFileSystem`` block with the settings."""

    address: str = ""
    block: str = ""
    poll_s: float = 0.1

    @property
    def reference(self) -> dict[str, Any]:
        return {"block": self.block} if self.block else {"address": self.address}

    def read(self, box: str, name: str) -> bytes | None:
        files, root = self._files()
        try:
            return bytes(files.cat_file(f"{root}/{box}/{name}"))
        except FileNotFoundError:
            return None

    def write(self, box: str, name: str, body: bytes) -> None:
        files, root = self._files()
        files.makedirs(f"{root}/{box}", exist_ok=True)
        files.pipe_file(f"{root}/{box}/{name}", body)

    def discard(self, box: str, name: str) -> None:
        files, root = self._files()
        with contextlib.suppress(FileNotFoundError):
            files.rm_file(f"{root}/{box}/{name}")

    def clear(self, box: str) -> None:
        files, root = self._files()
        with contextlib.suppress(FileNotFoundError):
            files.rm(f"{root}/{box}", recursive=True)

    def _files(self) -> tuple[Any, str]:
        return _opened(self.address, self.block)


_OPENED: dict[tuple[str, str], tuple[Any, str]] = {}


def _opened(address: str, block: str) -> tuple[Any, str]:
    """The file system and the folder in it; opened once per process."""
    if (address, block) not in _OPENED:
        import fsspec

        settings: Mapping[str, Any] = {}
        found = address
        if block:
            loaded: Any = Block.load(block, _sync=True)  # type: ignore[call-arg]
            found, settings = loaded.basepath, loaded.settings
        files, root = fsspec.core.url_to_fs(found, **settings)
        _OPENED[address, block] = files, root.rstrip("/")
    return _OPENED[address, block]


def store_of(value: Any) -> Store:
    """The store that a user means.

    Raises:
        InvalidValue: It is none.
    """
    match value:
        case FolderStore() | S3Store() | FsspecStore():
            return value
        case Path():
            return FolderStore(str(value.expanduser().absolute()))
        case str() if value.startswith("s3://"):
            return S3Store(S3Prefix.of(value))
        case str() if "://" in value:
            return FsspecStore(address=value.rstrip("/"))
        case str() if value.strip():
            return FolderStore(str(Path(value).expanduser().absolute()))
        case LocalFileSystem():
            return FolderStore(str(Path(value.basepath or ".").expanduser().absolute()))
        case RemoteFileSystem() if value._block_document_name:
            return FsspecStore(block=f"{value.get_block_type_slug()}/{value._block_document_name}")
        case S3Prefix() | Block():
            try:
                return S3Store(S3Prefix.of(value))
            except InvalidValue:
                raise InvalidValue("storage", value, EXPECTED) from None
    raise InvalidValue("storage", value, EXPECTED)


def referred(reference: Mapping[str, Any]) -> Store:
    """The store that a reference leads to."""
    match reference:
        case {"folder": str(path)}:
            return FolderStore(path)
        case {"s3": dict(fields)}:
            return S3Store(S3Prefix(**fields))
        case {"address": str(address)}:
            return FsspecStore(address=address)
        case {"block": str(block)}:
            return FsspecStore(block=block)
    raise InvalidValue("storage", dict(reference), EXPECTED)
