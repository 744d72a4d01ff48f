# SPDX-License-Identifier: Apache-2.0
"""Siblings called in any order, by whom and how nobody expects: as plain layers, every time."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import inspect
import itertools
import operator
import pickle
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_siblings import QKV, Block, X, checkpointed, close, no_leftovers, results  # noqa: F401
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import patch_peft
from fastlora.layers.siblings import FrozenLinear


def wrapped(model, targets):
    torch.manual_seed(1)
    asked = LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, asked)


def pair(make=Block, targets=("q", "v"), how=(QKV,)):
    """The same model in PEFT's hands twice: as plain layers, and as siblings."""
    plain, patched = (wrapped(make(), list(targets)) for _ in range(2))
    patch_peft(patched, fuse_siblings=how)
    return plain.base_model.model, patched.base_model.model


def gradients(block, *losses):
    """Return what the backward of each loss adds to the gradients, one after the other."""
    found = []
    for loss in losses:
        loss.backward()
        found += [p.grad for p in block.parameters() if p.requires_grad]
        block.zero_grad()
    return found


# What is held


def test_the_first_of_a_group_begins_anew(together):
    """Two forwards with one x: the second one's outputs are of its own graph."""
    found = []
    for block in pair():
        q = block.q(X)
        again = [getattr(block, name)(X) for name in QKV]
        found.append(gradients(block, q.square().sum(), sum(y.square().sum() for y in again)))
    close(*reversed(found))
    assert together == [3, 3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_after_the_first_of_a_group(reentrant):
    """What is kept in it does not depend on what was held before."""
    found = []
    for block in pair():
        x = X.clone().requires_grad_()
        losses = block.q(x).square().sum(), checkpointed(block, reentrant)(x).square().sum()
        found.append([*gradients(block, sum(losses)), x.grad])
    close(*reversed(found))


@pytest.mark.parametrize("shape", [(3, 6), (1, 3, 6)], ids=str)
def test_outputs_whose_graph_is_gone(shape):
    """q's backward has freed it; k and v make another."""
    found = []
    for block in pair():
        x = X.clone().reshape(shape).requires_grad_()
        grads = []
        for name in QKV:
            grads += gradients(block, getattr(block, name)(x).square().sum())
        found.append([*grads, x.grad])
    close(*reversed(found))


WAYS = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(_same, _same),
    "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
}

KINDS = (
    type,
    torch.Tensor.is_inference,
    *map(operator.attrgetter, ("shape", "dtype", "requires_grad")),
)


def _same(t):
    return t


@pytest.mark.parametrize(("first", "then"), list(itertools.product(WAYS, WAYS))[:-1])
def test_what_was_switched_in_between(first, then, together):
    """What k returns is what it returns when it is called alone then, in kind too."""
    plain, block = pair()
    with WAYS[first]():
        block.q(X)
    with WAYS[then]():
        found, expected = block.k(X), plain.k(X)
    assert [kind(found) for kind in KINDS] == [kind(expected) for kind in KINDS]
    assert together == [3]


def test_a_transform_keeps_its_own(together):
    """What q computes under torch.func is of no use outside, nor in the next transform."""
    _, block = pair()
    one = torch.ones(())
    torch.func.grad(lambda scale: (block.q(X) * scale).sum())(one)
    assert block.k(X).data_ptr() and together == []


# How siblings are called


class Keywords(Block):
    def forward(self, x):
        return self.o(torch.cat([self.q(x=x), self.k(input=x), self.v(x)], -1))


def test_keywords(together):
    """PEFT's layers take x, a frozen sibling what nn.Linear takes."""
    plain, block = pair(Keywords, how={"x": X})
    close(results(block), results(plain))
    assert together == [3]
    own = inspect.signature(nn.Linear.forward).parameters.values()
    for kind in (FrozenLinear, fastlora.LoRALinear):
        taken = inspect.signature(kind.forward).parameters.values()
        assert [(p.name, p.kind, p.default) for p in taken] == [
            (p.name, p.kind, p.default) for p in own
        ]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copy_without_its_parent(how, together):
    """A shallow copy shares the groups of a module that has gone since."""
    plain, block = pair()
    plain.between = block.between = nn.functional.relu  # a lambda cannot be pickled
    shallow = copy.copy(block)
    del block
    gc.collect()
    copied = how(shallow)
    close(results(copied), results(plain))
    assert together == [] and copied.q._siblings.members() is None
    close(results(how(copied)), results(plain))


# Any order


class Caller:
    """Someone who calls the layers of two blocks as it comes, and keeps what they return."""

    def __init__(self, blocks):
        self.blocks, self.kept = blocks, []
        self.xs = [X.clone().requires_grad_(), X[None].clone().requires_grad_(), X.clone()]
        self.trained = [*self.xs[:2], *(p for p in blocks.parameters() if p.requires_grad)]

    def call(self, names, i, way, fails):
        """Return the outputs; none where an exception follows them."""

        def run(x):
            ys = tuple(self.blocks.get_submodule(name)(x) for name in names)
            if fails:
                raise KeyError
            return ys

        ys = ()
        with contextlib.suppress(KeyError), WAYS.get(way, contextlib.nullcontext)():
            if way in WAYS:
                ys = run(self.xs[i])
            else:
                ys = checkpoint(run, self.xs[i], use_reentrant=way == "reentrant")
        self.kept += [y for y in ys if y.requires_grad]
        return ys

    def backward(self, which):
        """Return the gradients of some outputs; the others, of the same graph, are forgotten."""
        losses = [y.float().square().sum() for i, y in enumerate(self.kept) if which >> i % 3 & 1]
        self.kept.clear()
        if losses:
            sum(losses).backward()
        found = [t.grad for t in self.trained if t.grad is not None]
        for t in self.trained:
            t.grad = None
        return found

    @torch.no_grad()
    def write(self, name):
        self.kept.clear()
        written = self.blocks.get_submodule(name).parameters() if name else self.xs
        for t in written:
            t.neg_()
        return ()


def steps(count):
    """Yield what somebody does next: a method of `Caller` and its arguments."""
    draw = random.Random(0)
    ways = [*(way for way in WAYS if way != "fake"), "checkpoint", "reentrant"]
    for _ in range(count):
        what = draw.choice(["call", "call", "call", "backward", "write"])
        block = draw.choice([0, 0, 0, 0, 1])
        names = [f"{block}.{draw.choice(QKV)}" for _ in range(draw.choice([1, 1, 2, 3]))]
        if what == "call":
            way = draw.choice(["", "", "", "", *ways])
            x = draw.choice([0, 0, 0, 0, 1, 0 if way == "reentrant" else 2])
            yield what, names, x, way, draw.random() < 0.1
        else:
            yield what, draw.choice(["", *names]) if what == "write" else draw.randrange(8)


@pytest.mark.filterwarnings("ignore:.*computed beside")
def test_any_order():
    """Whatever comes before it, each call and each backward gives what plain layers give."""
    blocks = pair(lambda: nn.ModuleList([Block(), Block()]), ["0.q", "0.v", "1.k", "1.v"])
    callers, last = [Caller(each) for each in blocks], collections.deque(maxlen=12)
    for what, *args in steps(2000):
        last.append((what, *args))
        expected, found = (getattr(caller, what)(*args) for caller in callers)
        rough = 5e-2 if any("autocast" in step for step in last) else 1e-4
        assert len(found) == len(expected), last
        for mine, theirs in zip(found, expected, strict=True):
            for kind in KINDS:
                assert kind(mine) == kind(theirs), last
            assert torch.allclose(mine, theirs, rtol=rough, atol=rough), last
