# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options, the user's mistakes, and which process speaks."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastlora.files import replace_file

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class UserError(Exception):
    """Something the user can put right; the command line shows it as one line."""


def option(default: Any, help: str, **more: Any) -> Any:
    """Return a field of a command's settings, with what argparse is to know of it.

    A tuple takes several values, of its first one's type.
    """
    known: dict[str, Any] = {"help": help, "default": default, **more}
    example = default[0] if default and isinstance(default, tuple) else default
    if isinstance(default, bool):
        known["action"] = "store_true"
    elif isinstance(example, int | float):
        known["type"] = type(example)
    if isinstance(default, tuple):
        known["nargs"] = "+"
    if default is dataclasses.MISSING:
        known |= {"default": None, "required": True}
    return dataclasses.field(default=default, metadata=known)


def check(settings: Any, name: str, right: bool, expected: str) -> None:
    """Raise UserError where a field of ``settings`` is not ``right``."""
    if not right:
        given = getattr(settings, name)
        raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {given}")


def check_finite(loss: float, where: str, lr: float) -> None:
    if not math.isfinite(loss):
        cure = f"--lr {lr:g} is too high; --restart with a lower one"
        raise UserError(f"the loss is {loss} at {where}: {cure}")


def require(*modules: str, extra: str = "finetune") -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        what = " and ".join(missing)
        raise UserError(f'{what} not installed: pip install "fastlora-kernels[{extra}]"')


def torch_device(name: str | None) -> torch.device:
    """Return the device that --device names, by default a GPU where there is one."""
    try:
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        return torch.empty(0, device=name).device  # with its number
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from error


def first_line(thing: object) -> str:
    return str(thing).strip().partition("\n")[0]


def rank() -> int:
    """Return which of several processes this is, 0 of a single one: that speaks for all."""
    return int(os.environ.get("RANK", "0"))


def say(what: str, text: object) -> None:
    if rank() == 0:
        print(f"{what:<9} {text}", flush=True)


def write_json(path: Path, found: dict) -> None:
    text = json.dumps(found, indent=1, ensure_ascii=False)
    replace_file(path, lambda file: file.write(text.encode()))


def leave(code: int) -> NoReturn:
    """End this process.

    A group of gloo's, on a CPU, is left as it is: to free it can wait for ever for a thread that
    waits for Python, and Python can abort as it ends (pytorch/pytorch#179291).
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "gloo":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
