# SPDX-License-Identifier: Apache-2.0
"""A training step of a whole model for several adapters: in one batch, or one after another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import end_to_end
import mixed_layer
import torch
from torch import Tensor, nn

import fastlora

MODELS = {"cpu": "SmolLM2-135M", "cuda": "Llama-2-7B"}
BATCH = 8
ADAPTERS = (4, 8, 2, 1)  # the most telling first
NAMES = [f"adapter {i}" for i in range(BATCH)]


@dataclass(frozen=True)
class Problem(end_to_end.Problem):
    """A batch with as many rows for each of ``adapters``."""

    adapters: int = 1

    def __str__(self) -> str:
        return f"{self.name}, {self.adapters} in a batch of {self.batch}"

    @property
    def model(self) -> str:
        return MODELS[self.device]

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        return [NAMES[i * self.adapters // self.batch] for i in range(self.batch)]


def peft(model: nn.Module) -> nn.Module:
    """Return ``model`` with an adapter of PEFT's for each row."""
    from peft import LoraConfig

    model = end_to_end.peft(model, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, LoraConfig(**end_to_end.LORA))
    return model


def ours(model: nn.Module) -> nn.Module:
    """Return the same with our forward under it."""
    model = peft(model)
    fastlora.patch_peft(model)
    return model


TOGETHER = "fastlora, together"
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    TOGETHER: ours,
    "fastlora, in turn": ours,
    "PEFT, in turn": peft,
}


def problems(device: str) -> Iterator[Problem]:
    """Yield what ``make bench`` measures on ``device``."""
    for adapters in ADAPTERS:
        yield Problem(f"{MODELS[device]}, {mixed_layer.NAME}", BATCH, device, adapters)


class Measure(end_to_end.Measure):
    """Measures steps after which each adapter has the gradients of its own rows' mean loss."""

    ways, baseline, counts_flops = WAYS, "PEFT, in turn", False

    def step(self, way: str, problem: Problem, ids: Tensor) -> Callable[[], Iterator[None]]:
        """Return what ``way`` does with a batch of ``problem``."""
        model, names = self._model(way), problem.names
        adapters = dict.fromkeys(names)
        rows = {name: ids[[name == other for other in names]] for name in adapters}
        trained = {
            name: [p for path, p in model.named_parameters() if f".{name}." in path]
            for name in adapters
        }

        def together() -> Iterator[None]:
            model.set_requires_grad(list(adapters))
            with fastlora.adapters_by_sample(model, names):
                logits = model(input_ids=ids).logits
            losses = fastlora.losses_by_adapter(logits, ids, names)
            torch.autograd.grad(sum(losses.values()), list(chain(*trained.values())))
            yield

        def in_turn() -> Iterator[None]:
            for name, own in rows.items():
                model.set_adapter(name)
                loss = model(input_ids=own, labels=own).loss
                torch.autograd.grad(loss, trained[name])
            yield

        return together if way == TOGETHER else in_turn
