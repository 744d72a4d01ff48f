# SPDX-License-Identifier: Apache-2.0
"""What was measured of problems on this machine: a JSON file, kept between processes.

Whatever is wrong with it costs a warning and the measurements, never the run.
"""

import contextlib
import functools
import json
import math
import os
import platform
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastlora.files import locked, replace_file
from fastlora.operator.operands import Problem

# Of a problem: median seconds by implementation, for "forward" and "backward", and in "configs" the
# fields of the Config that was the fastest in each of the kernels' steps ("shrink", "outputs", …).
Row = dict[str, dict[str, Any]]
# Of `FourBits`: "forward" alone.
_loaded: dict[str, dict[str, Row]] = {}  # by device and what `str` makes of a bucketed problem


class FourBits:
    """What makes a weight of 4 bits dense, in the place of a problem."""

    def bucketed(self) -> str:
        return "4 bits made dense"


def find(problem: Problem | FourBits, device: torch.device) -> Row | None:
    """Return what was measured of the problem's bucket, or None."""
    return known(device).get(str(problem.bucketed()))


def known(device: torch.device) -> dict[str, Row]:
    """Return all that was measured on ``device``."""
    name, path, found = device_name(device), "what was measured", {}
    if name not in _loaded:
        try:
            path = path_of(device)
            found = _read(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # whatever a damaged file makes its readers raise
            said = f"{type(error).__name__}: {str(error)[:200]!r}"
            _warn(f"{path} is not used, nor kept when the next is measured: {said}")
        _loaded.setdefault(name, found)  # another thread may have come before
    return _loaded[name]


def add(found: dict[Problem | FourBits, Row], device: torch.device) -> Path | None:
    """Use ``found`` in plans made from now on, and keep it; None, with a warning, where it can't.

    What other processes have kept meanwhile stays, unless it is of the same problem.
    """
    rows, path = {str(problem.bucketed()): row for problem, row in found.items()}, "a file"
    known(device).update(rows)
    try:
        path = path_of(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            with contextlib.suppress(Exception):  # `known` has warned of it
                rows = _read(path) | rows
            text = json.dumps(rows, indent=1)
            replace_file(path, lambda file: file.write(text.encode()))
        return path
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        _warn(f"what was measured is for this process, it cannot be kept in {path}: {why}")
    return None


def _warn(text: str) -> None:
    warnings.warn(f"{text}; FASTLORA_CACHE names another folder", stacklevel=3)


def _read(path: Path) -> dict[str, Row]:
    """Return what ``path`` holds; raises where that is not as `add` writes it."""
    if path.stat().st_size > 16 << 20 or not path.is_file():  # a pipe would be waited for
        raise ValueError("not a file of 16 MiB at most")
    rows = json.loads(path.read_bytes())
    for row in rows.values():
        times = [*row["forward"].values(), *row["backward"].values()]
        right = all(type(time) is float and 0 < time < math.inf for time in times)
        if not right or type(row["configs"]) is not dict:
            raise ValueError(f"{row!r:.100} was never measured")
    return rows


def path_of(device: torch.device) -> Path:
    """Return the file, named after all that counts: the device, and the versions of what ran on it.

    In ``$FASTLORA_CACHE``, else in ``fastlora`` in the user's cache folder. Raises RuntimeError for
    a user without a home.
    """
    from fastlora import __version__

    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastlora")
    folder = os.environ.get("FASTLORA_CACHE") or folder
    parts = [device.type, device_name(device), "fastlora", __version__, "torch", torch.__version__]
    parts += ["triton", version_of("triton"), *(["driver", driver()] * (device.type == "cuda"))]
    name = re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-")
    return Path(folder).expanduser() / f"{name}.json"


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the model of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _said("/proc/cpuinfo", r"model name\s*: (.*)") or platform.machine()


def driver() -> str:
    """Return the version of NVIDIA's kernel driver, "unknown" where the system does not say."""
    release = r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)"
    return _said("/proc/driver/nvidia/version", release) or "unknown"


def _said(file: str, pattern: str) -> str | None:
    with contextlib.suppress(OSError):
        if found := re.search(pattern, Path(file).read_text(errors="replace")):
            return found[1].strip()
    return None


def version_of(name: str) -> str:
    """Return an installed distribution's version, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
