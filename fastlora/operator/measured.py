# SPDX-License-Identifier: Apache-2.0
"""What was measured on this machine, kept between processes: a JSON file for each device.

The files lie in ``$FASTLORA_CACHE``, else in ``fastlora`` in the user's cache folder. One counts
only for the versions it was measured with. Whatever is wrong with it costs a warning and the
measurements, never the run.
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
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora.files import locked, replace_file
from fastlora.operator.plans import Problem, forget

FORMAT = 1
MAX_BYTES = 16 << 20
OPS = ("forward", "backward")
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
_SIZES = ("M", "N", "K", "R")
_NUMBERS = {"block_m", "block_n", "block_k", "block_r", "group_m", "num_warps", "num_stages"}
_FLAGS = {"tma", "specialized", "early"}


@dataclass(frozen=True)
class Timing:
    """One direction of a problem: median seconds by implementation, the kernels' best configs.

    ``configs`` maps a launcher ("shrink", "product", "ds_db", "da", "dx") to a Config's fields.
    ``with_host``: the seconds from an idle GPU on, for few tokens, where the host takes longer.
    """

    seconds: dict[str, float]
    configs: dict[str, dict[str, int | bool | str]] = field(default_factory=dict)
    with_host: dict[str, float] = field(default_factory=dict)


Measurements = dict[Problem, dict[str, Timing]]
_loaded: dict[str, Measurements] = {}


def find(problem: Problem, device: torch.device) -> dict[str, Timing] | None:
    """Return the timings of both directions for the problem's bucket, or None."""
    return _known(device).get(problem.bucketed())


def add(found: Measurements, device: torch.device) -> Path | None:
    """Use ``found`` from now on and keep it; None, after a warning, where it cannot be kept.

    What other processes have kept meanwhile stays, unless it is of the same problem.
    """
    found = {problem.bucketed(): timings for problem, timings in found.items()}
    _known(device).update(found)
    forget()
    path = None
    try:
        path = path_of(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            kept = {**(_read(path, device) or {}), **found}
            text = json.dumps(_to_json(kept, device), indent=1).encode()
            replace_file(path, lambda file: file.write(text))
    except OSError as error:
        warnings.warn(
            f"what was measured cannot be kept in {path or 'a file'} ({error.strerror or error}) "
            "and holds for this process only; FASTLORA_CACHE names another folder",
            stacklevel=2,
        )
        return None
    return path


def path_of(device: torch.device) -> Path:
    """Return the file of ``device``'s measurements; devices of one model share it.

    Raises OSError where there is no folder for it.
    """
    folder = os.environ.get("FASTLORA_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastlora")
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    try:
        return Path(folder).expanduser() / f"{device.type}-{name}.json"
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
    return {
        "fastlora": fastlora.__version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "driver": driver() if device_type == "cuda" else "none",
    }


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


def count(device: torch.device) -> int:
    """Return for how many problems there are measurements."""
    return len(_known(device))


def _known(device: torch.device) -> Measurements:
    name = device_name(device)
    if name not in _loaded:
        found = {}
        try:
            found = _read(path_of(device), device) or {}
        except OSError as error:
            warnings.warn(
                f"nothing that was measured before is used: {error}; FASTLORA_CACHE names a folder",
                stacklevel=2,
            )
        _loaded.setdefault(name, found)  # another thread may have come before
    return _loaded[name]


def _read(path: Path, device: torch.device) -> Measurements | None:
    """Return what ``path`` holds for these versions; None, with a warning, if it is not usable."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for a writer
            raise OSError("not a file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        content = json.loads(data)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        if content.get("versions") != versions(device.type):
            warnings.warn(
                f"{path} was measured with {content.get('versions')!r:.300}, here is "
                f"{versions(device.type)}: not used; python -m fastlora tune measures again",
                stacklevel=2,
            )
            return None
        return dict(map(_record, content["problems"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        warnings.warn(f"{path} cannot be read: {error.strerror or error}", stacklevel=2)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        aside = path.with_suffix(".corrupt")
        with contextlib.suppress(OSError):  # a folder that cannot be written: it stays there
            os.replace(path, aside)
        warnings.warn(
            f"{path} holds no measurements ({type(error).__name__}: {error!s:.200}); it is set "
            f"aside as {aside.name}",
            stacklevel=2,
        )
    return None


def _to_json(known: Measurements, device: torch.device) -> dict[str, Any]:
    problems = []
    for problem, timings in known.items():
        names = {f: str(getattr(problem, f)).removeprefix("torch.") for f in ("dtype", "adapter")}
        problems.append(
            {**problem._asdict(), **names, **{op: vars(timings[op]) for op in OPS}},
        )
    return {"format": FORMAT, "versions": versions(device.type), "problems": problems}


def _record(row: Any) -> tuple[Problem, dict[str, Timing]]:
    """Return one problem of a file and its timings; raises where anything is not as written."""
    if not isinstance(row, dict) or row.keys() | {"others"} != {*Problem._fields, *OPS}:
        raise ValueError("a problem has other fields")
    sizes = [_integer(row[name], 1 << 40) for name in _SIZES]
    dtypes = DTYPES[row["dtype"]], DTYPES[row["adapter"]]
    if not isinstance(row["dropout"], bool):
        raise ValueError("dropout must be true or false")
    others = row.get("others", [])  # files of earlier versions have none
    others = tuple((_integer(n, 1 << 40), _integer(r, 1 << 40, least=0)) for n, r in others)
    problem = Problem(*sizes, *dtypes, row["dropout"], others)
    return problem, {op: _timing(row[op]) for op in OPS}


def _timing(value: Any) -> Timing:
    seconds, configs = value["seconds"], value["configs"]
    with_host = value.get("with_host", {})  # files of earlier versions have none
    for name, time in (*seconds.items(), *with_host.items()):
        if name not in ("triton", "library", "blocks"):
            raise ValueError(f"no implementation is called {name!r:.50}")
        if type(time) is not float or not math.isfinite(time) or time <= 0:
            raise ValueError(f"{time!r:.50} is no time")
    for config in configs.values():
        if config.keys() != _NUMBERS | _FLAGS | {"low_rank"}:
            raise ValueError("a config has other fields")
        for name, value in config.items():
            if name in _NUMBERS:
                _integer(value, 1024)
            elif type(value) is not (bool if name in _FLAGS else str):
                raise ValueError(f"{value!r:.50} is no {name}")
    return Timing(dict(seconds), dict(configs), dict(with_host))


def _integer(value: Any, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.50} is not an integer from {least} to {most}")
    return value
