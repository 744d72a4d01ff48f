# SPDX-License-Identifier: Apache-2.0
"""Siblings run as plain layers wherever it could be told: what changes, who looks on, any order."""

import collections
import contextlib
import functools
import inspect
import itertools
import random
from operator import attrgetter

import pytest
import torch
from peft_models import Quantised
from sibling_models import QKV, Block, X, close, nothing_held, pair, results, said_by
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.layers import siblings
from fastlora.layers.siblings import FrozenLinear
from fastlora.operator import plans

pytestmark = pytest.mark.usefixtures("no_leftovers")


def test_another_stream(together, monkeypatch):
    """What one stream has computed, or is about to, another one computes itself."""
    current = ["first"]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    plain, fused = pair()
    fused.between = lambda x: current.__setitem__(0, "second")
    close(results(fused), results(plain))
    misses = fused.q._siblings.misses
    assert together == [3] and misses > 0
    fused.between = nn.functional.relu  # all on one stream again
    close(results(fused), results(plain))
    assert together == [3, 3] and fused.q._siblings.misses < misses


WAYS = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(_same, _same),
    "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
}

KINDS = type, torch.Tensor.is_inference, *map(attrgetter, ("shape", "dtype", "requires_grad"))


def _same(t):
    return t


@pytest.mark.parametrize(("first", "then"), list(itertools.product(WAYS, WAYS))[:-1])
def test_what_was_switched_in_between(first, then):
    """k and v return what they return when they are called alone then, in kind too."""
    plain, block = pair()
    with WAYS[first]():
        block.q(X)
    with WAYS[then]():
        for found, expected in ((block.k(X), plain.k(X)), (block.v(X), plain.v(X))):
            assert [kind(found) for kind in KINDS] == [kind(expected) for kind in KINDS]


CHANGES = {  # of a layer with an adapter: each may come at any time
    "mode": lambda v: v.train(not v.training),
    "scaling": lambda v: v.scaling.update(default=3.0 - v.scaling["default"]),
    "written": lambda v: v.lora_B["default"].weight.neg_(),
    "its memory": lambda v: setattr(
        v.lora_B["default"].weight, "data", torch.ones(v.out_features, 3)
    ),
    "bias": lambda v: setattr(v.base_layer, "bias", nn.Parameter(torch.ones(v.out_features))),
    "frozen": lambda v: v.lora_A.requires_grad_(not v.lora_A["default"].weight.requires_grad),
}


def test_inference_mode_few_tokens_and_what_a_layer_would_refuse(together, monkeypatch):
    """Tensors of inference mode do not tell that they were written to; errors are a layer's own."""
    plain, fused = pair()
    with torch.inference_mode():
        x = X.clone()
        close([fused(x)], [plain(x)])
        _, made = pair()
        made(X)
    for wrong in (torch.ones(3, 5), X.double()):
        assert said_by(fused, wrong) == said_by(plain, wrong)
    fused.k.weight = Quantised(fused.k.weight, requires_grad=False)
    close(results(fused), results(plain))
    _, fused = pair()
    monkeypatch.setattr(plans, "FEW", X.numel())
    close(results(fused), results(plain))
    assert together == []


HOOKS = {
    "register_forward_pre_hook": lambda m, args: (args[0] * 2,),
    "register_forward_hook": lambda m, args, y: y * 2,
    "register_full_backward_hook": lambda m, dx, dy: (dx[0] * 2,),
    "register_full_backward_pre_hook": lambda m, dy: (dy[0] * 2,),
}


@pytest.mark.parametrize("hook", [*HOOKS, "forward"])
@pytest.mark.parametrize("name", QKV)
def test_hooks_on_a_member(name, hook, together):
    """Also as accelerate's are: a forward that may change the input, or move the weight."""
    plain, fused = pair()
    for block in (plain, fused):
        layer = getattr(block, name)
        if hook in HOOKS:
            getattr(layer, hook)(HOOKS[hook])
        else:
            layer.forward = functools.partial(lambda own, x: own(x * 2), layer.forward)
    close(results(fused), results(plain))
    assert together == ([3] if hook == "register_forward_hook" else [])


