# SPDX-License-Identifier: Apache-2.0
"""A training step of a whole model, ours against PEFT: time, memory, FLOPs for each token."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from baselines import nf4
from measure import Turns, free_memory, peak_bytes, ratio, sharing
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.flops import FORMULAS

BATCHES = (8, 1, 2, 4)
TOKENS = {"cpu": 64, "cuda": 1024}
DROPOUT = 0.05
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": DROPOUT, "target_modules": "all-linear"}
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
# Architectures with random weights; transformers' own default is Llama-2-7B. Those whose linear
# layers have 4 bits are named so.
NF4 = ", NF4"
MODELS = {"SmolLM2-135M": SMOLLM2, f"SmolLM2-135M{NF4}": SMOLLM2, "Llama-2-7B": {}}
MODELS[f"Llama-2-7B{NF4}"] = {}
# And those whose adapters are DoRA's.
DORA = ", DoRA"
MODELS[f"SmolLM2-135M{DORA}"] = SMOLLM2
ON_CPU = ("SmolLM2-135M", f"SmolLM2-135M{NF4}", f"SmolLM2-135M{DORA}")


@dataclass(frozen=True)
class Problem:
    """A training step of a model on ``batch`` rows of ``tokens`` tokens."""

    name: str
    batch: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}"

    @property
    def model(self) -> str:
        return self.name

    @property
    def tokens(self) -> int:
        return TOKENS[self.device]


def problems(device: str) -> Iterator[Problem]:
    """Yield what ``make bench`` measures on ``device``."""
    for name in ON_CPU if device == "cpu" else MODELS:
        for batch in BATCHES[: 1 if name.endswith((NF4, DORA)) else None]:
            yield Problem(name, batch, device)


def make(name: str, device: torch.device) -> nn.Module:
    """Return the model in bfloat16, frozen, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**MODELS[name])).train().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    model.name = name
    if name.endswith(NF4):
        for parent in list(model.model.modules()):
            for child, layer in parent.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(parent, child, nf4(layer))
        model.is_loaded_in_4bit = True
    return model


def peft(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Return ``model`` with PEFT's adapters."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**LORA, use_dora=model.name.endswith(DORA)), adapter)


def ours(model: nn.Module) -> nn.Module:
    """Return ``model`` with PEFT's adapters and our forward under them."""
    model = peft(model)
    fastlora.patch_peft(model)
    return model


def siblings(model: nn.Module) -> nn.Module:
    """Return the same with q/k/v and each MLP as one operator."""
    model = peft(model)
    fastlora.patch_peft(model, fuse_siblings=True)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fastlora": ours,
    "fastlora, siblings": siblings,
    "PEFT": peft,
}


class Measure:
    """Measures one problem after another, and keeps a model for the batch sizes that follow.

    Its frozen weights are there once: the ways differ in their modules and adapters.
    """

    ways, baseline, counts_flops = WAYS, "PEFT", True

    def __init__(self) -> None:
        self.name: str | None = None
        self.base: nn.Module | None = None
        self.models: dict[Callable, nn.Module] = {}

    def __call__(self, problem: Problem, ways: list[str], seconds: float) -> list[dict]:
        """Return a row for each way, with the error of one that failed.

        Steps begin on an idle GPU: a user waits for Python too.
        """
        device, tokens = torch.device(problem.device), problem.batch * problem.tokens
        if problem.model != self.name:
            self._take(problem.model, device)
        shape = problem.batch, problem.tokens
        ids = torch.randint(0, self.base.config.vocab_size, shape, device=device)
        turns = Turns(device)
        for way in ways:
            turns.join(way, lambda way=way: self.step(way, problem, ids), run=False)
        rounds = turns.rounds(seconds, with_host=True)
        times = {way: [t for (t,) in found] for way, found in rounds.items()}
        baseline = times.get(self.baseline)
        for way, mine in times.items():
            median = statistics.median(mine)
            turns.rows[way] |= {
                "step_s": median,
                "tokens_s": tokens / median,
                "ratio_to_peft": baseline and ratio(mine, baseline),
            }
        for way in turns.rows:
            turns.note(way, lambda step: {"peak_bytes": peak_bytes(step, device)})
            if self.counts_flops:
                turns.note(way, lambda step: {"flops_per_token": _flops(step) / tokens})
        return list(turns.rows.values())

    def _take(self, name: str, device: torch.device) -> None:
        self.name, self.base, self.models = None, None, {}
        free_memory()  # of the model before
        self.base = make(name, device)
        self.name = name

    def _model(self, way: str) -> nn.Module:
        make = self.ways[way]
        if make not in self.models:
            self.models[make] = make(sharing(self.base))
        return self.models[make]

    def step(self, way: str, problem: Problem, ids: Tensor) -> Callable[[], Iterator[None]]:
        """Return what ``way`` does with a batch of ``problem``."""
        model = self._model(way)
        trained = [p for p in model.parameters() if p.requires_grad]

        def step() -> Iterator[None]:
            loss = model(input_ids=ids, labels=ids).loss
            torch.autograd.grad(loss, trained)
            yield

        return step


def _flops(step: Callable[[], Iterator[None]]) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        list(step())
    return counter.get_total_flops()
