# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture, with adapters on all their weights: `patch_peft`, and PEFT alone.

They are MixtralExperts of transformers, frozen, of random weights, and run by "grouped_mm". What
routes is given, and gets its gradient: the frozen block's backward makes that and dx.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import baselines
import torch
from measure import Step, Turns, memory, sharing
from torch import Tensor, nn

import fastlora

NAME = "experts"
# experts, of each token, hidden, intermediate
SIZES = {
    "cpu": ((8, 2, 1024, 1024), (64, 2, 512, 256), (64, 8, 512, 256)),
    "cuda": ((128, 8, 2048, 768), (8, 2, 4096, 14336)),
}
TOKENS = {"cpu": 512, "cuda": 4096}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Problem(baselines.Problem):
    """M tokens of size K, each for ``top`` of ``experts`` that are N wide inside."""

    experts: int = 8
    top: int = 2

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.top} of {self.experts}"

    def block(self) -> "Block":
        """Return the block in training mode, its experts frozen."""
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        sizes = {"hidden_size": self.K, "intermediate_size": self.N}
        config = MixtralConfig(**sizes, num_local_experts=self.experts)
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            experts = MixtralExperts(config)
        for seed, (name, p) in enumerate(experts.named_parameters()):
            weight = self._random(seed, *p.shape).div_(p.shape[-1] ** 0.5)
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
        weights, index = self._random(5, self.M, self.experts).topk(self.top)
        return Block(experts, index, weights.softmax(-1))

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return x, which requires grad, and dy."""
        return self._random(3, self.M, self.K).requires_grad_(), self._random(4, self.M, self.K)


class Block(nn.Module):
    """Experts, and to which of them tokens go: the weights of that have a gradient."""

    def __init__(self, experts: nn.Module, index: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.experts, self.weights = experts, nn.Parameter(weights)
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.index, self.weights)


def peft(problem: Problem, block: Block) -> nn.Module:
    """Return ``block`` with PEFT's adapters."""
    return _adapted(problem, block).base_model.model


def ours(problem: Problem, block: Block) -> nn.Module:
    """Return the same with our forward under them."""
    model = _adapted(problem, block)
    fastlora.patch_peft(model)
    return model.base_model.model


def _adapted(problem: Problem, block: Block) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=problem.R,
        lora_alpha=problem.scaling * problem.R,
        target_modules=[],
        target_parameters=TARGETS,
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    wide = problem.adapter == torch.float32
    model = get_peft_model(block, config, autocast_adapter_dtype=wide)
    block.weights.requires_grad_()  # PEFT has frozen it
    return model.train()


WAYS: dict[str, Callable[[Problem, Block], nn.Module]] = {
    "frozen": lambda problem, block: block,
    "fastlora": ours,
    "PEFT": peft,
}


def problems(device: str) -> Iterator[Problem]:
    """Yield what ``make bench`` measures on ``device``."""
    for experts, top, hidden, wide in SIZES[device]:
        for adapter in (torch.bfloat16, torch.float32):
            sizes = {"M": TOKENS[device], "N": wide, "K": hidden}
            of = {"experts": experts, "top": top, "adapter": adapter, "device": device}
            yield Problem(NAME, **sizes, **of)


def measure(problem: Problem, ways: list[str], seconds: float) -> list[dict]:
    """Return a row for each way, with the error of one that failed."""
    block, (x, dy) = problem.block(), problem.inputs()
    turns = Turns(torch.device(problem.device))
    for way in ways:
        turns.join(way, lambda way=way: Step(WAYS[way](problem, sharing(block)), x, dy))
    turns.time(seconds)
    for way in turns.rows:
        turns.note(way, memory)
    return list(turns.rows.values())
