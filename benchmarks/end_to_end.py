# SPDX-License-Identifier: Apache-2.0
"""A training step of a whole model, ours against PEFT: time, memory, FLOPs for each token."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator

import torch
from measure import peak_bytes, runs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora.flops import FORMULAS
from fastlora.timing import interleaved, ratio

BATCHES = (1, 2, 4, 7, 8)
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
# Architectures with random weights; transformers' own default is Llama-2-7B.
MODELS = {"SmolLM2-135M": SMOLLM2, "Llama-2-7B": {}}


def make(name: str, device: torch.device) -> nn.Module:
    """Return the model in bfloat16, in training mode."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**MODELS[name])).train()
    finally:
        torch.set_default_dtype(torch.float32)


def ours(model: nn.Module) -> nn.Module:
    """Return ``model`` with fused adapters."""
    fastlora.inject(model, fastlora.LoRAConfig(**LORA))
    return model


def siblings(model: nn.Module) -> nn.Module:
    """Return ``model`` with fused adapters, q/k/v and each MLP as one operator."""
    fastlora.inject(model, fastlora.LoRAConfig(**LORA), fuse_siblings=True)
    return model


def peft(model: nn.Module) -> nn.Module:
    """Return ``model`` with PEFT's adapters."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**LORA))


def patched(model: nn.Module) -> nn.Module:
    """Return ``model`` with PEFT's adapters and our forward under them."""
    model = peft(model)
    fastlora.patch_peft(model)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fastlora": ours,
    "fastlora, siblings": siblings,
    "PEFT, patched": patched,
    "PEFT": peft,
}


def measure(name: str, device: torch.device, seconds: float) -> Iterator[list[dict]]:
    """Yield the rows of each batch size that fits: both models take turns on the same tokens."""
    base = make(name, device)
    models = {way: wrap(copy.deepcopy(base)) for way, wrap in WAYS.items()}
    del base
    tokens = TOKENS[device.type]
    for batch in BATCHES:
        ids = torch.randint(0, SMOLLM2["vocab_size"] // 2, (batch, tokens), device=device)
        steps = {way: _step(model, ids) for way, model in models.items()}
        steps = {way: step for way, step in steps.items() if runs(way, step)}
        rounds = interleaved(steps, device, seconds / len(BATCHES), least=2)
        times = {way: [t for (t,) in found] for way, found in rounds.items()}
        rows = []
        for way, step in steps.items():
            with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
                list(step())
            median = statistics.median(times[way])
            rows.append(
                {
                    "model": name,
                    "way": way,
                    "batch": batch,
                    "step_s": median,
                    "tokens": tokens,
                    "tokens_s": batch * tokens / median,
                    "ratio_to_peft": ratio(times[way], times["PEFT"]) if "PEFT" in times else None,
                    "peak_bytes": peak_bytes(step, device),
                    "flops_per_token": counter.get_total_flops() / (batch * tokens),
                }
            )
        yield rows


def _step(model: nn.Module, ids: torch.Tensor):
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.grad(loss, trained)
        yield

    return step
