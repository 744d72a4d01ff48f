# SPDX-License-Identifier: Apache-2.0
"""Siblings run as one operator, and as plain layers wherever that could tell."""

import collections
import contextlib
import copy
import functools
import gc
import inspect
import itertools
import pickle
import random
import threading
import warnings
import weakref
from operator import attrgetter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import patch_peft, unpatch_peft
from fastlora.layers import siblings
from fastlora.layers.siblings import FrozenLinear
from fastlora.operator import plans
from fastlora.peft.linear import FusedLinear

QKV = ("q", "k", "v")
X = torch.linspace(-1, 1, 18).reshape(3, 6)


class Block(nn.Module):
    """Attention's projections, some tokens by themselves, and what a test wants between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(6, n) for n in (8, 4, 4))
        self.o = nn.Linear(16, 6)
        self.between = nn.functional.relu  # a lambda cannot be pickled
        self.used = QKV

    def forward(self, x, other=None):
        y = {"q": self.q(x)}
        self.between(x)
        for name in ("k", "v"):
            if name in self.used:
                y[name] = getattr(self, name)(x if other is None else other)
        parts = [y.get(name, torch.zeros(*x.shape[:-1], 4)) for name in QKV]
        return self.o(torch.cat(parts, -1))


def wrapped(make=Block, targets=("q", "v"), **changes):
    """PEFT's model with adapters that do something."""
    model = make()
    torch.manual_seed(1)
    asked = {"r": 3, "init_lora_weights": False, "target_modules": list(targets), **changes}
    return get_peft_model(model, LoraConfig(**asked)).train()


def pair(make=Block, targets=("q", "v"), how=(QKV,), **changes):
    """The same patched model twice: as plain layers, which drop the same elements, and siblings."""
    plain, fused = (wrapped(make, targets, **changes) for _ in range(2))
    patch_peft(plain)
    patch_peft(fused, fuse_siblings=how)
    return plain.base_model.model, fused.base_model.model


def results(block, *args, seed=2, x=X):
    """Return the output and every gradient."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = block(x, *args)
    return [y, *gradients_of(y.square().sum(), block, x)]


def gradients_of(loss, block, *xs):
    trained = [p for p in block.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, [*xs, *trained], allow_unused=True)


def added(block, loss):
    """Return what a backward adds to the gradients."""
    loss.backward()
    found = [p.grad for p in block.parameters() if p.requires_grad]
    block.zero_grad()
    return found


def close(found, expected, tolerance=1e-4):
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance / 10)


def said_by(model, wrong):
    """Return what a model says of an input that it refuses."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        model(wrong)
    return str(error.value)


def nothing_held():
    return not vars(siblings._held)


@pytest.fixture(autouse=True)
def no_leftovers():
    vars(siblings._held).clear()


# As one operator


CASES = [("qkvo", 0.4), ("qv", 0.0), ("k", 0.4), ("vo", 0.0)]


@pytest.mark.parametrize(("targets", "p"), CASES)
def test_the_same_outputs_gradients_and_dropout(targets, p, together):
    plain, fused = pair(targets=targets, lora_dropout=p)
    close(results(fused), results(plain))
    assert together == [3] and nothing_held()


