# SPDX-License-Identifier: Apache-2.0
"""Fair timing of several ways to do one thing: in turn, in one process, on one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import torch

Step = Callable[[], Iterable[None]]
Rounds = dict[Any, list[tuple[float, ...]]]
# Seconds that a GPU spins before a step, so that the host has issued it by then: three times what
# that took the last time, within these. A step that waits for the GPU itself never is.
LEAST_SPIN, MOST_SPIN = 1e-4, 0.05
CYCLES = 3e9  # a second, of the fastest GPU: others spin longer


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
) -> Rounds:
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
    rounds: Rounds = {name: [] for name in steps}
    spins = dict.fromkeys(steps, 0.0)
    until = 0.0
    for count in itertools.count():
        if count == 1:  # everything is compiled
            until = perf_counter() + seconds
        names = list(rounds)
        first = count % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            try:
                phases, issued = _phases(steps[name], device, spins[name])
            except Exception as error:
                if failed is None:
                    raise
                del rounds[name]
                failed(name, error)
                continue
            if count:
                rounds[name].append(phases)
            if device.type == "cuda" and not with_host:
                spins[name] = min(max(LEAST_SPIN, 3 * issued), MOST_SPIN)
        if not rounds or (count >= least and perf_counter() > until):
            return rounds


def _phases(step: Step, device: torch.device, spin: float) -> tuple[tuple[float, ...], float]:
    """Return the seconds of each phase, and those in which the host has issued all of them."""
    on_gpu = device.type == "cuda"
    if spin:
        torch.cuda._sleep(int(spin * CYCLES))
    mark, start = _event if on_gpu else perf_counter, perf_counter()
    marks = [mark(), *(mark() for _ in step())]
    issued = perf_counter() - start
    if not on_gpu:
        return tuple(b - a for a, b in itertools.pairwise(marks)), issued
    torch.cuda.synchronize(device)
    return tuple(a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)), issued


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
