# SPDX-License-Identifier: Apache-2.0
"""Fair timing of several ways to do one thing: in turn, in one process, on one device."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Step = Callable[[], Iterable[None]]
# Seconds that a GPU spins before a step, so that the host has issued it by then: doubled until that
# is so, at most the last. A step that waits for the GPU itself never is.
SPIN, MOST_SPIN = 1e-4, 0.05
_CALIBRATION = 10_000_000  # cycles
# Tokens up to which a GPU may wait for the host, so that times with it count as well.
FEW_TOKENS = 512


def host_counts(tokens: int, device: torch.device) -> bool:
    """Return whether a step may take as long as the host needs to issue it."""
    return device.type == "cuda" and tokens <= FEW_TOKENS


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
    ``forward(); yield; backward(); yield`` times both. Every way runs once before anything is
    timed. Then they take turns, so that whatever disturbs the machine disturbs all of them, for
    about ``seconds`` in all but at least ``least`` rounds. Each round begins with another way: what
    one leaves in caches and in the allocator is then not always the same one's.

    On a GPU a phase is timed by events, and the queue is full before the first of them: a kernel
    spins until the host has issued the whole step. ``with_host`` starts each step on an idle GPU
    instead; the figures then hold the time that the host takes to issue what runs at once.

    A way that raises is given to ``failed``, by name and with its exception, and has no rounds;
    without ``failed`` the exception is the caller's.
    """
    rounds: dict[Any, list[tuple[float, ...]]] = {name: [] for name in steps}
    spins: dict[Any, float] = dict.fromkeys(steps, 0.0)

    def run(name: Any, measure: Callable[[Any], Any]) -> None:
        try:
            measure(name)
        except Exception as error:
            if failed is None:
                raise
            del rounds[name]
            failed(name, error)

    def settle(name: Any) -> None:
        _phases(steps[name], device, 0.0)
        if device.type == "cuda" and not with_host:
            spins[name] = _spin_for(steps[name], device)

    def timed(name: Any) -> None:
        rounds[name].append(_phases(steps[name], device, spins[name])[0])

    for name in steps:
        run(name, settle)
    start = time.perf_counter()
    for count in itertools.count(1):
        if not rounds:
            return rounds
        names = list(rounds)
        first = count % len(names)
        for name in (*names[first:], *names[:first]):
            run(name, timed)
        if count >= least and time.perf_counter() - start > seconds:
            return rounds


def _phases(step: Step, device: torch.device, spin: float) -> tuple[tuple[float, ...], bool]:
    """Return the seconds of each phase, and whether the GPU still spun when all was issued."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        marks += [time.perf_counter() for _ in step()]
        return tuple(end - start for start, end in itertools.pairwise(marks)), False
    if spin:
        torch.cuda._sleep(int(spin * _cycles_per_second(device)))
    events = [_event()]
    events += [_event() for _ in step()]
    full = not events[0].query()
    torch.cuda.synchronize(device)
    return tuple(a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)), full


def _spin_for(step: Step, device: torch.device) -> float:
    """Return how long the GPU has to spin before ``step`` for the host to be done by then."""
    spin, full = SPIN, False
    while not full and spin < MOST_SPIN:
        spin *= 2
        full = _phases(step, device, spin)[1]
    return min(2 * spin, MOST_SPIN)  # the host is not always as fast as this once


@functools.cache
def _cycles_per_second(device: torch.device) -> float:
    times = []
    for _ in range(2):  # the first loads the kernel
        events = [_event()]
        torch.cuda._sleep(_CALIBRATION)
        events.append(_event())
        torch.cuda.synchronize(device)
        times.append(events[0].elapsed_time(events[1]) / 1000)
    return _CALIBRATION / times[1]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def ratio(times: list[float], baseline: list[float]) -> float:
    """Return the median over rounds of this way's time by the baseline's in the same round.

    They are those of one call of `interleaved`.
    """
    return statistics.median(t / b for t, b in zip(times, baseline, strict=True))