def test_one_node_of_the_graph_that_keeps_x_and_the_small_s(together):
    """Autograd adds up no gradients of x; of the wide tensors x alone is kept, and once."""
    _, block = pair(targets=QKV)
    held = {t.untyped_storage().data_ptr() for t in block.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in held:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = [getattr(block, name)(x) for name in QKV]
    assert sum(kept.values()) == 4 * (3 * 6 + 3 * 3 * 3)
    assert len({y.grad_fn for y in ys}) == 1 and together == [3]
    _, block = pair(targets=["q"])  # with x and k frozen nothing that follows k is to be kept
    assert [getattr(block, name)(X).requires_grad for name in QKV] == [True, False, False]


def test_under_peft_and_taken_back(together):
    """A frozen sibling that gets an adapter keeps its place; several of one layer take part."""
    plain, patched = wrapped(), wrapped()
    kinds, keys = [type(m) for m in patched.modules()], list(patched.state_dict())
    patch_peft(patched, fuse_siblings={"x": X})
    k = patched.base_model.model.k
    assert list(patched.state_dict()) == keys and type(k) is FrozenLinear
    with patched.disable_adapter(), plain.disable_adapter():
        close([patched(X)], [plain(X)])
    for model in (plain, patched):
        model.merge_adapter()
    close([patched(X)], [plain(X)])
    for model in (plain, patched):
        model.unmerge_adapter()
    assert together == []
    close(results(patched), results(plain))
    assert together == [3]
    copied = copy.deepcopy(patched)
    unpatch_peft(copied)
    assert [type(m) for m in copied.modules()] == kinds
    assert not any("sibling" in key for m in copied.modules() for key in vars(m))
    for model in (plain, patched):
        torch.manual_seed(7)
        asked = LoraConfig(r=2, target_modules=["k", "q"], init_lora_weights=False)
        model.add_adapter("other", asked)
        model.base_model.set_adapter(["default", "other"])
    close(results(patched), results(plain))
    k = patched.base_model.model.k
    assert together == [3, 3] and type(k) is FusedLinear and type(k.base_layer) is nn.Linear


def test_the_latest_patch_says_what_is_together(together):
    """In copies as in the original."""
    model = wrapped()
    for names in (("q", "k"), ("v", "o")):
        patch_peft(model, fuse_siblings=[names])
    for each in (model, copy.deepcopy(model)):
        each(X)
    assert together == []


# When groups are called


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout(reentrant, together):
    """The same elements are dropped when forward runs again; nothing is left over."""
    _, block = pair(lora_dropout=0.4)

    def grads(function):
        torch.manual_seed(2)
        x = X.clone().requires_grad_()
        y = function(x)
        return [y, *added(block, y.square().sum()), x.grad]

    expected = grads(block)
    close(grads(lambda x: checkpoint(block, x, use_reentrant=reentrant)), expected)
    assert together == [3] * 3 and nothing_held()


def test_the_first_of_a_group_begins_anew(together):
    """Two forwards with one x: the second one's outputs are of its own graph."""
    found = []
    for block in pair():
        q = block.q(X)
        both = q.square().sum(), sum(getattr(block, name)(X).square().sum() for name in QKV)
        found.append([grad for loss in both for grad in added(block, loss)])
    close(*reversed(found))
    assert together == [3, 3]


def test_many_threads(together):
    plain, fused = pair()
    inputs = [X + i for i in range(8)]
    expected = [plain(x) for x in inputs]
    wrong, rounds = [], threading.Barrier(8, timeout=60)
    fused.between = lambda x: rounds.wait()  # until every thread holds outputs of its own

    def work(i):
        for _ in range(20):
            y = fused(inputs[i])
            if not torch.allclose(y, expected[i], rtol=1e-4, atol=1e-5) or not nothing_held():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and together == [3] * 160


# Groups that miss


def calls(block, times):
    """Return what is said meanwhile."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(times):
            block(X)
    return [str(each.message) for each in said if each.category is UserWarning]


def test_a_group_that_misses_is_given_up_and_says_so_once(together):
    """Not one that seldom does."""
    plain, fused = pair()
    for _ in range(5):
        fused.used = ("q", "k")
        fused(X)
        fused.used = QKV
        assert calls(fused, 9) == []
    assert together == [3] * 50
    fused.used = ("q", "k")
    assert calls(fused, 3) == []
    (said,) = calls(fused, 5)
    assert said.startswith("v: computed beside 'q' and not called with its input, 3 times")
    assert "q, k, v run alone from now on" in said and "fuse_siblings=[('q', 'k')] leaves" in said
    assert fused.q._siblings is None and nothing_held()
    fused.used = QKV
    close(results(fused), results(plain))
    assert together == [3] * 53
    _, block = pair(targets=["q"])
    block.used = ("q",)
    (said,) = calls(block, 4)  # no two of them are left to be named
    assert said.startswith("k, v: computed beside 'q'") and "fuse_siblings" not in said


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_group_that_misses_in_checkpoints_goes_on(reentrant):
    """Run again for backward it has to draw what it drew, and keep what it kept."""
    _, block = pair(lora_dropout=0.4)
    block.used = ("q", "k")
    always = copy.deepcopy(block)
    always.q._siblings.misses = -(1 << 30)
    with pytest.warns(UserWarning, match="^v: computed beside 'q'") as said:
        for seed in range(4):
            found = []
            for each in (block, always):
                torch.manual_seed(seed)
                x = y = X.clone().requires_grad_()
                for _ in range(3):  # the same block, as some models have it
                    y = checkpoint(each, y, use_reentrant=reentrant) if each is block else each(y)
                found.append([*added(each, y.square().sum()), x.grad])
            close(*found)
    assert len(said) == 1 and block.q._siblings is not None
    assert calls(block, 5) == [] and block.q._siblings is None


# What may change in between


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


# Who looks on


class Quantised(nn.Parameter):
    """As torchao's are: what it computes is its own."""


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


# Copies

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda b: pickle.loads(pickle.dumps(b))}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_copies_are_siblings_of_their_own(how, together):
    """But not of a layer alone, nor of what shares the groups of a module that has gone since."""
    plain, block = pair()
    copied, alone, shallow, gone = how(block), how(block.q), copy.copy(block), weakref.ref(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.neg_()
    close(results(copied), results(plain))
    close([alone(X)], [plain.q(X)])
    assert together == [3] and alone._siblings.members() is None
    assert len(pickle.dumps(alone)) < 1.1 * len(pickle.dumps(plain.q))
    del block
    gc.collect()
    assert gone() is None
    copied = how(how(shallow))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.neg_()
    close(results(copied), results(plain))
    assert together == [3] and copied.q._siblings.members() is None


def test_replicas_compute_with_their_own_parameters(together):
    """As nn.DataParallel makes them: its copies of k and v are not in the group."""
    plain, fused = pair(targets=["o"])
    fused = copy.deepcopy(fused)
    replica, expected = fused._replicate_for_data_parallel(), plain(X)
    for name in (*QKV, "o"):
        setattr(replica, name, getattr(fused, name)._replicate_for_data_parallel())
    for name in QKV:
        for parameter, value in getattr(plain, name).named_parameters():
            setattr(getattr(replica, name), parameter, value)
            nn.init.zeros_(getattr(getattr(fused, name), parameter))
    close([replica(X)], [expected])
    assert together == []


# Any order

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
