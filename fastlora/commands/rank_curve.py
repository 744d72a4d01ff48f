# SPDX-License-Identifier: Apache-2.0
"""Draw what a search for a rank found: held-out loss against trainable parameters, as a PNG."""

from __future__ import annotations

from pathlib import Path

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from fastlora.commands.loss_curve import HELD_OUT, INK, TRAIN, empty_axes
from fastlora.commands.rank_search import Trial
from fastlora.commands.target_sets import listed


def draw(path: Path, trials: list[Trial], taken: Trial, title: str, subtitle: str) -> None:
    """Write a PNG: a line through the ranks on the first targets, a mark for each wider set."""
    axes = empty_axes(title, subtitle, "trainable parameters", "held-out loss (nats per token)")
    first = trials[0].targets
    ranks = [trial for trial in trials if trial.targets == first]
    line = {"color": TRAIN, "linewidth": 2, "markersize": 7, "label": listed(first)}
    axes.plot([t.trainable for t in ranks], [t.loss for t in ranks], "o-", **line)
    for trial in ranks:
        axes.annotate(
            f"r = {trial.r}",
            (trial.trainable, trial.loss),
            xytext=(7, 8),
            textcoords="offset points",
            color=TRAIN,
            weight="bold",
        )
    # Their names are long: beside the marks they would lie on each other.
    for trial, mark in zip((t for t in trials if t.targets != first), "Ds", strict=False):
        name = f"{listed(trial.targets)}, r = {trial.r}"
        axes.plot(trial.trainable, trial.loss, mark, color=HELD_OUT, markersize=8, label=name)
    ring = {"markersize": 16, "markeredgecolor": INK, "fillstyle": "none", "label": "taken"}
    axes.plot(taken.trainable, taken.loss, "o", **ring)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1, y=0.2)
    below = {"loc": "outside lower center", "ncols": 2}  # inside it could hide a label
    axes.figure.legend(frameon=False, labelcolor=INK, **below)
    axes.figure.savefig(path)
