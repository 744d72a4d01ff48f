# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the user's mistakes, numbers in a range, and which process speaks."""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from fastlora.files import replace_file

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICE = {"help": "default: cuda if there is one, else cpu"}
TARGETS = {"nargs": "+", "metavar": "NAME", "default": ["all-linear"]}


class UserError(Exception):
    """Something the user can put right; the command line shows it as one line."""


def number(kind: type, least: float, below: float = math.inf, above: bool = False) -> Callable:
    """Return argparse's type of a number at or ``above`` the ``least``, and below ``below``."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value < below or (above and value == least):
            right = "above" if above else "at least"
            right += f" {least}" + f" and below {below}" * (below < math.inf)
            raise argparse.ArgumentTypeError(f"must be {right}, got {text}")
        return value

    parse.__name__ = kind.__name__  # as argparse says what is no number
    return parse


ABOVE_0 = number(float, 0, above=True)


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


def is_sharded() -> bool:
    """Return whether Accelerate is to shard the model, as it tells the processes it starts."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def say(what: str, text: object) -> None:
    if rank() == 0:
        print(f"{what:<9} {text}", flush=True)


def write_json(path: Path, found: dict) -> None:
    text = json.dumps(found, indent=1, ensure_ascii=False)
    replace_file(path, lambda file: file.write(text.encode()))
