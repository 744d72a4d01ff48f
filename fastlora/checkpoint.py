"""A training run's state on disk: written whole or not at all, read back bit for bit."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = 1


def replace_file(path: Path, write) -> None:
    """Call ``write(file)`` on a temporary file, then put it in the place of ``path`` at once."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every system lets a folder be synchronised
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Write the trainable parameters, the optimizer, torch's generators and ``progress``.

    ``progress`` holds numbers, strings, lists and dicts only.
    """
    state = {
        "format": FORMAT,
        "parameters": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "rng_cpu": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "progress": progress,
    }
    replace_file(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote. Raises ValueError when the file is not one of its."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] == FORMAT:
            return state
    except Exception as error:  # a damaged file may fail anywhere in torch.load
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    raise ValueError(f"{path} has checkpoint format {state['format']}; this version reads {FORMAT}")


@torch.no_grad()
def restore(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a loaded state back into a model and an optimizer built the same way, and into torch."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if trainable.keys() != state["parameters"].keys():
        raise ValueError("the checkpoint holds other parameters than the model trains")
    for name, parameter in trainable.items():
        parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng_cpu"])
    if state["rng_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["rng_cuda"])
