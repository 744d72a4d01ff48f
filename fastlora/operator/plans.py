# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: what is usable here, and what ``impl="auto"`` takes for a problem."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.operator.operands import OPS, Operands, Problem

IMPLEMENTATIONS = ("auto", "triton", "library", "blocks", "eager", "reference")
# What "auto" takes, from the environment when Python starts: one of the above.
FORCED = os.environ.get("FASTLORA_IMPL") or "auto"
# Whether a problem that nothing was measured for is measured when it first comes up.
TUNE = os.environ.get("FASTLORA_TUNE", "0") == "1"

# Elements of x up to which "eager" runs on a CPU: the time that Python takes for an operator of its
# own counts there, the memory that PyTorch's gradients keep hardly does (`kernels/CPU.md`).
FEW = 1 << 17

MODULES = {
    "triton": "fastlora_kernels.steps",
    "library": "fastlora.operator.library",
    "blocks": "fastlora.operator.blocks",
}
# Called with a problem that "auto" meets for the first time, and its device.
on_first_use: Callable[[Problem, torch.device], None] | None = None


@dataclass(frozen=True)
class Plan:
    """How one direction of a problem runs, why, and what was measured.

    ``seconds`` holds measured medians by implementation, ``configs`` what the kernels' steps run
    with; ``with_host`` medians for few tokens that hold the host's time: they choose where there
    are any.
    """

    impl: str
    why: str
    seconds: Mapping[str, float]
    configs: Mapping[str, Any]
    with_host: Mapping[str, float]


class Steps(NamedTuple):
    """What runs one direction: the module of the five steps, and the configs that they are given.

    ``configs`` is None where the steps take their defaults.
    """

    module: ModuleType
    configs: Mapping[str, Any] | None


class Pair(NamedTuple):
    """What runs both directions."""

    forward: Steps
    backward: Steps


_found: dict[tuple, Pair] = {}


def find(impl: str, x: Tensor, projections: Sequence[Operands]) -> Pair:
    """Return what runs forward and backward on these operands, ``x`` [M, K]: one look-up."""
    m, k = x.shape
    key: list[Any] = [impl, (m - 1).bit_length() if m else 0, k, x.dtype, x.device]
    for w, a, _, _, seed, _, _ in projections:
        if a is None:
            key += w.shape[0], 0
        else:
            key += w.shape[0], a.shape[0], a.dtype, seed is not None
    found, key = _found, tuple(key)
    steps = found.get(key)
    if steps is None:
        steps = found[key] = _steps(impl, x, projections)
    return steps


def _steps(impl: str, x: Tensor, projections: Sequence[Operands]) -> Pair:
    problem = Problem.of(x, projections)
    if problem is None:  # frozen layers alone
        frozen = Steps(importlib.import_module(MODULES[default(x.dtype, x.device)[0]]), None)
        return Pair(frozen, frozen)
    if impl == "auto" and on_first_use is not None:
        on_first_use(problem, x.device)
    chosen = [choose(op, impl, problem, x.device) for op in OPS]
    return Pair(
        *(Steps(importlib.import_module(MODULES[p.impl]), p.configs or None) for p in chosen)
    )


def choose(op: str, impl: str, problem: Problem, device: torch.device) -> Plan:
    """Return the plan for ``op``: the one asked for, the measured fastest, or the default."""
    usable = usable_implementations(problem.dtype, device)
    seconds, configs, with_host = {}, {}, {}
    if len(usable) > 1:
        from fastlora.operator import measured

        if (found := measured.find(problem, device)) is not None:
            timing = found[op]
            seconds, configs, with_host = timing.seconds, timing.configs, timing.with_host
    why = f"impl={impl!r}"
    if impl == "auto" and FORCED != "auto":
        impl, why = FORCED, f"FASTLORA_IMPL={FORCED}"
    if impl == "auto":
        impl, why = default(problem.dtype, device)
        times = with_host or seconds
        best = min((i for i in usable if i in times), key=times.get, default=None)
        if best is not None:
            why = "measured on this machine"
            # Measurements scatter: a draw leaves the default.
            if times[best] < 0.98 * times.get(impl, float("inf")):
                impl = best
    configs = _configs(op, configs, problem, device) if impl in ("triton", "library") else {}
    return Plan(impl, why, seconds, configs, with_host)


