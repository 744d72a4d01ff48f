# SPDX-License-Identifier: Apache-2.0
"""One layer whose samples have adapters of their own: `adapters_by_sample`, and PEFT's layer.

PEFT's models refuse ``adapter_names`` in training; its layer takes them, and autograd goes through,
so that is what is measured. A model enters our block once for all of its layers: it is entered
before the steps here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import baselines
import torch
from measure import Turns, peak_bytes, sharing, step_of
from torch import Tensor, nn

import fastlora
from fastlora.operator.tuning import host_counts

NAME = "mixed adapters"
SAMPLES = 64
SIZES = {"cpu": (1024, 32), "cuda": (4096, 128)}  # of both sides of the layer; tokens of a sample
ADAPTERS = (1, 2, 4, 8, 16, 64)
SOME = 16  # the number of those by turns, and of those that decode


@dataclass(frozen=True)
class Problem(baselines.Problem):
    """A layer on ``SAMPLES`` samples, M tokens in all, as many for each of ``adapters``.

    Samples of one adapter are next to each other, or come ``by_turns``. With a token each they
    ``decode``: forward alone, without gradients.
    """

    adapters: int = 1
    by_turns: bool = False

    def __str__(self) -> str:
        order = ", by turns" * self.by_turns
        return f"{super().__str__()}, {self.adapters} adapters in {SAMPLES} samples{order}"

    @property
    def decode(self) -> bool:
        return self.M == SAMPLES

    @property
    def names(self) -> list[str]:
        """The adapter of each sample."""
        n = self.adapters
        return [str(i % n if self.by_turns else i * n // SAMPLES) for i in range(SAMPLES)]


class Peft(nn.Module):
    """PEFT's own layer, with the adapters of a problem."""

    def __init__(self, problem: Problem, linear: nn.Linear) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        sizes = {"r": problem.R, "lora_alpha": problem.scaling * problem.R}
        config = LoraConfig(target_modules=["0"], init_lora_weights=False, **sizes)
        how = {"autocast_adapter_dtype": problem.adapter == torch.float32}
        first, *others = dict.fromkeys(problem.names)
        torch.manual_seed(1)
        self.model = get_peft_model(nn.Sequential(linear), config, first, **how)
        for name in others:
            self.model.add_adapter(name, config, **how)
        self.model.set_requires_grad([first, *others])
        self.layer, self.names = self.model.base_model.model[0].train(), problem.names

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, adapter_names=self.names)


class Ours(Peft):
    """The same layer, patched, inside of a block that lasts as long as it does."""

    def __init__(self, problem: Problem, linear: nn.Linear) -> None:
        super().__init__(problem, linear)
        fastlora.patch_peft(self.model)
        self.block = fastlora.adapters_by_sample(self.model, self.names)
        self.block.__enter__()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


WAYS: dict[str, Callable[[Problem, nn.Linear], nn.Module]] = {
    "frozen": lambda problem, linear: linear,
    "fastlora": Ours,
    "PEFT": Peft,
}


def problems(device: str) -> Iterator[Problem]:
    """Yield what ``make bench`` measures on ``device``."""
    side, tokens = SIZES[device]

    def problem(each: int, adapters: int, **changes) -> Problem:
        sizes = SAMPLES * each, side, side
        return Problem(NAME, *sizes, device=device, adapters=adapters, **changes)

    for adapters in ADAPTERS:
        yield problem(tokens, adapters)
    yield problem(tokens, SOME, by_turns=True)
    for changes in ({}, {"by_turns": True}, {"adapter": torch.float32}):
        yield problem(1, SOME, **changes)


def measure(problem: Problem, ways: list[str], seconds: float) -> list[dict]:
    """Return a row for each way, with the error of one that failed."""
    device, linear = torch.device(problem.device), problem.linear()
    x, dy = (t.detach().unflatten(0, (SAMPLES, -1)) for t in problem.inputs())
    x.requires_grad_(not problem.decode)
    turns = Turns(device)
    for way in ways:
        turns.join(way, lambda way=way: step_of(WAYS[way](problem, sharing(linear)), x, dy))
    turns.time(seconds, with_host=host_counts(problem.M, device))
    for way in turns.rows:
        turns.note(way, lambda step: {"peak_bytes": peak_bytes(step, device)})
    return list(turns.rows.values())
