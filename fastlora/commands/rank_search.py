# SPDX-License-Identifier: Apache-2.0
"""The search for a rank and its targets: what is worth it, and how that is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from fastlora.commands.models import Targets


@dataclass(frozen=True)
class Trial:
    """A rank on some targets, what its training came to, and whether it is worth it.

    ``losses``: held out, in nats per token, one for each seed; ``before``: their mean without any
    training; ``trainable``: parameters; ``seconds``: of training, all seeds together; ``over``: the
    trial that was taken until then, None for the first.
    """

    r: int
    targets: Targets
    losses: tuple[float, ...]
    before: float
    trainable: int
    seconds: float
    over: Trial | None = None
    worth: bool = True

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def gains(self) -> list[float]:
        """By which part each loss is lower, seed by seed: a seed decides what is held out, too."""
        over = self.over or self
        return [1 - new / old for new, old in zip(self.losses, over.losses, strict=True)]

    def against(self, over: Trial, wanted: float) -> Trial:
        """Return it compared: it must gain ``wanted``, and more than seeds differ by."""
        gains = dataclasses.replace(self, over=over).gains
        worth = fmean(gains) >= wanted and fmean(gains) > noise(gains)
        return dataclasses.replace(self, over=over, worth=worth)


def noise(gains: Sequence[float]) -> float:
    return stdev(gains) if len(gains) > 1 else 0.0


def search(
    train: Callable[[int, Targets], Trial], max_r: int, sets: Sequence[Targets], wanted: float
) -> list[Trial]:
    """Return every trial of the search; the last that was worth it is the one to take.

    Ranks 1, 2, 4, ... up to ``max_r`` on the first of ``sets`` until a doubling is not worth it;
    then, at the rank taken, each of the wider sets.
    """
    trials = [train(1, sets[0])]
    while trials[-1].worth and 2 * trials[-1].r <= max_r:
        trials.append(train(2 * trials[-1].r, sets[0]).against(trials[-1], wanted))
    for targets in sets[1:]:
        best = taken(trials)
        trials.append(train(best.r, targets).against(best, wanted))
    return trials


def taken(trials: list[Trial]) -> Trial:
    return [trial for trial in trials if trial.worth][-1]


def reason(trials: list[Trial], wanted: float, max_r: int) -> str:
    """Return what to take and why, in one sentence."""
    best, clauses = taken(trials), []
    for t, after in zip(trials[1:], [*trials[2:], None], strict=True):
        doubled = t.targets == t.over.targets
        gain = fmean(t.gains)
        if doubled and after is not None and after.targets == t.targets:
            continue  # of the doublings the last one decided
        name = f"r = {t.r}" if doubled else listed(t.targets)
        clauses.append(f"{name} gains {gain:.2%} over {listed(t.over.targets, t.over.r)}")
        if not t.worth:
            within = f"no more than seeds differ by ({noise(t.gains):.2%})"
            clauses[-1] += f", {within if gain >= wanted else f'under the {wanted:.2%} asked for'}"
        elif doubled:
            clauses[-1] += f", and --max-r {max_r} ends there"
    if best.loss >= best.before:
        clauses.append(f"but untrained the model is no worse ({best.before:.3f}): lower --lr")
    return f"take {listed(best.targets, best.r)}: {'; '.join(clauses)}"


def table(trials: list[Trial]) -> str:
    """Return a line for the untrained model and for each trial, under headings."""
    rows = [("r", "targets", "trainable", "held-out loss", "gain", "seconds", "")]
    rows.append(("", "untrained", "0", f"{trials[0].before:.3f}", "", "", ""))
    for t in trials:
        spread = f" ± {noise(t.gains):.2%}" if len(t.losses) > 1 else ""
        gain = f"{fmean(t.gains):.2%}{spread}" if t.over else ""
        numbers = (f"{t.trainable:,}", f"{t.loss:.3f}", gain, f"{t.seconds:.0f}")
        rows.append((str(t.r), listed(t.targets), *numbers, "taken" * (t is taken(trials))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [zip(row, "><>>>><", widths, strict=True) for row in rows]
    return "\n".join("  ".join(f"{c:{side}{w}}" for c, side, w in row).rstrip() for row in cells)


def listed(targets: Targets, r: int | None = None) -> str:
    names = targets if isinstance(targets, str) else ", ".join(targets)
    return names if r is None else f"r = {r} on {names}"
