# SPDX-License-Identifier: Apache-2.0
"""Draw a training run's loss curve as a PNG (matplotlib, imported by whoever asks for one)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TRAIN, HELD_OUT, INK = "#2a78b8", "#d1495b", "#33383d"


def smoothed(losses: list[float]) -> np.ndarray:
    """Return the centred running mean over a sixth of the run, shorter at the ends."""
    window = np.ones(len(losses) // 6 | 1)
    total = np.convolve(losses, window, "same")
    return total / np.convolve(np.ones(len(losses)), window, "same")


def draw(
    path: Path, losses: list[float], before: float, after: float, title: str, subtitle: str
) -> None:
    """Write a PNG: the loss of every step, smoothed, and the held-out loss at both ends."""
    axes = empty_axes(title, subtitle, "optimizer step", "loss (nats per token)")
    steps = np.arange(1, len(losses) + 1)
    dots = {"alpha": 0.5, "markersize": 5, "markeredgewidth": 0, "label": "training, each step"}
    axes.plot(steps, losses, ".", color=TRAIN, **dots)
    axes.plot(steps, smoothed(losses), color=TRAIN, linewidth=2, label="training, smoothed")
    axes.plot([0, len(losses)], [before, after], "D", color=HELD_OUT, label="held out")
    for step, loss, side in ((0, before, "left"), (len(losses), after, "right")):
        axes.annotate(
            f"{loss:.2f}",
            (step, loss),
            xytext=(0, 9),
            textcoords="offset points",
            ha=side,
            color=HELD_OUT,
            weight="bold",
        )
    axes.margins(x=0.02, y=0.12)
    axes.legend(frameon=False, labelcolor=INK)
    axes.figure.savefig(path)


def empty_axes(title: str, subtitle: str, x: str, y: str) -> Axes:
    """Return the axes of a new picture, with the looks that all of them share."""
    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, weight="bold", pad=24)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, color=INK, fontsize=9)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(axis="y", color="#e4e7ea")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return axes