def test_hooks_on_every_module(together):
    plain, fused = pair()
    for kind in ("forward_pre", "forward", "full_backward"):
        seen = []
        register = getattr(nn.modules.module, f"register_module_{kind}_hook")
        handle = register(lambda m, *rest, seen=seen: seen.append(m))
        close(results(fused), results(plain))
        handle.remove()
        assert {fused.q, fused.k, fused.v} <= set(seen)
    assert together == []


def test_compiled_and_transformed(together):
    """Plain layers in one graph; what q computes under torch.func is of no use outside."""
    plain, fused = pair()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    close([compiled(X)], [plain(X)])
    torch.func.grad(lambda scale: (fused.q(X) * scale).sum())(torch.ones(()))
    assert fused.k(X).data_ptr() and together == [] and nothing_held()


class Keywords(Block):
    def forward(self, x):
        return self.o(torch.cat([self.q(x=x), self.k(input=x), self.v(x)], -1))


def test_keywords(together):
    """PEFT's layers take x, a frozen sibling what nn.Linear takes."""
    plain, block = pair(Keywords, how={"x": X})
    close(results(block), results(plain))
    assert together == [3]
    kinds = nn.Linear, FrozenLinear, fastlora.LoRALinear
    taken = [inspect.signature(kind.forward).parameters.values() for kind in kinds]
    own, *ours = [[(p.name, p.kind, p.default) for p in each] for each in taken]
    assert ours == [own, own]


ADAPTED = "0.q", "0.v", "1.k", "1.v"


class Caller:
    """Someone who calls the layers of two blocks as it comes, and keeps what they return."""

    def __init__(self, blocks):
        self.blocks, self.kept = blocks, []
        self.xs = [X.clone().requires_grad_(), X[None].clone().requires_grad_(), X.clone()]

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
        changing = [*self.xs, *self.blocks.parameters()]
        found = [t.grad for t in changing if t.grad is not None]
        for t in changing:
            t.grad = None
        return found

    @torch.no_grad()
    def change(self, name, how):
        self.kept.clear()
        if how in CHANGES:
            CHANGES[how](self.blocks.get_submodule(name))
        for t in self.xs if how == "x" else ():
            t.neg_()
        if how == "gradients of x":
            self.xs[2].requires_grad_(not self.xs[2].requires_grad)
        return ()


def steps(rounds):
    """Yield what somebody does next: a method of `Caller` and its arguments."""
    draw = random.Random(0)
    ways = ["", "", *(way for way in WAYS if way != "fake"), "checkpoint", "reentrant"]
    for _ in range(rounds):
        block, way = draw.choice([0, 0, 0, 1]), draw.choice(ways)
        x = draw.choice([0, 0, 1, 0 if way == "reentrant" else 2])
        yield "call", [f"{block}.{name}" for name in draw.choice(["q", "q", "qk", "kq"])], x, way, 0
        what = draw.choice(["call", "backward", "change"])
        if what == "change":
            yield what, draw.choice(ADAPTED), draw.choice([*CHANGES, "x", "x", "gradients of x"])
        elif what == "backward":
            yield what, draw.randrange(8)
        names = [f"{block}.{draw.choice(QKV)}" for _ in range(draw.choice([1, 1, 2]))]
        yield "call", names, x, draw.choice([way, way, "", "no_grad"]), draw.random() < 0.1


def test_any_order(monkeypatch):
    """Whatever comes before it, each call and each backward gives what plain layers give."""
    monkeypatch.setattr(siblings, "_MISSES", 1 << 30)  # else they would soon be plain layers
    blocks = pair(lambda: nn.ModuleList([Block(), Block()]), ADAPTED)
    for each in blocks:
        each[0].v.lora_dropout["default"] = nn.Dropout(1.0)  # any seed drops the same
    callers, last = [Caller(each) for each in blocks], collections.deque(maxlen=12)
    for what, *args in steps(1500):
        last.append((what, *args))
        expected, found = (getattr(caller, what)(*args) for caller in callers)
        rough = 5e-2 if any("autocast" in step for step in last) else 1e-4
        for mine, theirs in zip(found, expected, strict=True):
            assert [kind(mine) for kind in KINDS] == [kind(theirs) for kind in KINDS], last
            assert torch.allclose(mine, theirs, rtol=rough, atol=rough), last
