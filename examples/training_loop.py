# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own: the layers of a plain PyTorch model become `fastlora.LoRALinear`.

A byte model learns English from Python's manual and is frozen; adapters then teach it Python.
"""

import argparse
import inspect
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastlora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base-steps", type=int, default=600)
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()
CONTEXT = 16
OUTPUT = Path("out/examples/training_loop.pt")


def new_model():
    """Return a model that guesses the next byte: [batch, 16] to logits [batch, 256]."""
    embedding = (nn.Embedding(256, 32), nn.Flatten())
    layers = (nn.Linear(CONTEXT * 32, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    return nn.Sequential(*embedding, *layers, nn.Linear(512, 256))


def add_adapters(model):
    """Put adapters into the linear layers, which keep their weights; freeze everything else."""
    return fastlora.replace_linears(
        model,
        lambda name, module: isinstance(module, nn.Linear),
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
    )


def windows(text):
    """Return the runs of 17 bytes in a text: the first 90% to train on, the others held out."""
    rows = torch.tensor(list(text.encode())).unfold(0, CONTEXT + 1, 1)
    split = int(0.9 * len(rows))
    return rows[:split], rows[split + CONTEXT :]


def loss_on(model, rows):
    return cross_entropy(model(rows[:, :-1]), rows[:, -1])


def train(model, rows, steps):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    model.train()
    for _ in range(steps):
        loss_on(model, rows[torch.randint(len(rows), (256,))]).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{steps} steps on {sum(p.numel() for p in trained):,} parameters")


@torch.no_grad()
def test(model, what):
    losses = (loss_on(model.eval(), rows[:5000]) for rows in (english_held_out, python_held_out))
    print("{:22} loss on English {:.4f}, on Python {:.4f}".format(what, *losses))


torch.manual_seed(0)
english, english_held_out = windows("".join(topics.values()))
python, python_held_out = windows(inspect.getsource(argparse))

model = new_model()
train(model, english, options.base_steps)
test(model, "base")
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

print(add_adapters(model))
test(model, "with new adapters")
train(model, python, options.steps)
test(model, "with trained adapters")

layers = [module for module in model.modules() if isinstance(module, fastlora.LoRALinear)]
for layer in layers:
    layer.merge()  # a single product now
test(model, "merged")
for layer in layers:
    layer.unmerge()
test(model, "unmerged")
same = all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
print(f"the base's weights are the same bits as before: {same}")

OUTPUT.parent.mkdir(parents=True, exist_ok=True)
torch.save(fastlora.lora_state_dict(model), OUTPUT)
print(f"saved in {OUTPUT}: {OUTPUT.stat().st_size / 1e3:.0f} kB")
model = new_model()
model.load_state_dict(base)
add_adapters(model)
model.load_state_dict(torch.load(OUTPUT), strict=False)  # the file holds nothing of the base
test(model, "loaded")
