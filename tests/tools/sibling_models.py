# SPDX-License-Identifier: Apache-2.0
"""Modules that have siblings, under PEFT, and what is asked of them."""

import copy
import pickle

import peft_models
import pytest
import torch
from peft_models import X
from torch import nn

from fastlora import patch_peft
from fastlora.layers import siblings

QKV = ("q", "k", "v")


class Block(nn.Module):
    """Attention's projections, some tokens by themselves, and what a test wants between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(6, n) for n in (8, 4, 4))
        self.o = nn.Linear(16, 6)
        self.between = nn.functional.relu  # a lambda cannot be pickled
        self.used = QKV

    def forward(self, x):
        y = {"q": self.q(x)}
        self.between(x)
        for name in ("k", "v"):
            if name in self.used:
                y[name] = getattr(self, name)(x)
        parts = [y.get(name, torch.zeros(*x.shape[:-1], 4)) for name in QKV]
        return self.o(torch.cat(parts, -1))


def wrapped(make=Block, targets=("q", "v"), **changes):
    """PEFT's model with adapters that do something."""
    return peft_models.wrapped(make(), r=3, target_modules=list(targets), **changes).train()


def pair(make=Block, targets=("q", "v"), how=(QKV,), **changes):
    """The same patched model twice: as plain layers, which drop the same elements, and siblings."""
    plain, fused = (wrapped(make, targets, **changes) for _ in range(2))
    patch_peft(plain)
    patch_peft(fused, fuse_siblings=how)
    return plain.base_model.model, fused.base_model.model


def results(block, x=X):
    """Return the output and every gradient."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    y, trained = block(x), [p for p in block.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained], allow_unused=True)]


def added(block, loss):
    """Return what a backward adds to the gradients."""
    loss.backward()
    found = [p.grad for p in block.parameters() if p.requires_grad]
    block.zero_grad()
    return found


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 10)


def said_by(model, wrong):
    """Return what a model says of an input that it refuses."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        model(wrong)
    return str(error.value)


def nothing_held():
    return not vars(siblings._held)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda b: pickle.loads(pickle.dumps(b))}
