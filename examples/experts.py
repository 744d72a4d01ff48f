# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts with adapters on its experts and its attention: PEFT alone, then fused."""

import argparse
import os
import time
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own messages

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fastlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()
BATCH, TOKENS = 4, 128
OUTPUT = Path("out/examples/experts")

transformers.logging.set_verbosity_error()


def new_base():
    """Return a small Qwen3-MoE that reads bytes, frozen; its weights are random, and the same."""
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=512,
        head_dim=64,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=4,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16)


def new_model():
    """Return it under PEFT, and an optimizer: always the same ones."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    base = new_base()
    torch.manual_seed(1)
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=3e-3)


def train_step(model, optimizer, ids):
    """Return the loss and the seconds."""
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), time.perf_counter() - start


def peak(model, ids):
    """Return how many MiB a forward and a backward allocate at most."""
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as found:
        model(input_ids=ids, labels=ids).loss.backward()
    live = most = 0
    events = (e for e in found.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    model.zero_grad()
    return most / 2**20


text = torch.tensor(list("".join(topics.values()).encode()))  # Python's manual
rows = text[: len(text) // TOKENS * TOKENS].view(-1, TOKENS)
torch.manual_seed(2)
batches = rows[torch.randperm(len(rows))[: options.steps * BATCH]].split(BATCH)

models = {"PEFT": new_model(), "patched": new_model()}
print(fastlora.patch_peft(models["patched"][0]))  # the one line
found = {way: [] for way in models}
for ids in batches:
    for way in models:  # in turn, so that a busy machine slows both
        found[way].append(train_step(*models[way], ids))
for way, (model, _) in models.items():
    losses, seconds = zip(*found[way], strict=True)
    took = median(seconds[1:])  # the first step warms up
    most = peak(model, batches[0])
    said = f"losses {losses[0]:.4f} to {losses[-1]:.4f}"
    print(f"{way:8} {said}; {1e3 * took:.0f} ms a step, which allocates {most:.0f} MiB")
    found[way] = took, most
took, most = (ours / theirs for theirs, ours in zip(*found.values(), strict=True))
print(f"{took:.2f} times PEFT's time, {most:.2f} times its memory")

# The files are PEFT's.
model, _ = models["patched"]
fastlora.save_adapter(model, OUTPUT)
alone = PeftModel.from_pretrained(new_base(), OUTPUT).eval()
with torch.no_grad():
    logits = model.eval()(batches[0]).logits
    apart = ((alone(batches[0]).logits - logits).norm() / logits.norm()).item()
    fastlora.patch_peft(alone)
    same = torch.equal(alone(batches[0]).logits, logits)
print(f"loaded in plain PEFT: {apart:.1e} of the logits apart; patched: the same bits: {same}")
