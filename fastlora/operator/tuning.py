# SPDX-License-Identifier: Apache-2.0
"""Measures problems on this machine: the kernels' configs one by one, then the implementations."""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from fastlora.operator import measured, plans
from fastlora.operator.measured import OPS, Timing
from fastlora.operator.op import exact
from fastlora.operator.operands import Operands
from fastlora.operator.plans import Problem
from fastlora.operator.timing import host_counts, interleaved

DROPOUT_P = 0.1
CONFIG_SECONDS = 0.2
SECONDS = 1.0

Say = Callable[[str], None]
_said: set[str] = set()
_tried: set[tuple[Problem, torch.device]] = set()
_lock = threading.Lock()


def tune(
    problems: Iterable[Problem], device: torch.device, say: Say, seconds: float = SECONDS
) -> Iterator[tuple[Problem, dict[str, Timing] | None, Path | None]]:
    """Measure each problem for about ``seconds``, keep the result; yield it and where it is kept.

    A problem is measured at the upper end of its bucket. What fails (a config that the device
    cannot run, an implementation without enough memory) is left out and reported to ``say`` once;
    a problem of which nothing could be measured yields None.
    """
    for problem in problems:
        problem = problem.bucketed()
        on_device = torch.cuda.device(device if device.type == "cuda" else -1)
        with torch.no_grad(), exact(device), on_device:
            measure = functools.partial(_measure, problem, device, say, seconds)
            found = _attempt(measure, str(problem), say)
        kept = measured.add({problem: found}, device) if found is not None else None
        yield problem, found, kept


def tune_on_first_use(problem: Problem, device: torch.device) -> None:
    """Measure a problem that has just come up, and say so: it looks like a hang otherwise."""

    def say(text: str) -> None:
        print(f"fastlora: {text}", file=sys.stderr, flush=True)

    with _lock:
        tried = (problem.bucketed(), device) in _tried
        _tried.add((problem.bucketed(), device))
        if not tried and measured.find(problem, device) is None:
            say(f"measuring {problem.bucketed()} on first use (FASTLORA_TUNE=1)")
            list(tune([problem], device, say))


def _measure(
    problem: Problem, device: torch.device, say: Say, seconds: float
) -> dict[str, Timing] | None:
    operands = _attempt(lambda: _Operands(problem, device), str(problem), say)
    if operands is None:
        return None
    configs = {op: {} if problem.others else _best_configs(op, operands, say) for op in OPS}
    steps = {}
    for impl in plans.usable_implementations(problem.dtype, device):
        step = operands.step(impl, configs)
        if _attempt(lambda step=step: list(step()), f"{impl}, {problem}", say) is not None:
            steps[impl] = step
    if not steps:
        return None
    medians, with_host = _medians(interleaved(steps, device, seconds)), {}
    if host_counts(problem.M, device):
        with_host = _medians(interleaved(steps, device, seconds, with_host=True))
    return {
        op: Timing(
            {impl: times[i] for impl, times in medians.items()},
            {name: asdict(config) for name, config in configs[op].items()},
            {impl: times[i] for impl, times in with_host.items()},
        )
        for i, op in enumerate(OPS)
    }


def _medians(rounds: dict[str, list[tuple[float, ...]]]) -> dict[str, list[float]]:
    """Return the median of each phase by implementation."""
    return {
        impl: [statistics.median(times) for times in zip(*found, strict=True)]
        for impl, found in rounds.items()
    }


