# SPDX-License-Identifier: Apache-2.0
"""Measures problems on this machine: the kernels' configs one by one, then the implementations.

Where FASTLORA_TUNE=1 asks for it, a problem is measured when it first comes up.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

from fastlora.operator import measured, plans, steps
from fastlora.operator.operands import OPS, Operands, Problem
from fastlora.operator.timing import Step, host_counts, interleaved

DROPOUT_P = 0.1
SECONDS, CONFIG_SECONDS = 1.0, 0.2  # of a problem on first use, and for each step's configs

Say = Callable[[str], object]
_lock = threading.Lock()


def tune(
    problems: Iterable[Problem], device: torch.device, say: Say, seconds: float
) -> Iterator[tuple[Problem, measured.Row | None, Path | None]]:
    """Measure each problem for about ``seconds``, keep the result; yield it and where it is kept.

    A problem is measured at the upper end of its bucket, where `timing.host_counts` with the host's
    time. What fails (a config that the device cannot run, an implementation without enough memory)
    is left out and reported to ``say`` once; a problem of which nothing could be measured yields
    None.
    """
    say = cache(say)
    for problem in problems:
        problem, found, kept = problem.bucketed(), None, None
        on_device = torch.cuda.device(device if device.type == "cuda" else -1)
        with torch.no_grad(), steps.exact(device), on_device:
            try:
                found = _measure(problem, device, say, seconds)
            except Exception as error:  # too little memory for the operands, say
                _leave_out(problem, error, say)
        if found is not None:
            kept = measured.add({problem: found}, device)
            plans.forget()
        yield problem, found, kept


def tune_on_first_use(problem: Problem, device: torch.device) -> None:
    """Measure a problem that has just come up, unless a CUDA graph is being captured."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not capturing and len(plans.usable_implementations(problem.dtype, device)) > 1:
        with _lock:
            _tune_once(problem.bucketed(), device)


@cache
def _tune_once(problem: Problem, device: torch.device) -> None:
    if measured.find(problem, device) is None:
        # It looks like a hang otherwise.
        _print(f"measuring {problem} on first use (FASTLORA_TUNE=1)")
        list(tune([problem], device, _print, SECONDS))


def _print(text: str) -> None:
    print(f"fastlora: {text}", file=sys.stderr, flush=True)


if plans.TUNE:
    plans.on_first_use = tune_on_first_use


def _measure(
    problem: Problem, device: torch.device, say: Say, seconds: float
) -> measured.Row | None:
    case, configs, ways = _Case(problem, device), {}, {}
    for name, listed in plans.candidates(problem, device).items():
        steps_by = {config: partial(case.alone, name, config) for config in listed}
        lasting = CONFIG_SECONDS if len(listed) > 1 else 0.0
        if found := _medians(name, steps_by, device, say, lasting):
            configs[name] = min(found, key=found.get)
    for impl in plans.usable_implementations(problem.dtype, device):
        module = import_module(plans.MODULES[impl])
        ways[impl] = partial(case.both, module, None if impl == "blocks" else configs)
    with_host = host_counts(problem.M, device)
    found = _medians(problem, ways, device, say, seconds, with_host=with_host)
    row = {op: {impl: times[i] for impl, times in found.items()} for i, op in enumerate(OPS)}
    fields = {name: asdict(config) for name, config in configs.items()}
    return row | {"configs": fields} if found else None


def _medians(
    what: Any, ways: dict[Any, Step], device: torch.device, say: Say, seconds: float, **options
) -> dict[Any, list[float]]:
    """Return the median of each phase by those of the ways to do ``what`` that can run."""

    def failed(way: Any, error: Exception) -> None:
        _leave_out(f"{what}, {way}", error, say)

    rounds = interleaved(ways, device, seconds, failed=failed, **options)
    return {way: list(map(median, zip(*each, strict=True))) for way, each in rounds.items()}


def _leave_out(what: Any, error: Exception, say: Say) -> None:
    say(f"left out {what}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a device that is lost for good
            torch.cuda.empty_cache()


class _Case:
    """Random operands of a problem, and what is timed on them."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)  # the user's own stays as it is

        def random(*shape: int, dtype: torch.dtype = problem.adapter) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        M, N, K, R, base, _, dropout, others = problem
        seed = torch.ones(1, dtype=torch.int64, device=device)
        self.x, self.projections, self.dys, self.ss = random(M, K, dtype=base), [], [], []
        for n, r in ((N, R), *others):
            a, b = (random(r, K), random(n, r)) if r else (None, None)
            drop = (seed, 0.5, DROPOUT_P) if r and dropout else (None, 0.5, 0.0)
            self.projections.append(Operands(random(n, K, dtype=base), a, b, None, *drop))
            self.dys.append(random(M, n, dtype=base))
            self.ss.append(random(M, r) if r else None)

    def both(self, impl: ModuleType, configs: dict | None) -> Iterator[None]:
        """Run forward and backward, a phase each, by the steps of ``impl``."""
        of, needs = (self.x, self.projections), [(p.a is not None,) * 2 for p in self.projections]
        steps.forward(impl, *of, configs)
        yield
        steps.backward(impl, self.dys, *of, self.ss, True, needs, configs)
        yield

    def alone(self, name: str, config: Any) -> Iterator[None]:
        """Run one of the kernels' five steps, of one projection, by ``config``."""
        of = self.x, self.projections
        arguments = {
            "shrink": of,
            "outputs": (*of, self.ss, None),
            "ds_db": (self.dys, self.projections, self.ss, [True], [True]),
            "input_grad": (self.dys, self.projections, self.ss),
            "da": (*of, self.ss, [True]),
        }
        step = getattr(import_module(plans.MODULES["triton"]), name)
        step(*arguments[name], configs={name: config})
        yield
