# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: what is usable here, and what ``impl="auto"`` takes for a problem."""

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.operator import steps
from fastlora.operator.dropout import kept_scale, lowest_kept
from fastlora.operator.operands import OPS, Each, Operands, Problem, Projections, Segments

IMPLEMENTATIONS = ("auto", "triton", "library", "blocks", "eager", "reference")
# From when Python starts: what "auto" takes, and whether problems are measured on first use.
FORCED = os.environ.get("FASTLORA_IMPL") or "auto"
TUNE = os.environ.get("FASTLORA_TUNE") == "1"

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
    """How one direction runs, why, measured medians by implementation, and the steps' configs."""

    impl: str
    why: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    configs: Mapping[str, Any] = field(default_factory=dict)


class Pair(NamedTuple):
    """What runs each direction: `steps.forward` and `steps.backward` of an implementation."""

    forward: Callable
    backward: Callable
    impls: tuple[ModuleType, ...] = ()  # of both, where rows are not cut


_found: dict[tuple, Pair] = {}


def find(impl: str, x: Tensor, projections: Sequence[Operands]) -> Pair:
    """Return what runs forward and backward on these operands, ``x`` [M, K]: one look-up."""
    m, k = x.shape
    key: list[Any] = [impl, (m - 1).bit_length() if m else 0, k, x.dtype, x.device]
    for one in projections:
        w, a, b, _, seed, *_ = one
        if a is None:
            key += one.width(), 0
        else:
            key += *b.shape, a.dtype, seed is not None
        if not isinstance(w, Tensor):
            key.append(type(w))
        elif w.dim() == 3:
            key.append(3)
    found, key = _found, tuple(key)
    pair = found.get(key)
    if pair is None:
        pair = found[key] = _pair(impl, x, projections)
    return pair


def _pair(impl: str, x: Tensor, projections: Sequence[Operands]) -> Pair:
    problem = Problem.of(x, projections)
    if problem is None:  # frozen layers alone
        chosen = [Plan(*default(x.dtype, x.device))] * len(OPS)
    else:
        if impl == "auto" and on_first_use is not None:
            on_first_use(problem, x.device)
        chosen = [choose(op, impl, problem, x.device) for op in OPS]
    others = [w for w, *_ in projections if not isinstance(w, Tensor)]
    if impl == "triton" and any(w is not None and type(w) is not slice for w in others):
        raise TypeError("impl='triton' reads dense weights, and this one is quantised")
    if any(type(one.scaling) is Segments for one in projections):
        name = impl
        if impl == "auto":  # what does not wait for the device to know how many rows there are
            kernels = x.is_cuda and len(usable_implementations(x.dtype, x.device)) > 1
            name = "library" if kernels else "blocks"
        if name == "blocks":  # whose adapters alone are no stacks of this kind
            module = importlib.import_module("fastlora.operator.grouped")
            return Pair(*(functools.partial(f, module) for f in (steps.forward, steps.backward)))
        module = importlib.import_module(MODULES["library" if None in others else name])
        directions = _stacks_forward, _stacks_backward
        return Pair(*(functools.partial(direction, module) for direction in directions))
    if any(type(w) is slice and w.start is not None for w in others):
        chosen = [replace(p, impl="blocks") for p in chosen]
    elif others:
        # One is dense at a time, for a product of the library's.
        chosen = [replace(p, impl="library") if p.impl == "triton" else p for p in chosen]
    impls = tuple([importlib.import_module(MODULES[plan.impl]) for plan in chosen])
    return Pair(*map(_running, (_forward, _backward), impls, chosen), impls)


def _running(direction: Callable, module: ModuleType, plan: Plan) -> Callable:
    run = functools.partial(direction, module, plan.configs)
    return module.replayed(run) if plan.impl == "triton" else run  # of kernels and nothing else


def _forward(impl: ModuleType, configs: Mapping, x: Tensor, projections: Projections):
    return steps.forward(impl, x, projections, _usable(configs, [x], projections))


def _backward(impl: ModuleType, configs: Mapping, dys: Each, x: Tensor, projections, *rest):
    configs = _usable(configs, [x, *dys], projections)
    return steps.backward(impl, dys, x, projections, *rest, configs)


def _stacks_forward(impl: ModuleType, x: Tensor, projections: Projections):
    projections, segments = _segmented(x, projections)
    return steps.forward(impl, x, projections, None, segments)


def _stacks_backward(impl: ModuleType, dys: Each, x: Tensor, projections: Projections, *rest):
    projections, segments = _segmented(x, projections)
    return steps.backward(impl, dys, x, projections, *rest, None, segments)


def _segmented(x: Tensor, projections: Projections) -> tuple[list[Operands], tuple]:
    """Return projections without their `Segments`, and those as the kernels take them."""
    offsets, numbers, found = None, [None] * len(projections), list(projections)
    for i, one in enumerate(projections):
        if type(one.scaling) is Segments:
            offsets, numbers[i] = _on(x.device, one.scaling)
            a, b = (t if t is None else t.contiguous() for t in (one.a, one.b))
            found[i] = one._replace(a=a, b=b, scaling=1.0)
    return found, (offsets, numbers)


def _on(device: torch.device, of: Segments) -> tuple[Tensor, Tensor]:
    ends = _offsets(device, of.ends) if type(of.ends) is tuple else of.ends
    return ends, _numbers(device, len(ends) - 1, of.scalings, of.p)


