# SPDX-License-Identifier: Apache-2.0
"""The commands' pictures as PNG files (matplotlib, imported by whoever asks for one)."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def loss_curve(path: Path, metrics: dict[str, Any], title: str, subtitle: str) -> None:
    """Draw the loss of every step, smoothed, and the held-out loss at both ends."""
    losses = metrics["losses"]
    steps, window = range(1, len(losses) + 1), np.ones(len(losses) // 6 | 1)  # shorter at the ends
    sums, counts = (np.convolve(each, window, "same") for each in (losses, np.ones(len(losses))))
    ends = [(0, metrics["held_out_before"]), (len(losses), metrics["held_out_after"])]
    axes = _axes(title, subtitle, "optimizer step", "loss (nats per token)")
    axes.plot(steps, losses, "C0.", alpha=0.5, label="training, each step")
    axes.plot(steps, sums / counts, "C0", label="training, smoothed")
    axes.plot(*zip(*ends, strict=True), "C3D", label="held out")
    _finish(axes, path, [(f"{loss:.2f}", (step, loss)) for step, loss in ends])


def rank_curve(path: Path, trials: list, best: Any, title: str, subtitle: str) -> None:
    """Draw a line through the ranks on the first targets, and a mark for each wider set."""
    axes = _axes(title, subtitle, "trainable parameters", "held-out loss (nats per token)")
    axes.set_xscale("log")
    ranks = [trial for trial in trials if trial.targets == trials[0].targets]
    drawn = [("-o", ranks, ", ".join(ranks[0].targets))]
    drawn += [("D", [trial], str(trial)) for trial in trials[len(ranks) :]]
    for form, points, label in drawn:
        axes.plot([t.trainable for t in points], [t.loss for t in points], form, label=label)
    axes.plot(best.trainable, best.loss, "ko", markersize=16, fillstyle="none", label="taken")
    _finish(axes, path, [(f"r = {trial.r}", (trial.trainable, trial.loss)) for trial in ranks])


def _axes(title: str, subtitle: str, x: str, y: str) -> Any:
    axes = Figure(figsize=(8, 4.6), dpi=120, layout="constrained").add_subplot()
    axes.set_title(f"{title}\n", loc="left", weight="bold")
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9)
    axes.set(xlabel=x, ylabel=y)
    axes.margins(0.05, 0.15)
    return axes


def _finish(axes: Any, path: Path, notes: list[tuple[str, tuple[float, float]]]) -> None:
    for text, point in notes:
        axes.annotate(text, point, (0, 9), textcoords="offset points", ha="center")
    axes.figure.legend(loc="outside lower center", ncols=2)  # inside it could hide something
    axes.figure.savefig(path)
