# SPDX-License-Identifier: Apache-2.0
"""Files that are new and whole, or as they were, whatever ends the process in between."""

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

PATIENCE = 10.0  # seconds that a lock is waited for
ABANDONED = 3600.0  # seconds after which nobody writes to a temporary file any more


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(file)`` on a temporary file, then put it in the place of ``path`` at once."""
    replace_files({path: write})


def replace_files(writes: dict[Path, Callable[[BinaryIO], object]]) -> None:
    """Replace files of one folder, each complete on the disk before the first gets its name.

    Whoever locks the folder finds all as they were or all replaced.
    """
    own = f"{os.getpid()}.{secrets.token_hex(4)}"  # nobody else writes to such files
    temporary = {path: path.with_name(f".{path.name}.{own}.tmp") for path in writes}
    first = next(iter(temporary.values()))
    for path in writes:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has the name of the file", str(path))
    try:
        for path, write in writes.items():
            with open(temporary[path], "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        with locked(first.parent) if len(writes) > 1 else contextlib.nullcontext():
            for path in writes:
                os.replace(temporary[path], path)
    except BaseException:
        # Ctrl-C may come at the end of the first replace(): what is left belongs to that file then.
        if first.exists():
            for path in temporary.values():
                path.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # names last through a power cut where the system can
        handle = _opened(first.parent)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    with contextlib.suppress(OSError):  # what processes that were killed have left
        for path in writes:
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()


@contextlib.contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Keep out all who lock ``folder`` otherwise: one writer at a time, or any number of readers.

    A lock that cannot be had in ten seconds, or at all on this system, is done without.
    """
    try:
        import fcntl

        handle = _opened(folder)
    except (ImportError, OSError):  # Windows; no such folder
        yield
        return
    kind, until = fcntl.LOCK_SH if shared else fcntl.LOCK_EX, time.monotonic() + PATIENCE
    try:
        while time.monotonic() < until:
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        with contextlib.suppress(OSError):  # a process forked meanwhile has the handle too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _opened(folder: Path) -> int:
    # A pipe of that name would be waited for.
    return os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
