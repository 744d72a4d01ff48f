# SPDX-License-Identifier: Apache-2.0
"""What was measured of problems on this machine: a JSON file, kept between processes.

The files lie in ``$FASTLORA_CACHE``, else in ``fastlora`` in the user's cache folder. The name of
one holds all that a measurement depends on: the device, and the versions of what ran on it.
Whatever is wrong with it costs a warning and the measurements, never the run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import re
import stat
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastlora.files import locked, replace_file
from fastlora.operator.operands import OPS, Problem

MAX_BYTES = 16 << 20
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Timing:
    """One direction of a problem: median seconds by implementation, the kernels' best configs.

    ``configs`` maps a step of the kernels ("shrink", "outputs", …) to a Config's fields.
    ``with_host``: the seconds from an idle GPU on, for few tokens, where the host takes longer.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    configs: dict[str, dict[str, int | bool | str]] = field(default_factory=dict)
    with_host: dict[str, float] = field(default_factory=dict)


Measurements = dict[Problem, dict[str, Timing]]
_loaded: dict[str, Measurements] = {}


def find(problem: Problem, device: torch.device) -> dict[str, Timing] | None:
    """Return the timings of both directions for the problem's bucket, or None."""
    return known(device).get(problem.bucketed())


def add(found: Measurements, device: torch.device) -> Path | None:
    """Use ``found`` in plans made from now on, and keep it; None, with a warning, where it can't.

    What other processes have kept meanwhile stays, unless it is of the same problem.
    """
    found = {problem.bucketed(): timings for problem, timings in found.items()}
    known(device).update(found)
    path = None
    try:
        path = path_of(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            text = json.dumps([_row(*item) for item in {**_read(path, None), **found}.items()])
            replace_file(path, lambda file: file.write(text.encode()))
    except OSError as error:
        warnings.warn(
            f"what was measured cannot be kept in {path or 'a file'} ({error.strerror or error}) "
            "and holds for this process only; FASTLORA_CACHE names another folder",
            stacklevel=2,
        )
        return None
    return path


def path_of(device: torch.device) -> Path:
    """Return the file of what was measured on devices of this model with these versions.

    Raises OSError where there is no folder for it.
    """
    folder = os.environ.get("FASTLORA_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastlora")
    parts = [device.type, device_name(device)]
    parts += [f"{name} {version}" for name, version in versions(device.type).items()]
    name = re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-")
    try:
        return Path(folder).expanduser() / f"{name}.json"
    except RuntimeError as error:  # a user without a home
        raise OSError(f"{error}") from error


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the model of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def versions(device_type: str) -> dict[str, str]:
    """Return what a measurement depends on beside the device: packages and the GPU's driver."""
    own = sys.modules[__name__.partition(".")[0]].__version__
    found = {"fastlora": own, "torch": torch.__version__, "triton": version_of("triton")}
    return {**found, "driver": driver()} if device_type == "cuda" else found


def driver() -> str:
    """Return the version of NVIDIA's kernel driver, "unknown" where the system does not say."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        match = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", text)
        if match:
            return match[1]
    return "unknown"


def version_of(name: str) -> str:
    """Return an installed distribution's version, or "not installed"."""
    import importlib.metadata  # 10 ms that `import fastlora` need not take

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def known(device: torch.device) -> Measurements:
    """Return all that was measured on ``device``."""
    name = device_name(device)
    if name not in _loaded:
        found: Measurements = {}
        try:
            found = _read(path_of(device), warnings.warn)
        except OSError as error:
            warnings.warn(
                f"nothing that was measured before is used: {error}; FASTLORA_CACHE names a folder",
                stacklevel=2,
            )
        _loaded.setdefault(name, found)  # another thread may have come before
    return _loaded[name]


def _read(path: Path, warn: Any) -> Measurements:
    """Return what ``path`` holds; nothing, and a word to ``warn``, where it is not usable."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for a writer
            raise OSError("not a file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        return dict(map(_record, json.loads(data)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if warn is not None:
            reason = getattr(error, "strerror", None) or f"{error!s:.200}"
            said = f"{type(error).__name__}: {reason!r}"
            warn(f"{path} is not used, nor kept when the next is measured: {said}", stacklevel=4)
        return {}


def _row(problem: Problem, timings: dict[str, Timing]) -> dict[str, Any]:
    names = {f: str(getattr(problem, f)).removeprefix("torch.") for f in ("dtype", "adapter")}
    return {**problem._asdict(), **names, **{op: vars(timings[op]) for op in OPS}}


def _record(row: dict[str, Any]) -> tuple[Problem, dict[str, Timing]]:
    """Return one problem of a file and its timings; raises where anything is not as written."""
    timings = {op: _timing(row.pop(op)) for op in OPS}
    row |= {name: DTYPES[row[name]] for name in ("dtype", "adapter")}
    row["others"] = tuple((n, r) for n, r in row["others"])
    problem = Problem(**row)
    sizes = [*problem[:4], *(size for pair in problem.others for size in pair)]
    if not all(type(size) is int and size >= 0 for size in sizes) or min(problem[:4]) < 1:
        raise ValueError(f"{sizes!r:.100} are no sizes")
    if type(problem.dropout) is not bool:
        raise ValueError("dropout must be true or false")
    return problem, timings


def _timing(fields: dict[str, Any]) -> Timing:
    timing = Timing(**fields)
    for name, time in (*timing.seconds.items(), *timing.with_host.items()):
        if name not in ("triton", "library", "blocks"):
            raise ValueError(f"no implementation is called {name!r:.50}")
        if type(time) is not float or not math.isfinite(time) or time <= 0:
            raise ValueError(f"{time!r:.50} is no time")
    for config in timing.configs.values():
        if not all(type(value) in (int, bool, str) for value in config.values()):
            raise ValueError(f"{config!r:.100} is no config")
    return timing
