# SPDX-License-Identifier: Apache-2.0
"""How a kernel is launched: on the tensors' own device, in the interpreter, or only recorded."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(eq=False)
class Call:
    """One launch as it was asked for: what ahead-of-time compilation needs to know of it."""

    kernel: Any
    grid: tuple[int, ...]
    values: tuple[Any, ...]
    config: Config
    early: bool = False

    @property
    def args(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.kernel.arg_names, self.values, strict=True))


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


_configs: dict[tuple, Config] = {}
NO_CONFIGS: Mapping[str, Config] = {}


def config_for(
    kernel: str,
    x: Tensor,
    other: Tensor,
    r: int,
    adapter: torch.dtype,
    dropout: bool,
    even: bool = True,
) -> Config:
    """Return the default config of ``kernel`` for inputs of x's dtype and rank-r factors.

    The main loop reads ``x`` and ``other``: whether it can do so 16 bytes at a time matters.
    ``even``: as `default_config` has it.
    """
    return _config_for(kernel, x, _aligned(x) and _aligned(other), r, adapter, dropout, even)


def config_for_all(
    kernel: str,
    xs: Sequence[Tensor],
    others: Sequence[Tensor],
    r: int,
    adapter: torch.dtype,
    dropout: bool,
    even: bool = True,
    fold: bool = True,
) -> Config:
    """Return the default config of a ``kernel`` that reads several inputs, as `config_for` does.

    Those of one list have to lie the same way round as well, to be read 16 bytes at a time.
    """
    aligned = all(map(_aligned, (*xs, *others)))
    aligned = aligned and all(len({t.stride(1) == 1 for t in ts}) == 1 for ts in (xs, others))
    return _config_for(kernel, xs[0], aligned, r, adapter, dropout, even, fold)


def _config_for(
    kernel: str,
    x: Tensor,
    aligned: bool,
    r: int,
    adapter: torch.dtype,
    dropout: bool,
    even: bool,
    fold: bool = True,
) -> Config:
    key = (kernel, _recorded_chip, x.device, x.dtype, adapter, r, dropout, aligned, even, fold)
    config = _configs.get(key)
    if config is None:
        kind, chip = kind_of(x.dtype, adapter), chip_of(x.device)
        config = _configs[key] = default_config(kernel, kind, r, dropout, chip, aligned, even, fold)
    return config


def _aligned(t: Tensor) -> bool:
    """Return whether Triton can load ``t`` 16 bytes at a time: strides 1 and a multiple of 16."""
    strides = t.stride()
    return 1 in strides and sum(strides) % 16 == 1 and t.data_ptr() % 16 == 0


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    config: Config,
    x: Tensor | tuple[Tensor, ...],
    *args: Any,
    early: bool = False,
) -> None:
    """Run ``kernel(x, *args)`` over ``grid`` on x's device with ``config``'s warps and stages.

    Positional arguments, in the kernel's order: names would take 5 µs more. Those of several
    projections go as tuples. An ``early`` kernel may start before the one launched last has ended
    (programmatic dependent launch), and waits by itself. Does nothing where the grid is empty.
    Raises RuntimeError, and launches nothing, where a CUDA graph is being captured and the kernel
    would have to be compiled first.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Call(kernel, grid, (x, *args), config, early))
        return
    run, options = kernel[grid], {"num_warps": config.num_warps, "num_stages": config.num_stages}
    first = x[0] if isinstance(x, tuple) else x
    if not first.is_cuda:
        run(x, *args, **options)
        return
    if early:
        options["launch_pdl"] = True
    if config.tma:
        # In a copy of the context the caller's allocator stays what it is (not on Triton 3.4,
        # which has one for the process).
        run = functools.partial(contextvars.copy_context().run, _with_workspace, run)
    with contextlib.ExitStack() as stack:
        if first.device.index != torch.cuda.current_device():
            # Triton launches on the current device, which need not be the tensors'.
            stack.enter_context(torch.cuda.device(first.device))
        if torch.cuda.is_current_stream_capturing():
            stack.enter_context(_compiled_before())
        run(x, *args, **options)


def _with_workspace(run: Any, *args: Any, **options: Any) -> None:
    """Launch a kernel that keeps its tensor descriptors in device memory."""
    triton.set_allocator(_workspace)
    run(*args, **options)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # at multiples of 512 bytes


_hook_lock = threading.Lock()


@contextlib.contextmanager
def _compiled_before() -> Iterator[None]:
    """Refuse to compile a kernel inside: loading code would break the graph being captured."""

    runtime, capturing = triton.knobs.runtime, threading.get_ident()
    with _hook_lock:
        before = runtime.jit_cache_hook

        def refuse(**asked: Any) -> bool | None:
            if threading.get_ident() != capturing:  # another thread compiles for itself
                return before(**asked) if before is not None else None
            raise RuntimeError(
                f"{asked['fn'].name} is not compiled for these dtypes and shapes, and cannot be "
                "while a CUDA graph is captured: run the same forward and backward once before"
            )

        runtime.jit_cache_hook = refuse
        try:
            yield
        finally:
            runtime.jit_cache_hook = before
