# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: what is usable here, and what ``impl="auto"`` takes for a problem."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.operator.operands import Operands

IMPLEMENTATIONS = ("auto", "triton", "library", "blocks", "eager", "reference")
# What "auto" takes, from the environment when Python starts: one of the above.
FORCED = os.environ.get("FASTLORA_IMPL") or "auto"
# Whether a problem that nothing was measured for is measured when it first comes up.
TUNE = os.environ.get("FASTLORA_TUNE", "0") == "1"

# Elements of x up to which "eager" runs on a CPU: the time that Python takes for an operator of its
# own counts there, the memory that PyTorch's gradients keep hardly does (`kernels/CPU.md`).
FEW = 1 << 17
# The same where they keep no more, without dropout and with adapters in the dtype of x, and nothing
# is shared with other projections of x.
STILL_FEW = 1 << 20

MODULES = {
    "triton": "fastlora_kernels",
    "library": "fastlora.operator.library",
    "blocks": "fastlora.operator.blocks",
}


class Problem(NamedTuple):
    """What a plan is chosen for: M tokens, N outputs, K inputs, rank R, dtypes, dropout.

    ``others``: N and R of further projections of the same x, R 0 without an adapter. A bias costs
    every implementation the same and is no part of it.
    """

    M: int
    N: int
    K: int
    R: int = 16
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.bfloat16
    dropout: bool = False
    others: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(x: Tensor, projections: Sequence[Operands]) -> Problem | None:
        """Return the problem that projections of x [M, K] pose; None if none has an adapter."""
        adapted = [p for p in projections if p.a is not None]
        if not adapted:
            return None
        sizes = [(p.w.shape[0], 0 if p.a is None else p.a.shape[0]) for p in projections]
        dropout = any(p.seed is not None for p in adapted)
        return Problem.together(*x.shape, sizes, x.dtype, adapted[0].a.dtype, dropout)

    @staticmethod
    def together(
        M: int,
        K: int,
        sizes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        adapter: torch.dtype,
        dropout: bool,
    ) -> Problem:
        """Return the problem of projections of N and R each, in whatever order they come."""
        (n, r), *others = sorted(sizes, key=lambda size: (size[1] == 0, -size[0], -size[1]))
        return Problem(M, n, K, r, dtype, adapter, dropout, tuple(others))

    def alone(self) -> list[Problem]:
        """Return the problem of each projection with an adapter as if it were alone."""
        rest = [self._replace(N=n, R=r, others=()) for n, r in self.others if r]
        return [self._replace(others=()), *rest]

    def bucketed(self) -> Problem:
        """Return the problem with M and R rounded up to powers of two, R to 16 at least."""
        others = tuple((n, _bucket(r)) for n, r in self.others)
        return self._replace(M=_power(self.M), R=_bucket(self.R), others=others)

    def __str__(self) -> str:
        if self.others:
            sizes = ", ".join(f"{n} (r = {r})" if r else f"{n} (frozen)" for n, r in self.others)
            return f"{self._replace(others=())}, and of the same x: {sizes}"
        names = [str(d).removeprefix("torch.") for d in (self.dtype, self.adapter)]
        adapters = f", {names[1]} adapters" if names[0] != names[1] else ""
        dropout = ", dropout" * self.dropout
        return f"{self.M} x {self.N} x {self.K}, r = {self.R}, {names[0]}{adapters}{dropout}"


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _bucket(r: int) -> int:
    return max(16, _power(r)) if r else 0


@dataclass(frozen=True)
class Plan:
    """How one direction of a problem runs, why, and what was measured.

    ``seconds`` holds measured medians by implementation, ``configs`` what the launchers run with,
    ``with_host`` medians for few tokens that hold the host's time: they choose where there are any.
    """

    impl: str
    why: str
    seconds: Mapping[str, float]
    configs: Mapping[str, Any]
    with_host: Mapping[str, float] = field(default_factory=dict)


_functions: dict[tuple, Callable[..., Any]] = {}


