# SPDX-License-Identifier: Apache-2.0
"""The commands' pictures as PNG files (matplotlib, imported by whoever asks for one)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from fastlora.commands.rank_search import Trial, listed

TRAIN, HELD_OUT, INK = "#2a78b8", "#d1495b", "#33383d"


def smoothed(losses: list[float]) -> np.ndarray:
    """Return the centred running mean over a sixth of the run, shorter at the ends."""
    window = np.ones(len(losses) // 6 | 1)
    total = np.convolve(losses, window, "same")
    return total / np.convolve(np.ones(len(losses)), window, "same")


def loss_curve(
    folder: Path, losses: list[float], held_out: tuple[float, float], title: str, subtitle: str
) -> None:
    """Draw the loss of every step, smoothed, and the held-out loss at both ends."""
    axes = _axes(title, subtitle, "optimizer step", "loss (nats per token)")
    steps = np.arange(1, len(losses) + 1)
    dots = {"alpha": 0.5, "markersize": 5, "markeredgewidth": 0, "label": "training, each step"}
    axes.plot(steps, losses, ".", color=TRAIN, **dots)
    axes.plot(steps, smoothed(losses), color=TRAIN, linewidth=2, label="training, smoothed")
    axes.plot([0, len(losses)], held_out, "D", color=HELD_OUT, label="held out")
    for step, loss, side in zip((0, len(losses)), held_out, ("left", "right"), strict=True):
        _label(axes, f"{loss:.2f}", (step, loss), (0, 9), HELD_OUT, ha=side)
    axes.margins(x=0.02, y=0.12)
    axes.legend(frameon=False, labelcolor=INK)
    axes.figure.savefig(folder / "loss_curve.png")


def rank_curve(path: Path, trials: list[Trial], taken: Trial, title: str, subtitle: str) -> None:
    """Draw a line through the ranks on the first targets, and a mark for each wider set."""
    axes = _axes(title, subtitle, "trainable parameters", "held-out loss (nats per token)")
    ranks = [trial for trial in trials if trial.targets == trials[0].targets]
    line = {"color": TRAIN, "linewidth": 2, "markersize": 7, "label": listed(ranks[0].targets)}
    axes.plot([t.trainable for t in ranks], [t.loss for t in ranks], "o-", **line)
    for trial in ranks:
        _label(axes, f"r = {trial.r}", (trial.trainable, trial.loss), (7, 8), TRAIN)
    # Their names are long: beside the marks they would lie on each other.
    for trial, mark in zip(trials[len(ranks) :], "Ds", strict=False):
        name = listed(trial.targets, trial.r)
        marked = {"color": HELD_OUT, "markersize": 8, "label": name}
        axes.plot(trial.trainable, trial.loss, mark, **marked)
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


def _label(axes: Axes, text: str, point: Any, offset: Any, color: str, **more: Any) -> None:
    place = {"xytext": offset, "textcoords": "offset points"}
    axes.annotate(text, point, **place, color=color, weight="bold", **more)


def _axes(title: str, subtitle: str, x: str, y: str) -> Axes:
    """Return the axes of a new picture, with the looks that all of them share."""
    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, weight="bold", pad=24)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, color=INK, fontsize=9)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y", color="#e4e7ea")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return axes
