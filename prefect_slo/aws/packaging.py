"""The code that is deployed: the worker and cloudpickle in one zip, the same bytes for the same content."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

HANDLER = "prefect_slo_worker.handler"
_MODULE = HANDLER.partition(".")[0]
_WHEN = (1980, 1, 1, 0, 0, 0)  # zip files know no earlier day
HASH_DIGITS = 10


@lru_cache(maxsize=1)
def worker_zip() -> bytes:
    """The deployment package: Python files only, in order, without times."""
    files = _files()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _WHEN)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def write_worker(folder: Path) -> list[Path]:
    """The same files in a folder, for a container image that is to hold them; returns what was written."""
    written = []
    for name, content in sorted(_files().items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written.append(path)
    return written


def package_sha() -> str:
    """Hash of the deployment package as Lambda tells that of a function's code."""
    return base64.b64encode(hashlib.sha256(worker_zip()).digest()).decode()


def content_hash(*parts: object) -> str:
    """Digits that name the worker's code together with how it is deployed."""
    digest = hashlib.sha256(worker_zip())
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:HASH_DIGITS]


def _files() -> dict[str, bytes]:
    return {f"{_MODULE}.py": (Path(__file__).parent / "worker.py").read_bytes(), **_package("cloudpickle")}


def _package(name: str) -> dict[str, bytes]:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    return {str(Path(name) / path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.py"))}