def function(
    op: str,
    impl: str,
    x: Tensor,
    projections: Sequence[Operands],
    dys: Sequence[Tensor | None] = (),
) -> Callable[..., Any]:
    """Return what runs ``op`` ("forward" or "backward") on these operands: one look-up.

    ``x`` [M, K], ``dys`` [M, N] in backward; ``impl`` names an implementation or is "auto". The
    kernels' configs are chosen with it, where the operands can be read 16 bytes at a time; others
    make the launchers ask for each.
    """
    wide = _wide(x)
    sizes: list[Any] = []
    for w, a, _, _, seed, _, _ in projections:
        if a is None:
            sizes += w.shape[0], 0
        else:
            sizes += w.shape[0], a.shape[0], a.dtype, seed is not None
            wide = wide and _wide(a)
        wide = wide and _wide(w)
    for dy in dys:
        wide = wide and (dy is None or _wide(dy))
    m, k = x.shape
    key = (op, impl, max(m - 1, 0).bit_length(), k, x.dtype, wide, x.device, *sizes)
    functions = _functions
    found = functions.get(key)
    if found is None:
        found = functions[key] = _function(op, impl, x, projections, wide)
    return found


def _function(
    op: str, impl: str, x: Tensor, projections: Sequence[Operands], wide: bool
) -> Callable[..., Any]:
    problem = Problem.of(x, projections)
    if problem is None:  # frozen layers alone
        module = MODULES[default(x.dtype, x.device)[0]]
        return getattr(importlib.import_module(module), f"{op}_all")
    if TUNE and impl == "auto":
        _tune_on_first_use(problem, x.device)
    plan = choose(op, impl, problem, x.device)
    found = getattr(importlib.import_module(MODULES[plan.impl]), f"{op}_all")
    if wide and plan.configs and plan.impl != "blocks":
        found = functools.partial(found, configs=[plan.configs] * len(projections))
    return found


def choose(op: str, impl: str, problem: Problem, device: torch.device) -> Plan:
    """Return the plan for ``op``: the one asked for, the measured fastest, or the default."""
    usable = usable_implementations(problem.dtype, device)
    seconds, configs, with_host = {}, {}, {}
    if len(usable) > 1:
        # As the look-up has it: not the number of tokens that happens to come first.
        problem = problem._replace(M=problem.bucketed().M)
        from fastlora.operator import measured

        timing = (measured.find(problem, device) or {}).get(op, measured.Timing({}))
        seconds, with_host = timing.seconds, timing.with_host
        # The launchers of several projections take their defaults.
        configs = {} if problem.others else _configs(op, timing.configs, problem, device)
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
    return Plan(impl, why, seconds, configs, with_host)


def is_few(M: int, K: int, device: torch.device, keeps_more: bool = True) -> bool:
    """Return whether "auto" takes "eager" for x [M, K] in eager mode.

    ``keeps_more``: it would keep more for backward than "blocks", or share less. Not under
    autocast: a backward in it would round float32 adapters.
    """
    elements, limit = M * K, FEW if keeps_more else STILL_FEW
    return (
        device.type == "cpu"
        and elements <= limit
        and FORCED == "auto"
        and not torch._C._is_any_autocast_enabled()
    )


def _tune_on_first_use(problem: Problem, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    if len(usable_implementations(problem.dtype, device)) > 1:
        from fastlora.operator import tuning

        tuning.tune_on_first_use(problem, device)


def _wide(t: Tensor) -> bool:
    """Return whether Triton can load ``t`` 16 bytes at a time: strides 1 and a multiple of 16."""
    strides = t.stride()
    return 1 in strides and sum(strides) % 16 == 1 and t.data_ptr() % 16 == 0


def _configs(
    op: str, fields: Mapping[str, dict], problem: Problem, device: torch.device
) -> dict[str, Any]:
    """Return each launcher's config: the measured one where it can run here, or its default."""
    from fastlora_kernels.configs import (
        DROPPING,
        KERNEL_OF,
        LAUNCHERS,
        Config,
        default_config,
        is_valid,
        kind_of,
    )
    from fastlora_kernels.launch import chip_of

    kind, chip, found = kind_of(problem.dtype, problem.adapter), chip_of(device), {}
    for name in LAUNCHERS[op]:
        rest = KERNEL_OF[name], kind, problem.R, problem.dropout and name in DROPPING, chip
        config = Config(**fields[name]) if name in fields else None
        valid = config is not None and is_valid(config, *rest)
        found[name] = config if valid else default_config(*rest)
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
    global _functions
    _functions = {}


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


@functools.cache
def _interpreted() -> bool:
    import fastlora_kernels

    return fastlora_kernels.INTERPRETED


def triton_unusable(device: torch.device) -> str | None:
    """Return why the Triton implementation cannot take tensors on ``device``, or None."""
    missing = triton_missing()
    if missing is not None:
        return missing
    if device.type == "cuda" and not _interpreted():
        return None
    if device.type == "cpu" and _interpreted():
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