def is_few(elements: int, device: torch.device) -> bool:
    """Return whether "auto" takes "eager" for an x of so many elements in eager mode.

    Not under autocast: a backward in it would round float32 adapters.
    """
    return (
        elements <= FEW
        and device.type == "cpu"
        and FORCED == "auto"
        and not torch._C._is_any_autocast_enabled()
    )


def aligned(*tensors: Tensor | None) -> bool:
    """Return whether Triton can load each 16 bytes at a time, as where configs were measured."""
    for t in tensors:
        if t is not None:
            strides = t.stride()
            if 1 not in strides or sum(strides) % 16 != 1 or t.data_ptr() % 16:
                return False
    return True


def _configs(
    op: str, fields: Mapping[str, dict], problem: Problem, device: torch.device
) -> dict[str, Any]:
    """Return the measured config of each step that has one which can run here."""
    if not fields or problem.others:  # of several projections the steps take their defaults
        return {}
    from fastlora_kernels.configs import DROPPING, LAUNCHERS, Chip, Config, is_valid, kind_of

    kind, chip, found = kind_of(problem.dtype, problem.adapter), Chip.of(device), {}
    for name in set(fields) & set(LAUNCHERS[op]):
        try:
            config = Config(**fields[name])
            dropout = problem.dropout and name in DROPPING
            if is_valid(config, name, kind, problem.R, dropout, chip):
                found[name] = config
        except (TypeError, ValueError):  # fields of another version's, or of another type
            continue
    return found


def indexed(device: torch.device) -> torch.device:
    """Return ``device`` with the number that the tensors on it have."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def forget() -> None:
    """Have every plan chosen again, after measurements changed.

    One that a thread is choosing meanwhile goes into what is forgotten.
    """
    global _found
    _found = {}


def default(dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """Return what runs where nothing was measured, and why.

    "library" for bfloat16 and float16 on a GPU: its second pass over y costs 500 / K of the
    product, so a Triton product would have to reach 89 to 98% of the library's to win.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        why = triton_unusable(device)
        if why is None:
            return "library", "default, not measured"
        return "blocks", why
    return "blocks", "made for CPUs" if device.type == "cpu" else "default, not measured"


def usable_implementations(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """Return the implementations that can run on ``device``; "blocks" always can."""
    if device.type == "cpu" and not _interpreter_wanted():
        return ("blocks",)  # without importing Triton to find out
    if dtype == torch.float64 or triton_unusable(device) is not None:
        return ("blocks",)
    return ("blocks", "library", "triton")


@functools.cache
def triton_missing() -> str | None:
    """Return why the Triton kernels cannot be imported here, or None when they can."""
    try:
        import fastlora_kernels  # noqa: F401
    except Exception as error:  # a broken Triton may raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton is not installed; pip install 'triton>=3.4' (Linux)"
        return f"the Triton kernels cannot be imported: {type(error).__name__}: {error}"
    return None


def _interpreter_wanted() -> bool:
    """Return whether the environment asks for it, in the words that Triton takes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def triton_unusable(device: torch.device) -> str | None:
    """Return why the Triton implementation cannot take tensors on ``device``, or None."""
    missing = triton_missing()
    if missing is not None:
        return missing
    import fastlora_kernels

    if device.type == ("cpu" if fastlora_kernels.INTERPRETED else "cuda"):
        return None
    if device.type == "cpu":
        late = _interpreter_wanted()
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 " + (
            "before Python starts (it is set now, but the kernels were imported without it)"
            if late
            else "in the environment before Python starts, or use impl='blocks'"
        )
    return f"it runs on 'cuda' devices (and 'cpu' under TRITON_INTERPRET=1), not on '{device.type}'"


def named(impl: str, x: Tensor) -> str:
    """Return ``impl``, or for "auto" what FASTLORA_IMPL says, after checking that it can take x.

    Raises ValueError for an unknown name, TypeError for a dtype it does not take, RuntimeError
    where it cannot run.
    """
    source = "impl"
    if impl == "auto":
        impl, source = FORCED, "FASTLORA_IMPL"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl in ("triton", "library"):
        if x.dtype == torch.float64:
            raise TypeError(
                f"x is float64, which {source}={impl!r} does not take; use float32, bfloat16 or "
                "float16, or impl='blocks'"
            )
        why = triton_unusable(x.device)
        if why is not None and x.device.type != "meta":
            raise RuntimeError(f"{source}={impl!r} cannot run on x.device '{x.device}': {why}")
    return impl
