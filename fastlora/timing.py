# SPDX-License-Identifier: Apache-2.0
"""Fair timing of several ways to do one thing: in turn, in one process, on one device."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch


def interleaved(
    steps: dict[Any, Callable[[], Iterable[None]]],
    device: torch.device,
    seconds: float,
    least: int = 5,
) -> dict[Any, list[tuple[float, ...]]]:
    """Return for each way its rounds, each the seconds of every phase of the step.

    A step is called and iterated: what it does between two ``yield`` is one phase, so that
    ``forward(); yield; backward(); yield`` times both. Every way runs once before anything is
    timed. Then they take turns, so that whatever disturbs the machine disturbs all of them, for
    about ``seconds`` in all but at least ``least`` rounds. Each round begins with another way: what
    one leaves in caches and in the allocator is then not always the same one's.
    """
    rounds: dict[Any, list[tuple[float, ...]]] = {name: [] for name in steps}
    for step in steps.values():
        _phases(step, device)
    names, start = list(steps), time.perf_counter()
    for count in itertools.count(1):
        first = count % len(steps)
        for name in (*names[first:], *names[:first]):
            rounds[name].append(_phases(steps[name], device))
        if count >= least and time.perf_counter() - start > seconds:
            return rounds


def _phases(step: Callable[[], Iterable[None]], device: torch.device) -> tuple[float, ...]:
    if device.type != "cuda":
        marks = [time.perf_counter()]
        marks += [time.perf_counter() for _ in step()]
        return tuple(end - start for start, end in itertools.pairwise(marks))
    events = [_event()]
    events += [_event() for _ in step()]
    torch.cuda.synchronize(device)
    return tuple(a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def ratio(times: list[float], baseline: list[float]) -> float:
    """Return the median over rounds of this way's time by the baseline's in the same round."""
    return statistics.median(t / b for t, b in zip(times, baseline, strict=True))
