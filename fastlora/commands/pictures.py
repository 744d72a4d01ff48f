# SPDX-License-Identifier: Apache-2.0
"""The commands' pictures as PNG files (matplotlib, imported by whoever asks for one)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TRAIN, HELD_OUT = "#2a78b8", "#d1495b"


def loss_curve(path: Path, metrics: dict[str, Any], title: str, subtitle: str) -> None:
    """Draw the loss of every step, smoothed, and the held-out loss at both ends."""
    losses = metrics["losses"]
    held_out = metrics["held_out_before"], metrics["held_out_after"]
    axes = _axes(title, subtitle, "optimizer step", "loss (nats per token)")
    steps, ends = np.arange(1, len(losses) + 1), (0, len(losses))
    window = np.ones(len(losses) // 6 | 1)  # shorter at the ends
    sums, counts = (np.convolve(each, window, "same") for each in (losses, np.ones(len(losses))))
    axes.plot(steps, losses, ".", color=TRAIN, alpha=0.5, label="training, each step")
    axes.plot(steps, sums / counts, color=TRAIN, linewidth=2, label="training, smoothed")
    axes.plot(ends, held_out, "D", color=HELD_OUT, label="held out")
    for step, loss in zip(ends, held_out, strict=True):
        _label(axes, f"{loss:.2f}", (step, loss))
    axes.legend()
    axes.figure.savefig(path)


def rank_curve(path: Path, trials: list, best: Any, title: str, subtitle: str) -> None:
    """Draw a line through the ranks on the first targets, and a mark for each wider set."""
    axes = _axes(title, subtitle, "trainable parameters", "held-out loss (nats per token)")
    ranks = [trial for trial in trials if trial.targets == trials[0].targets]
    drawn = [("-o", ranks, ", ".join(ranks[0].targets))]
    # Their names are long: beside the marks they would lie on each other.
    drawn += [("D", [trial], str(trial)) for trial in trials[len(ranks) :]]
    for form, points, label in drawn:
        axes.plot([t.trainable for t in points], [t.loss for t in points], form, label=label)
    for trial in ranks:
        _label(axes, f"r = {trial.r}", (trial.trainable, trial.loss))
    axes.plot(best.trainable, best.loss, "o", markersize=16, fillstyle="none", label="taken")
    axes.set_xscale("log")
    axes.figure.legend(loc="outside lower center", ncols=2)  # inside it could hide a label
    axes.figure.savefig(path)


def _label(axes: Axes, text: str, point: tuple[float, float]) -> None:
    axes.annotate(text, point, (0, 9), textcoords="offset points", ha="center", weight="bold")


def _axes(title: str, subtitle: str, x: str, y: str) -> Axes:
    """Return the axes of a new picture, with the looks that all of them share."""
    axes = Figure(figsize=(8, 4.6), dpi=120, layout="constrained").add_subplot()
    axes.set_title(f"{title}\n", loc="left", weight="bold")
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9)
    axes.set(xlabel=x, ylabel=y)
    axes.margins(y=0.15)
    axes.grid(axis="y", color="#e4e7ea")
    axes.spines[["top", "right"]].set_visible(False)
    return axes
