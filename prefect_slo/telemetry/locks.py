"""Whether the writer of a log still lives: an advisory lock, which the kernel drops with the process."""

from __future__ import annotations

import errno
import sys

if sys.platform == "win32":

    def hold(descriptor: int) -> bool:
        """Take the exclusive lock on an open file without waiting; whether it could be taken."""
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def hold(descriptor: int) -> bool:
        """Take the exclusive lock on an open file without waiting; whether it could be taken.

        On a file system without locks every file counts as free.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        return True