# Cached, so that no layer after the first waits for the device.
@functools.lru_cache(1024)
def _offsets(device: torch.device, ends: tuple[int, ...]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=device)


@functools.lru_cache(1024)
def _numbers(device: torch.device, G: int, *each: tuple[float, ...]) -> Tensor:
    scalings, p = (numbers if len(numbers) == G else numbers * G for numbers in each)
    drawn = [*map(kept_scale, p)], [*map(lowest_kept, p)]
    return torch.tensor((scalings, *drawn), dtype=torch.float32, device=device)


def _usable(configs: Mapping, rows: Each, projections: Projections) -> Mapping | None:
    """Return the configs if Triton can load all 16 bytes at a time, as where they were measured."""
    for t in [*rows, *(t for p in projections for t in p[:3])] if configs else ():
        if isinstance(t, Tensor):
            strides = t.stride()
            if 1 not in strides or sum(strides) % 16 != 1 or t.data_ptr() % 16:
                return None
    return configs or None


def choose(op: str, impl: str, problem: Problem, device: torch.device) -> Plan:
    """Return the plan for ``op``: the one asked for, the measured fastest, or the default."""
    usable, found = usable_implementations(problem.dtype, device), None
    if len(usable) > 1:
        from fastlora.operator import measured

        found = measured.find(problem, device)
    seconds = {i: time for i, time in found[op].items() if i in usable} if found else {}
    why, configs = f"impl={impl!r}", {}
    if impl == "auto" and FORCED != "auto":
        impl, why = FORCED, f"FASTLORA_IMPL={FORCED}"
    elif impl == "auto":
        impl, why = default(problem.dtype, device)
        if seconds:
            best, why = min(seconds, key=seconds.get), "measured on this machine"
            # Measurements scatter: a draw leaves the default.
            if seconds[best] < 0.98 * seconds.get(impl, float("inf")):
                impl = best
    if found and impl in ("triton", "library"):
        for name, listed in candidates(problem, device).items():
            fields = found["configs"].get(name)  # whatever they are, unless of a candidate
            configs.update((name, config) for config in listed if asdict(config) == fields)
    return Plan(impl, why, seconds, configs)


def candidates(problem: Problem, device: torch.device) -> dict[str, list]:
    """Return the configs that each of the kernels' steps may be measured and run with.

    None where it takes its default: for several projections, and what is read element by element.
    """
    if problem.others or problem.N % 16 or problem.K % 16:
        return {}
    from fastlora_kernels import configs

    kind, chip = configs.kind_of(problem.dtype, problem.adapter), configs.Chip.of(device)
    of = kind, problem.R, problem.dropout, chip
    return {name: configs.candidates(name, *of) for op in OPS for name in configs.LAUNCHERS[op]}


def default(dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """Return what runs where nothing was measured, and why.

    "library" for bfloat16 and float16 on a GPU: its second pass over y costs 500 / K of the
    product, so a Triton product would have to reach 89 to 98% of the library's to win.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        unusable = triton_unusable(device)
        return ("blocks", unusable) if unusable else ("library", "default, not measured")
    return "blocks", "made for CPUs" if device.type == "cpu" else "default, not measured"


def forget() -> None:
    """Have every plan chosen again, after measurements changed; also what is being chosen now."""
    global _found
    _found = {}


def is_few(elements: int, device: torch.device) -> bool:
    """Return whether "auto" takes "eager" for an x of so many elements in eager mode.

    Not under autocast: a backward in it would round float32 adapters.
    """
    few = elements <= FEW and device.type == "cpu"
    return few and FORCED == "auto" and not torch._C._is_any_autocast_enabled()


def usable_implementations(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """Return the implementations that can run on ``device``; "blocks" always can."""
    interpreter = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if dtype == torch.float64 or (device.type == "cpu" and not interpreter):
        return ("blocks",)  # without importing Triton to find out
    return ("blocks", "library", "triton") if triton_unusable(device) is None else ("blocks",)


@functools.cache
def triton_unusable(device: torch.device) -> str | None:
    """Return why the Triton implementation cannot take tensors on ``device``, or None."""
    try:
        from fastlora_kernels import INTERPRETED
    except Exception as error:  # a broken Triton may raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton is not installed; pip install 'triton>=3.4' (Linux)"
        return f"the Triton kernels cannot be imported: {type(error).__name__}: {error}"
    if device.type == ("cpu" if INTERPRETED else "cuda"):
        return None
    other = "'cuda', or on 'cpu' alone where Python has started with TRITON_INTERPRET=1"
    return f"it runs on {other}, not on {device.type!r}; impl='blocks' runs everywhere"


def named(impl: str, x: Tensor) -> str:
    """Return ``impl``, or for "auto" what FASTLORA_IMPL says, after checking that it can take x.

    Raises ValueError for an unknown name, TypeError for a dtype it does not take, RuntimeError
    where it cannot run.
    """
    source, impl = ("FASTLORA_IMPL", FORCED) if impl == "auto" else ("impl", impl)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl in ("triton", "library"):
        if x.dtype == torch.float64:
            said = f"x is float64, which {source}={impl!r} does not take; use"
            raise TypeError(f"{said} float32, bfloat16 or float16, or impl='blocks'")
        why = triton_unusable(x.device)
        if why is not None and x.device.type != "meta":
            raise RuntimeError(f"{source}={impl!r} cannot run on x.device '{x.device}': {why}")
    return impl
