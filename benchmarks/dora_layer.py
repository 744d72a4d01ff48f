# SPDX-License-Identifier: Apache-2.0
"""One layer with DoRA's magnitude: `patch_peft`, and PEFT's layer."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import baselines
import torch
from measure import Turns, memory, sharing, step_of
from torch import nn

import fastlora
from fastlora.operator.tuning import host_counts

NAME = "DoRA"
SIZES = {"cpu": (2048, (512, 2048)), "cuda": (4096, (2048, 8192))}  # of both sides; tokens
DROPOUTS = (0.0, 0.05)


class Problem(baselines.Problem):
    """A layer in training; with a token alone in evaluation, forward and without gradients."""

    @property
    def decodes(self) -> bool:
        return self.M == 1


class Peft(baselines.Peft):
    """PEFT's own layer. B is not zero, nor is the magnitude the norm."""

    dora = True

    def __init__(self, problem: Problem, linear: nn.Linear) -> None:
        super().__init__(problem, linear)
        self.train(not problem.decodes)


class Ours(Peft):
    """The same layer, patched."""

    def __init__(self, problem: Problem, linear: nn.Linear) -> None:
        super().__init__(problem, linear)
        fastlora.patch_peft(nn.Sequential(self.layer))


WAYS: dict[str, Callable[[Problem, nn.Linear], nn.Module]] = {
    "frozen": lambda problem, linear: linear,
    "fastlora": Ours,
    "PEFT": Peft,
}


def problems(device: str) -> Iterator[Problem]:
    """Yield what ``make bench`` measures on ``device``."""
    side, tokens = SIZES[device]
    goal = Problem(NAME, 1, side, side, adapter=torch.float32, device=device)
    for p in DROPOUTS:
        for m in tokens:
            yield replace(goal, M=m, p=p)
    yield replace(goal, M=tokens[-1], adapter=torch.bfloat16)
    yield goal


def measure(problem: Problem, ways: list[str], seconds: float) -> list[dict]:
    """Return a row for each way, with the error of one that failed."""
    device, linear, (x, dy) = torch.device(problem.device), problem.linear(), problem.inputs()
    x, turns = x.detach().requires_grad_(not problem.decodes), Turns(device)
    for way in ways:
        turns.join(way, lambda way=way: step_of(WAYS[way](problem, sharing(linear)), x, dy))
    turns.time(seconds, with_host=host_counts(problem.M, device))
    for way in turns.rows if not problem.decodes else ():
        turns.note(way, memory)
    return list(turns.rows.values())
