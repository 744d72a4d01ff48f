# SPDX-License-Identifier: Apache-2.0
"""The search for a rank: which trials are made, which one is taken, and why in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from fastlora.commands.target_sets import Targets, listed


@dataclass(frozen=True)
class Trial:
    """A rank on some targets, and what its training came to.

    ``losses``: held out, in nats per token, one for each seed; ``before``: their mean without any
    training; ``trainable``: parameters; ``seconds``: of training, all seeds together.
    """

    r: int
    targets: Targets
    losses: tuple[float, ...]
    before: float
    trainable: int
    seconds: float

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    def __str__(self) -> str:
        return f"r = {self.r} on {listed(self.targets)}"


@dataclass(frozen=True)
class Step:
    """A trial beside the one that was taken until then (``over``; None for the first trial).

    ``gain``: by which part the held-out loss is lower, mean over seeds; ``noise``: the standard
    deviation of that over seeds, None with one seed; ``worth``: whether it was taken.
    """

    trial: Trial
    over: Trial | None = None
    gain: float | None = None
    noise: float | None = None
    worth: bool = True


def compare(trial: Trial, over: Trial, wanted: float) -> Step:
    """Return whether ``trial`` gains ``wanted`` over another, and more than seeds differ by.

    Losses are compared seed by seed: a seed also decides which examples are held out.
    """
    gains = [1 - new / old for new, old in zip(trial.losses, over.losses, strict=True)]
    gain, noise = fmean(gains), stdev(gains) if len(gains) > 1 else None
    return Step(trial, over, gain, noise, gain >= wanted and gain > (noise or 0))


def search(
    train: Callable[[int, Targets], Trial],
    max_r: int,
    sets: Sequence[Targets],
    wanted: float,
) -> list[Step]:
    """Return every step of the search; the last that was worth it holds the trial to take.

    Ranks 1, 2, 4, ... up to ``max_r`` on the first of ``sets`` until a doubling is not worth it;
    then, at the rank taken, each of the wider sets.
    """
    steps = [Step(train(1, sets[0]))]
    while steps[-1].worth and 2 * steps[-1].trial.r <= max_r:
        steps.append(compare(train(2 * steps[-1].trial.r, sets[0]), steps[-1].trial, wanted))
    for targets in sets[1:]:
        best = taken(steps).trial
        steps.append(compare(train(best.r, targets), best, wanted))
    return steps


def taken(steps: list[Step]) -> Step:
    return [step for step in steps if step.worth][-1]


def reason(steps: list[Step], wanted: float, max_r: int) -> str:
    """Return what to take and why, in one sentence."""
    best = taken(steps).trial
    doublings = [s for s in steps[1:] if s.trial.targets == steps[0].trial.targets]
    # Of the doublings only the last one decided; every wider set did.
    clauses = [_clause(step, best, wanted) for step in steps[len(doublings) :]]
    if doublings[-1].worth:
        clauses[0] += f", and --max-r {max_r} ends there"
    if best.loss >= best.before:
        clauses.append(f"but untrained the model is no worse ({best.before:.3f}): lower --lr")
    return f"take {best}: " + "; ".join(clauses)


def _clause(step: Step, best: Trial, wanted: float) -> str:
    trial, over = step.trial, step.over
    doubled = trial.targets == over.targets
    name, before = (f"r = {t.r}" if doubled else listed(t.targets) for t in (trial, over))
    if doubled and trial.targets != best.targets:
        name = str(trial)
    if step.worth:
        return f"{name} gains {step.gain:.2%} over {before}"
    if step.gain <= 0:
        return f"{name} is {-step.gain:.2%} worse"
    if step.gain < wanted:
        return f"{name} gains {step.gain:.2%}, under the {100 * wanted:g}% asked for"
    return f"{name} gains {step.gain:.2%}, no more than seeds differ by ({step.noise:.2%})"


def table(steps: list[Step]) -> str:
    """Return a line for the untrained model and for each trial, under headings."""
    rows = [("r", "targets", "trainable", "held-out loss", "gain", "seconds", "")]
    rows.append(("", "untrained", "0", f"{steps[0].trial.before:.3f}", "", "", ""))
    for step in steps:
        trial, gain = step.trial, "" if step.gain is None else f"{step.gain:.2%}"
        if step.noise is not None:
            gain += f" ± {step.noise:.2%}"
        mark = "taken" if step is taken(steps) else ""
        numbers = (f"{trial.trainable:,}", f"{trial.loss:.3f}", gain, f"{trial.seconds:.0f}", mark)
        rows.append((str(trial.r), listed(trial.targets), *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [zip(row, "><>>>><", widths, strict=True) for row in rows]
    return "\n".join("  ".join(f"{c:{side}{w}}" for c, side, w in row).rstrip() for row in cells)
