# SPDX-License-Identifier: Apache-2.0
"""Measures ways to do one thing in turn; of a problem the kernels' configs, then implementations.

Where FASTLORA_TUNE=1 asks for it, a problem is measured when it first comes up.
"""

import contextlib
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any

import torch

from fastlora.operator import measured, plans, steps, weights
from fastlora.operator.operands import OPS, Operands, Problem

Step = Callable[[], Iterable[None]]
Say = Callable[[str], object]

SECONDS, CONFIG_SECONDS = 1.0, 0.2  # of a problem on first use, and for each step's configs
# Seconds that a GPU spins before a step, so that the host has issued it by then: three times what
# that took the last time, within these. A step that waits for the GPU itself never is.
LEAST_SPIN, MOST_SPIN = 1e-4, 0.05
SHORT = 0.1  # seconds of a step on a CPU that is run twice in its turn
CYCLES = 3e9  # a second, of the fastest GPU: others spin longer

_lock = threading.Lock()


def tune(
    problems: Iterable[Problem], device: torch.device, say: Say, seconds: float
) -> Iterator[tuple[Problem, measured.Row | None, Path | None]]:
    """Measure each problem for about ``seconds``, keep the result; yield it and where it is kept.

    At the upper end of its bucket, and with the host's time where that counts. What fails (a config
    that the device cannot run, an implementation without enough memory) is left out and reported to
    ``say`` once; a problem of which nothing could be measured yields None.
    """
    say = cache(say)
    for problem in problems:
        problem, found, kept = problem.bucketed(), None, None
        on_device = torch.cuda.device(device if device.type == "cuda" else -1)
        with torch.no_grad(), steps.exact(device), on_device:
            try:
                found = _measure(problem, device, say, seconds)
            except Exception as error:  # too little memory for the operands, say
                _leave_out(say, problem, error)
        if found is not None:
            kept = measured.add({problem: found}, device)
            plans.forget()
        yield problem, found, kept


def tune_four_bits(
    N: int, K: int, dtype: torch.dtype, device: torch.device, say: Say, seconds: float
) -> dict[str, float]:
    """Measure what makes an NF4 weight [N, K] dense, and keep it; return seconds by way."""
    from bitsandbytes.functional import quantize_4bit

    def step(make: Callable) -> Iterator[None]:
        make(*quantised)
        yield

    try:
        weight = torch.randn(N, K, device=device).to(dtype)
        quantised = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    except Exception as unusable:  # it may be for other devices
        _leave_out(say, "4 bits, library", unusable)
        return {}
    ways = {way: partial(step, make) for way, make in weights.FOUR_BITS.items()}
    medians = _medians("4 bits", ways, device, say, seconds)
    if found := {way: phases[0] for way, phases in medians.items()}:
        row = {"forward": found, "backward": {}, "configs": {}}
        measured.add({measured.FourBits(): row}, device)
        weights.fastest.cache_clear()
    return found


