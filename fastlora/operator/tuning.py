# SPDX-License-Identifier: Apache-2.0
"""Measures problems on this machine: the kernels' configs one by one, then the implementations.

Where FASTLORA_TUNE=1 asks for it, a problem is measured when it first comes up.
"""

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

from fastlora.operator import measured, plans, steps
from fastlora.operator.measured import OPS, Problem, Timing
from fastlora.operator.operands import Operands
from fastlora.operator.timing import Step, host_counts, interleaved

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
        problem, kept = problem.bucketed(), None
        on_device = torch.cuda.device(device if device.type == "cuda" else -1)
        with torch.no_grad(), steps.exact(device), on_device:
            measure = functools.partial(_measure, problem, device, say, seconds)
            found = _attempt(measure, str(problem), say)
        if found is not None:
            kept = measured.add({problem: found}, device)
            plans.forget()
        yield problem, found, kept


def tune_on_first_use(problem: Problem, device: torch.device) -> None:
    """Measure a problem that has just come up, and say so: it looks like a hang otherwise."""

    def say(text: str) -> None:
        print(f"fastlora: {text}", file=sys.stderr, flush=True)

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    if len(plans.usable_implementations(problem.dtype, device)) == 1:
        return
    problem = problem.bucketed()
    with _lock:
        tried = (problem, device) in _tried
        _tried.add((problem, device))
        if not tried and measured.find(problem, device) is None:
            say(f"measuring {problem} on first use (FASTLORA_TUNE=1)")
            list(tune([problem], device, say))


if plans.TUNE:
    plans.on_first_use = tune_on_first_use


def _measure(
    problem: Problem, device: torch.device, say: Say, seconds: float
) -> dict[str, Timing] | None:
    case = _attempt(lambda: _Case(problem, device), str(problem), say)
    if case is None:
        return None
    configs = {op: {} if problem.others else _best_configs(op, case, say) for op in OPS}
    ways = {}
    for impl in plans.usable_implementations(problem.dtype, device):
        step = case.step(impl, configs)
        if _attempt(lambda step=step: list(step()), f"{impl}, {problem}", say) is not None:
            ways[impl] = step
    if not ways:
        return None
    medians, with_host = _medians(interleaved(ways, device, seconds)), {}
    if host_counts(problem.M, device):
        with_host = _medians(interleaved(ways, device, seconds, with_host=True))
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


class _Case:
    """Random operands of a problem, and what is timed on them."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)  # the user's own stays as it is

        def random(*shape: int, dtype: torch.dtype = problem.adapter) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        (M, N, K, R), base = problem[:4], problem.dtype
        self.problem, self.device, self.x = problem, device, random(M, K, dtype=base)
        seed = torch.ones(1, dtype=torch.int64, device=device) if problem.dropout else None
        self.projections, self.dys, self.ss, self.dss = [], [], [], []
        for n, r in ((N, R), *problem.others):
            a, b = (random(r, K), random(n, r)) if r else (None, None)
            drop = (seed, 0.5, DROPOUT_P) if r and problem.dropout else (None, 0.5, 0.0)
            self.projections.append(Operands(random(n, K, dtype=base), a, b, None, *drop))
            self.dys.append(random(M, n, dtype=base))
            self.ss.append(random(M, r) if r else None)
            self.dss.append(random(M, r) if r else None)

    def step(self, impl: str, configs: dict[str, dict]) -> Step:
        """Return the step that runs forward and backward by ``impl``, for `interleaved`."""
        module = importlib.import_module(plans.MODULES[impl])
        of = self.x, self.projections
        needs = [(p.a is not None,) * 2 for p in self.projections]
        given = [None if impl == "blocks" else configs[op] for op in OPS]

        def step() -> Iterator[None]:
            steps.forward(module, *of, given[0])
            yield
            steps.backward(module, self.dys, *of, self.ss, True, needs, given[1])
            yield

        return step

    def alone(self, name: str, config) -> Step:
        """Return the step that runs one of the kernels' five, of one projection, by ``config``."""
        from fastlora_kernels import steps as kernels

        of = self.x, self.projections
        calls = {
            "shrink": (kernels.shrink, *of),
            "outputs": (kernels.outputs, *of, self.ss, None),
            "ds_db": (kernels.ds_db, self.dys, self.projections, self.ss, [True], [True]),
            "input_grad": (kernels.input_grad, self.dys, self.projections, self.dss),
            "da": (kernels.da, *of, self.dss, [True]),
        }
        function, *arguments = calls[name]

        def step() -> Iterator[None]:
            function(*arguments, configs={name: config})
            yield

        return step


def _best_configs(op: str, case: _Case, say: Say) -> dict:
    """Return for each of the kernels' steps in ``op`` the config that measured fastest."""
    problem, device = case.problem, case.device
    if len(plans.usable_implementations(problem.dtype, device)) == 1:
        return {}
    from fastlora_kernels.configs import DROPPING, LAUNCHERS, Chip, candidates, kind_of

    if problem.N % 16 or problem.K % 16:
        return {}  # read element by element: one config is made for that
    kind, chip, best = kind_of(problem.dtype, problem.adapter), Chip.of(device), {}
    for name in LAUNCHERS[op]:
        dropout, ways = problem.dropout and name in DROPPING, {}
        for config in candidates(name, kind, problem.R, dropout, chip):
            step = case.alone(name, config)
            if _attempt(lambda step=step: list(step()), f"{name} with {config}", say) is not None:
                ways[config] = step
        if len(ways) == 1:
            best[name] = next(iter(ways))
        elif ways:
            rounds = interleaved(ways, device, CONFIG_SECONDS)
            best[name] = min(ways, key=lambda c, r=rounds: statistics.median(t for (t,) in r[c]))
    return best


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