class _Operands:
    """Random operands of a problem, and what is timed on them."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)  # the user's own stays as it is

        def random(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        (M, N, K, R), adapter = problem[:4], problem.adapter
        self.problem, self.device = problem, device
        self.x, self.w, self.dy = random(M, K), random(N, K), random(M, N)
        self.a, self.b = random(R, K, dtype=adapter), random(N, R, dtype=adapter)
        self.s, self.ds = random(M, R, dtype=adapter), random(M, R, dtype=adapter)
        self.p = DROPOUT_P if problem.dropout else 0.0
        self.seed = torch.ones(1, dtype=torch.int64, device=device) if problem.dropout else None
        first = Operands(self.w, self.a, self.b, None, self.seed, 0.5, self.p)
        self.projections, self.dys, self.ss = [first], [self.dy], [self.s]
        for n, r in problem.others:
            a = random(r, K, dtype=adapter) if r else None
            b = random(n, r, dtype=adapter) if r else None
            drop = (self.seed, 0.5, self.p) if r else (None, 0.5, 0.0)
            self.projections.append(Operands(random(n, K), a, b, None, *drop))
            self.dys.append(random(M, n))
            self.ss.append(random(M, r, dtype=adapter) if r else None)

    def step(self, impl: str, configs: dict[str, dict]) -> Callable[[], Iterator[None]]:
        """Return the step that runs forward and backward by ``impl``, for `interleaved`."""
        module = importlib.import_module(plans.MODULES[impl])
        of = self.x, self.projections
        needs = [(p.a is not None,) * 2 for p in self.projections]
        with_configs = {
            op: {} if impl == "blocks" else {"configs": [configs[op]] * len(needs)} for op in OPS
        }

        def step() -> Iterator[None]:
            module.forward_all(*of, **with_configs["forward"])
            yield
            module.backward_all(self.dys, *of, self.ss, True, needs, **with_configs["backward"])
            yield

        return step

    def launchers(self, op: str, best: dict) -> dict[str, Callable]:
        """Return by name what runs a launcher of ``op`` with the config it is given.

        The products, which come last, run with the whole direction and the ``best`` configs so
        far: some start while the kernel before them runs, or do its work.
        """
        import fastlora_kernels as kernels

        dropped, rest = {"seed": self.seed, "dropout_p": self.p}, (self.seed, 0.5, self.p)
        if op == "forward":
            return {
                "shrink": lambda config: kernels.shrink(self.x, self.a, **dropped, config=config),
                "product": lambda config: kernels.forward(
                    *(self.x, self.w, self.a, self.b, None, *rest), {**best, "product": config}
                ),
            }
        return {
            "ds_db": lambda config: kernels.ds_db(self.dy, self.s, self.b, config=config),
            "da": lambda config: kernels.da(self.x, self.ds, **dropped, config=config),
            "dx": lambda config: kernels.backward(
                *(self.dy, self.x, self.w, self.a, self.b, self.s, *rest, (True, True, True)),
                {**best, "dx": config},
            ),
        }


def _best_configs(op: str, operands: _Operands, say: Say) -> dict:
    """Return for each launcher of ``op`` the config that measured fastest."""
    from fastlora_kernels.configs import DROPPING, KERNEL_OF, Chip, candidates, kind_of

    problem, device = operands.problem, operands.device
    if problem.N % 16 or problem.K % 16:
        return {}  # read element by element: one config is made for that
    kind, chip = kind_of(problem.dtype, problem.adapter), Chip.of(device)
    best = {}
    for name, launcher in operands.launchers(op, best).items():
        dropout = problem.dropout and name in DROPPING
        steps = {}
        for config in candidates(KERNEL_OF[name], kind, problem.R, dropout, chip):
            step = _once(launcher, config)
            if _attempt(lambda step=step: list(step()), f"{name} with {config}", say) is not None:
                steps[config] = step
        if len(steps) == 1:
            best[name] = next(iter(steps))
        elif steps:
            rounds = interleaved(steps, device, CONFIG_SECONDS)
            best[name] = min(steps, key=lambda c, r=rounds: statistics.median(t for (t,) in r[c]))
    return best


def _once(launcher: Callable, config) -> Callable[[], Iterator[None]]:
    def step() -> Iterator[None]:
        launcher(config)
        yield

    return step


def _attempt(call: Callable, what: str, say: Say):
    """Return what ``call`` returns; None, and a word about it the first time, where it fails."""
    try:
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result
    except Exception as error:  # whatever a compiler, a driver or an allocator may raise
        reason = "not enough memory" if isinstance(error, torch.OutOfMemoryError) else error
        text = (
            f"left out {what}: {str(reason).strip().partition(chr(10))[0] or type(error).__name__}"
        )
        if text not in _said:
            _said.add(text)
            say(text)
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # a device that is lost for good
                torch.cuda.empty_cache()
        return None
