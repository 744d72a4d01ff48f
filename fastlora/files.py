# SPDX-License-Identifier: Apache-2.0
"""Files that are new and whole, or as they were, whatever ends the process in between."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(file)`` on a temporary file, then put it in the place of ``path`` at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = _opened(folder)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Keep out all who lock ``folder`` otherwise: one writer at a time, or any number of readers.

    The lock ends with the process that holds it. Where the system has none, all go on at once.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows; no folder; no locks on it
            import fcntl

            handle = _opened(folder)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def _opened(folder: Path) -> int:
    # A pipe of that name would be waited for.
    return os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
