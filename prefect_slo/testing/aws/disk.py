"""What a sandbox has of the disk: its layers, a temporary folder as large as its function's, and the packages it sees.

Where the system lets a process have file systems of its own (as root on Linux, or in a user namespace), layers lie at
``/opt``, and the temporary folder is a file system of just that size: what fills it gets the kernel's own "no space
left on device". Elsewhere layers lie in a folder on the sandbox's paths, and the temporary folder is looked at when an
invocation has ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_SITE = (f"python/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages",)
_MOUNT = """
mount -t tmpfs -o "size=$1m,mode=700" tmpfs "$2" || exit 1
if [ -n "$3" ]; then mount --bind "$3" /opt || exit 1; fi
if [ -n "$4" ]; then
    mkdir -p "$2/tmp"
    IFS=:
    for seen in $5; do mkdir -p "$2$seen" && mount --bind "$seen" "$2$seen" || exit 1; done
    mount --rbind "$2/tmp" /tmp || exit 1
fi
shift 5
exec "$@"
"""
"""Makes a process its disk, and runs it: size, temporary folder, what lies at ``/opt``, whether ``/tmp`` is its own,
and what it then still sees of the old one."""

OWN = (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount"))
"""How a process gets file systems of its own: as root, or in a user namespace."""


@dataclass(frozen=True)
class Disk:
    """The disk of one sandbox.

    Attributes:
        tmp: Its temporary folder.
        size_mb: What fits into that.
        opt: Where it finds its layers; ``None`` where it has none.
        own: What its command begins with, so that both are file systems of its own; empty where there are none.
    """

    tmp: Path
    size_mb: int
    opt: Path | None = None
    own: tuple[str, ...] = ()

    @classmethod
    def made(cls, folder: Path, size_mb: int, layers: Sequence[Path], seen: Sequence[Path] | None = None) -> Disk:
        """The disk of a sandbox whose files lie in a folder; later layers are laid over earlier ones.

        Args:
            folder: The folder.
            size_mb: What fits into its temporary folder.
            layers: Folders of its layers.
            seen: Where it has a ``/tmp`` of its own, that folder: what it sees of this machine's; else ``None``.
        """
        tmp, opt = folder / "tmp", folder / "opt"
        tmp.mkdir(parents=True, exist_ok=True)
        for layer in layers:
            shutil.copytree(layer, opt, dirs_exist_ok=True, symlinks=True)
        own, mounted = own_file_systems(), bool(layers) and _opt_is_free()
        if own is None:
            return cls(tmp, size_mb, opt if layers else None)
        at, whose = (tmp, "") if seen is None else (Path("/tmp"), "own")
        old = ":".join(str(path) for path in seen or () if path.is_relative_to("/tmp"))
        told = (str(size_mb), str(tmp), str(opt) if mounted else "", whose, old)
        there = Path("/opt") if mounted else opt
        return cls(at, size_mb, there if layers else None, (*own, "sh", "-c", _MOUNT, "sh", *told))

    def paths(self, *names: str) -> list[str]:
        """Folders of the layers."""
        return [str(self.opt / name) for name in names] if self.opt is not None else []

    @property
    def variables(self) -> dict[str, str]:
        """What it brings into a sandbox's environment, but for the path of Python."""
        libraries = os.pathsep.join(self.paths("lib"))
        return {
            "PATH": os.pathsep.join([*self.paths("bin"), os.environ.get("PATH", os.defpath)]),
            "TMPDIR": str(self.tmp),
            **({"LD_LIBRARY_PATH": libraries} if libraries else {}),
        }

    @property
    def python(self) -> list[str]:
        """Folders of Python packages that the layers bring."""
        return self.paths("python", *_SITE)

    @property
    def overfull(self) -> bool:
        """Whether more lies in the temporary folder than fits; never where that is a file system of its own."""
        return not self.own and _size_mb(self.tmp) > self.size_mb


def _size_mb(folder: Path) -> float:
    found = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                found += 512 * os.lstat(os.path.join(root, name)).st_blocks  # what holes have is no space
    return found / 2**20


@cache
def own_file_systems() -> tuple[str, ...] | None:
    """What lets a process here have file systems of its own; ``None`` where nothing does."""
    return next((own for own in OWN if works(own)), None)


def works(own: tuple[str, ...]) -> bool:
    """Whether it does: a small disk is made and left."""
    with tempfile.TemporaryDirectory(prefix="prefect-slo-") as folder:
        tried = [*own, "sh", "-c", _MOUNT, "sh", "1", folder, "", "", "", "true"]
        try:
            return subprocess.run(tried, capture_output=True, timeout=10, check=False).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


@cache
def _opt_is_free() -> bool:
    """Whether something else may lie at ``/opt`` for a process; not where this Python itself does."""
    if Path(sys.prefix).is_relative_to("/opt") or Path(sys.base_prefix).is_relative_to("/opt"):
        return False
    return Path("/opt").is_dir()


def package_folder(folder: Path, names: tuple[str, ...]) -> str:
    """A folder with links to installed packages, and to nothing else beside them.

    Sandboxes that start at once may all be at it: whoever comes second finds a link there, and the folder is whole for
    each of them when this returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        target = Path(spec.origin)
        if target.name == "__init__.py":
            target = target.parent
        for installed in (target, *target.parent.glob(f"{name}.libs")):  # the latter: shared libraries of a wheel
            with contextlib.suppress(FileExistsError):
                (folder / installed.name).symlink_to(installed)
    return str(folder)
