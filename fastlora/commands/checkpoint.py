# SPDX-License-Identifier: Apache-2.0
"""A training run's state on disk: written whole or not at all, read back bit for bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from fastlora.files import replace_file

FORMAT = 2


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``: tensors, numbers, strings, and lists and dicts of them only."""
    buffer = io.BytesIO()  # to a file that cannot grow torch.save fails in ways of its own
    torch.save({"format": FORMAT, **state}, buffer)
    replace_file(path, lambda file: file.write(buffer.getbuffer()))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote. Raises ValueError when the file is not one of its."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] == FORMAT:
            return state
    except Exception as error:  # a damaged file may fail anywhere in torch.load
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    raise ValueError(f"{path} has checkpoint format {state['format']}; this version reads {FORMAT}")