def tune_on_first_use(problem: Problem, device: torch.device) -> None:
    """Measure a problem that has just come up, unless a CUDA graph is being captured."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not capturing and len(plans.usable_implementations(problem.dtype, device)) > 1:
        with _lock:
            _tune_once(problem.bucketed(), device)


@cache
def _tune_once(problem: Problem, device: torch.device) -> None:
    def say(text: str) -> None:
        print(f"fastlora: {text}", file=sys.stderr, flush=True)

    if measured.find(problem, device) is None:
        say(f"measuring {problem} on first use (FASTLORA_TUNE=1)")  # which looks like a hang
        list(tune([problem], device, say, SECONDS))


if plans.TUNE:
    plans.on_first_use = tune_on_first_use


def _measure(problem: Problem, device: torch.device, say: Say, seconds: float):
    """Return what was measured of ``problem``, None if nothing could be."""
    x, of, dys, ss = _operands(problem, device)
    needs = [(p.a is not None,) * 2 for p in of]

    def both(impl: ModuleType, configs: dict | None) -> Iterator[None]:
        steps.forward(impl, x, of, configs)
        yield
        steps.backward(impl, dys, x, of, ss, True, needs, configs)
        yield

    def alone(name: str, configs: dict) -> Iterator[None]:  # one step of one projection
        given = {
            "shrink": (x, of),
            "outputs": (x, of, ss, None),
            "ds_db": (dys, of, ss, [True], [True]),
            "input_grad": (dys, of, ss),
            "da": (x, of, ss, [True]),
        }
        step = getattr(import_module(plans.MODULES["triton"]), name)
        step(*given[name], configs=configs)
        yield

    configs, ways = {}, {}
    for name, listed in plans.candidates(problem, device).items():
        by_config = {config: partial(alone, name, {name: config}) for config in listed}
        lasting = CONFIG_SECONDS if len(listed) > 1 else 0.0
        if found := _medians(name, by_config, device, say, lasting):
            configs[name] = min(found, key=found.get)
    for impl in plans.usable_implementations(problem.dtype, device):
        module = import_module(plans.MODULES[impl])
        ways[impl] = partial(both, module, None if impl == "blocks" else configs)
    found = _medians(problem, ways, device, say, seconds, host_counts(problem.M, device))
    row = {op: {impl: times[i] for impl, times in found.items()} for i, op in enumerate(OPS)}
    row["configs"] = {name: asdict(config) for name, config in configs.items()}
    return row if found else None


def _medians(
    what: Any, ways: dict, device: torch.device, say: Say, seconds: float, with_host: bool = False
) -> dict[Any, list[float]]:
    """Return the median of each phase by those of the ways to do ``what`` that can run."""

    def failed(way: Any, error: Exception) -> None:
        _leave_out(say, f"{what}, {way}", error)

    rounds = interleaved(ways, device, seconds, with_host=with_host, failed=failed)
    return {way: list(map(median, zip(*each, strict=True))) for way, each in rounds.items()}


def _leave_out(say: Say, what: Any, error: Exception) -> None:
    first_line = str(error).strip().partition("\n")[0]
    say(f"left out {what}: {type(error).__name__}: {first_line}")
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a device that is lost for good
            torch.cuda.empty_cache()


def _operands(problem: Problem, device: torch.device):
    """Return random x and projections, and dy and s (or ds) of each."""
    generator = torch.Generator(device).manual_seed(0)  # the user's own stays as it is

    def random(*shape: int, dtype: torch.dtype = problem.adapter) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    M, N, K, R, base, _, dropout, others = problem
    x, of, dys, ss = random(M, K, dtype=base), [], [], []
    seed = torch.ones(1, dtype=torch.int64, device=device)
    for n, r in ((N, R), *others):
        a, b = (random(r, K), random(n, r)) if r else (None, None)
        drop = (seed, 0.5, 0.1) if r and dropout else (None, 0.5, 0.0)
        of.append(Operands(random(n, K, dtype=base), a, b, None, *drop))
        dys.append(random(M, n, dtype=base))
        ss.append(random(M, r) if r else None)
    return x, of, dys, ss


def host_counts(tokens: int, device: torch.device) -> bool:
    """Return whether a step may take as long as the host needs to issue it."""
    return device.type == "cuda" and tokens <= 512


def interleaved(
    steps: dict[Any, Step],
    device: torch.device,
    seconds: float,
    least: int = 5,
    *,
    with_host: bool = False,
    failed: Callable[[Any, Exception], None] | None = None,
) -> dict[Any, list[tuple[float, ...]]]:
    """Return for each way its rounds, each the seconds of every phase of the step.

    A step is called and iterated: what it does between two ``yield`` is one phase, so that
    ``forward(); yield; backward(); yield`` times both. Once everything is compiled all take turns,
    in an order of chance, for about ``seconds`` but at least ``least`` rounds: what disturbs the
    machine, or is left in caches and to the allocator, disturbs all of them.

    On a CPU a short step is run twice in its turn and timed the second time: in a model a layer
    follows others of its kind, whose code is in the caches. On a GPU a phase is timed by events,
    and the queue is full before the first of them: a kernel spins until the host has issued the
    whole step. ``with_host`` starts each step on an idle GPU instead; the figures then hold the
    time that the host takes to issue what runs at once.

    A way that raises is given to ``failed``, by name and with its exception, and has no rounds;
    without ``failed`` the exception is the caller's.
    """
    rounds, took = {name: [] for name in steps}, dict.fromkeys(steps, 0.0)
    on_gpu, until, chance = device.type == "cuda", 0.0, random.Random(0)
    for count in itertools.count(-1 if on_gpu else 0):  # from 1 on they are timed
        if count == 1:
            until = perf_counter() + seconds
        for name in chance.sample(list(rounds), len(rounds)):
            try:
                spin = min(max(LEAST_SPIN, 3 * took[name]), MOST_SPIN)
                if not on_gpu and took[name] < SHORT:
                    list(steps[name]())
                spins = on_gpu and count > 0 and not with_host
                phases, took[name] = _phases(steps[name], device, spin if spins else 0.0)
            except Exception as error:
                if failed is None:
                    raise
                del rounds[name]
                failed(name, error)
                continue
            if count > 0:
                rounds[name].append(phases)
        if not rounds or (count >= least and perf_counter() > until):
            return rounds


def _phases(step: Step, device: torch.device, spin: float) -> tuple[tuple[float, ...], float]:
    """Return the seconds of each phase, and those in which the host has issued all of them."""
    if spin:
        torch.cuda._sleep(int(spin * CYCLES))
    mark, start = _event if device.type == "cuda" else perf_counter, perf_counter()
    marks = [mark(), *(mark() for _ in step())]
    issued = perf_counter() - start
    if mark is perf_counter:
        return tuple(b - a for a, b in itertools.pairwise(marks)), issued
    torch.cuda.synchronize(device)
    return tuple(a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)), issued


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
