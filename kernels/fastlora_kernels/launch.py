"""How a kernel is launched: on the tensors' own device, in the interpreter, or only recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastlora_kernels.configs import Chip, Config, default_config, kind_of


@triton.jit
def _probe():
    pass


# Read once by Triton when a kernel is decorated; later changes of the variable have no effect.
INTERPRETED = type(_probe).__name__ == "InterpretedFunction"
if INTERPRETED:
    from fastlora_kernels import interpreter

    interpreter.install()


@dataclass(frozen=True)
class Call:
    """One launch as it was asked for: what ahead-of-time compilation needs to know of it."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: Config


_recorded: list[Call] | None = None
_recorded_chip: Chip | None = None


@contextlib.contextmanager
def recording(chip: Chip) -> Iterator[list[Call]]:
    """Collect the launches made inside, as for ``chip``, and run none of them."""
    global _recorded, _recorded_chip
    _recorded, _recorded_chip = calls, _ = [], chip
    try:
        yield calls
    finally:
        _recorded = _recorded_chip = None


def chip_of(device: torch.device) -> Chip:
    """Return what configs need to know of ``device``."""
    if _recorded_chip is not None:
        return _recorded_chip
    return Chip.of(device)


def config_for(
    kernel: str, x: Tensor, r: int, adapter: torch.dtype, dropout: bool, *operands: Tensor
) -> Config:
    """Return the default config of ``kernel`` for inputs of x's dtype and rank-r factors.

    ``operands`` are those that the main loop reads and that decide on wide loads.
    """
    kind, chip = kind_of(x.dtype, adapter), chip_of(x.device)
    return default_config(kernel, kind, r, dropout, chip, all(map(_aligned, operands)))


def _aligned(t: Tensor) -> bool:
    """Return whether Triton can load ``t`` 16 bytes at a time."""
    near, far = sorted(t.stride())
    return near == 1 and far % 16 == 0 and (t.is_meta or t.data_ptr() % 16 == 0)


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **args: Any) -> None:
    """Run ``kernel`` over ``grid`` with ``config``'s warps and stages; nothing if it is empty."""
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Call(kernel, grid, args, config))
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    device = next(value.device for value in args.values() if isinstance(value, torch.Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](**args, **options)
