# SPDX-License-Identifier: Apache-2.0
"""Siblings run as one operator, and as plain layers wherever that could tell."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import gc
import inspect
import itertools
import operator
import pickle
import random
import threading
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import PatchReport, patch_peft, unpatch_peft
from fastlora.layers import siblings
from fastlora.layers.siblings import FrozenLinear
from fastlora.peft.linear import FusedLinear

QKV = ("q", "k", "v")
X = torch.linspace(-1, 1, 18).reshape(3, 6)
GIVEN_UP = "ignore:.*computed beside"


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


def nothing_held():
    return not siblings._held.seats


@pytest.fixture(autouse=True)
def no_leftovers():
    siblings._held.seats = {}
    yield
    siblings._held.seats = {}


# As one operator


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("targets", [["q", "k", "v", "o"], ["q", "v"], ["k"], ["v", "o"]], ids=str)
def test_the_same_outputs_gradients_and_dropout(targets, p, together):
    plain, fused = pair(targets=targets, lora_dropout=p)
    close(results(fused), results(plain))
    assert together == [3] and nothing_held()


def test_one_node_of_the_graph_that_keeps_x_and_the_small_s(together):
    """Autograd adds up no gradients of x; of the wide tensors x alone is kept, and once."""
    _, block = pair(targets=["q", "k", "v"])
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


def test_nothing_follows_a_frozen_sibling():
    """With x and k frozen nothing after k needs a gradient, nor keeps what it would take."""
    _, block = pair(targets=["q"])
    assert [getattr(block, name)(X).requires_grad for name in QKV] == [True, False, False]


def test_few_tokens_run_as_plain_layers(together, few):
    """On a CPU they share nothing that would pay for the way."""
    plain, fused = pair()
    close(results(fused), results(plain))
    assert together == []


@pytest.mark.parametrize("targets", [["q", "v"], ["q", "k", "v", "o"]], ids=str)
def test_under_peft_and_taken_back(targets, together):
    plain, patched = wrapped(targets=targets), wrapped(targets=targets)
    kinds, keys = [type(m) for m in patched.modules()], list(patched.state_dict())
    patch_peft(patched, fuse_siblings=[QKV])
    assert list(patched.state_dict()) == keys
    close(results(patched), results(plain))
    assert together == [3]
    with patched.disable_adapter(), plain.disable_adapter():
        close([patched(X)], [plain(X)])
    for model in (plain, patched):
        model.merge_adapter()
    close([patched(X)], [plain(X)])
    for model in (plain, patched):
        model.unmerge_adapter()
    assert together == [3]
    close(results(patched), results(plain))
    assert together == [3, 3]
    unpatch_peft(patched)
    assert [type(m) for m in patched.modules()] == kinds
    assert not any("sibling" in key for m in patched.modules() for key in vars(m))
    close([patched(X)], [plain(X)])
    assert together == [3, 3]


def test_an_adapter_of_peft_s_for_a_frozen_sibling(together):
    """It keeps its place; several adapters of one layer take part."""
    plain, patched = wrapped(), wrapped()
    patch_peft(patched, fuse_siblings={"x": X})
    assert type(patched.base_model.model.k) is FrozenLinear
    for model in (plain, patched):
        torch.manual_seed(7)
        asked = LoraConfig(r=2, target_modules=["k", "q"], init_lora_weights=False)
        model.add_adapter("other", asked)
        model.base_model.set_adapter(["default", "other"])
    close(results(patched), results(plain))
    k = patched.base_model.model.k
    assert together == [3] and type(k) is FusedLinear and type(k.base_layer) is nn.Linear
    unpatch_peft(patched)
    merged, expected = patched.merge_and_unload(), plain.merge_and_unload()
    close([merged(X)], [expected(X)])


def test_layers_of_our_own(together):
    """`LoRALinear` beside frozen layers, in groups made by hand."""
    blocks = []
    for fuse in (False, True):
        block = Block().requires_grad_(False)
        torch.manual_seed(1)
        for name in ("q", "v"):
            made = fastlora.LoRALinear.from_linear(getattr(block, name), r=3)
            setattr(block, name, made)
            for parameter in made.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter)
        if fuse:
            siblings.make(siblings.find(block, [QKV], [block.q, block.v]), PatchReport([], []))
        blocks.append(block)
    plain, fused = blocks
    close(results(fused), results(plain))
    assert together == [3]
    siblings.separate(fused)
    close(results(fused), results(plain))
    assert together == [3] and type(fused.k) is nn.Linear


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


def test_a_sibling_on_each_side_of_a_checkpoint():
    found = []
    for block in pair():
        x = X.clone().requires_grad_()
        y = block.q(x)
        inside = checkpoint(lambda x, b=block: b.k(x) * b.v(x), x, use_reentrant=False)
        found.append(gradients_of(y.square().sum() + inside.square().sum(), block, x))
    close(*reversed(found))


def test_the_first_of_a_group_begins_anew(together):
    """Two forwards with one x: the second one's outputs are of its own graph."""
    found = []
    for block in pair():
        q = block.q(X)
        again = [getattr(block, name)(X) for name in QKV]
        both = q.square().sum(), sum(y.square().sum() for y in again)
        found.append([grad for loss in both for grad in added(block, loss)])
    close(*reversed(found))
    assert together == [3, 3]


@pytest.mark.parametrize("shape", [(3, 6), (1, 3, 6)], ids=str)
def test_outputs_whose_graph_is_gone(shape):
    """q's backward has freed it; k and v make another."""
    found = []
    for block in pair():
        x = X.clone().reshape(shape).requires_grad_()
        grads = [added(block, getattr(block, name)(x).square().sum()) for name in QKV]
        found.append([*itertools.chain(*grads), x.grad])
    close(*reversed(found))


def fails(x):
    raise KeyError("half way")


def test_an_exception_half_way(together):
    """What it left behind serves nobody, and goes when the next group begins."""
    plain, fused = pair()
    fused.between = fails
    with pytest.raises(KeyError):
        fused(X)
    assert not nothing_held()
    fused.between = nn.functional.relu
    close(results(fused), results(plain))
    assert together == [3, 3] and nothing_held()
    fused.between = fails
    with pytest.raises(KeyError):
        fused(X)
    with torch.no_grad():  # the same tensor again, for a sibling that is not the first one
        for block in (plain, fused):
            block.v.lora_B["default"].weight.add_(1.0)
    close([fused.v(X)], [plain.v(X)])


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


def test_another_tensor_and_members_alone(together):
    """Cross-attention: k and v read what q does not."""
    plain, fused = pair()
    close(results(fused, X * 2), results(plain, X * 2))
    close([fused(X, X * 2)], [plain(X, X * 2)])  # alike in all but what it holds
    plain, fused = pair()
    together.clear()
    close([fused.k(X), fused.v(X)], [plain.k(X), plain.v(X)])
    assert together == []
    close([fused.q(X), fused.q(X), fused.k(X), fused.k(X)], [plain.q(X)] * 2 + [plain.k(X)] * 2)


# Groups that miss


def calls(block, times, **how):
    """Return what is said meanwhile."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(times):
            block(X, **how)
    return [str(each.message) for each in said if each.category is UserWarning]


def test_a_group_that_misses_is_given_up_and_says_so_once(together):
    plain, fused = pair()
    fused.used = plain.used = ("q", "k")
    assert calls(fused, 3) == []
    (said,) = calls(fused, 5)
    assert said.startswith("v: computed beside 'q' and not called with its input, 3 times")
    assert "q, k, v run alone from now on" in said and "fuse_siblings=[('q', 'k')] leaves" in said
    assert together == [3] * 3 and fused.q._siblings is None and nothing_held()
    fused.used = plain.used = QKV
    close(results(fused), results(plain))
    assert together == [3] * 3


def test_a_group_that_seldom_misses_stays(together):
    _, block = pair()
    for _ in range(5):
        block.used = ("q", "k")
        block(X)
        block.used = QKV
        assert calls(block, 9) == []
    assert together == [3] * 50 and block.q._siblings is not None
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


def test_x_written_to_in_between(together):
    plain, fused = pair()
    for block in (plain, fused):
        block.between = lambda x: x.mul_(2.0)
    with torch.no_grad():
        close([fused(X.clone())], [plain(X.clone())])
    assert together == [3]


def test_another_stream(together, monkeypatch):
    """What one stream has computed, or is about to, another one computes itself."""
    current = ["first"]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    plain, fused = pair()
    for block in (plain, fused):
        block.between = lambda x: current.__setitem__(0, "second")
    close(results(fused), results(plain))
    misses = fused.q._siblings.misses
    assert together == [3] and misses > 0
    fused.between = nn.functional.relu  # all on one stream again
    close(results(fused), results(plain))
    assert together == [3, 3] and fused.q._siblings.misses < misses


CHANGES = {
    "eval": lambda block: block.eval(),
    "no adapter": lambda block: block.v.set_adapter([]),
    "merged": lambda block: block.v.merge(),
    "disabled": lambda block: block.v.enable_adapters(False),
    "scaling": lambda block: block.v.scaling.update(default=3.0),
    "B": lambda block: nn.init.ones_(block.v.lora_B["default"].weight),
    "B's memory": lambda block: setattr(block.v.lora_B["default"].weight, "data", torch.ones(4, 3)),
    "weight": lambda block: nn.init.ones_(block.v.base_layer.weight),
    "a new weight": lambda block: setattr(
        block.v.base_layer, "weight", nn.Parameter(torch.ones(4, 6))
    ),
    "a new bias": lambda block: setattr(block.k, "bias", nn.Parameter(torch.ones(4))),
    "a new layer": lambda block: setattr(block, "v", nn.Linear(6, 4)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_in_between(change, together):
    """After q has computed for all, v becomes another layer than it was; and before."""
    plain, fused = pair(lora_dropout=0.5 if change is CHANGES["eval"] else 0.0)
    found = []
    for block in (plain, fused):

        def between(x, block=block):
            torch.manual_seed(9)
            change(block)

        block.between = between
        torch.manual_seed(4)
        with torch.no_grad():
            found.append(block(X))
        block.between = nn.functional.relu
    assert together == [3]
    close(found[:1], found[1:])
    close(results(fused), results(plain))


@pytest.mark.filterwarnings(GIVEN_UP)
def test_gradients_asked_for_in_between():
    """By x, or by an adapter that was frozen."""
    _, block = pair()
    block.requires_grad_(False)
    x = X.clone()
    block.q(x)
    x.requires_grad_()
    assert block.k(x).requires_grad
    x = X.clone()
    block.q(x)
    block.v.requires_grad_(True)
    assert block.v(x).requires_grad
    block.q(x)
    block.k.weight.data = torch.ones(4, 6)
    torch.testing.assert_close(block.k(x), x.sum(1, keepdim=True) + block.k.bias)


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
    """k and v return what they return when they are called alone then, in kind too."""
    plain, block = pair()
    with WAYS[first]():
        block.q(X)
    with WAYS[then]():
        for found, expected in ((block.k(X), plain.k(X)), (block.v(X), plain.v(X))):
            assert [kind(found) for kind in KINDS] == [kind(expected) for kind in KINDS]
    assert together == [3]


# Who looks on


def test_inference_mode(together):
    """Its tensors do not tell whether they were written to, nor do parameters made in it."""
    plain, fused = pair()
    with torch.inference_mode():
        x = X.clone()
        close([fused(x)], [plain(x)])
        assert together == []
        _, made = pair()
        made(X)
    assert together == []


HOOKS = {
    "before": lambda layer: layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "after": lambda layer: layer.register_forward_hook(lambda m, args, y: y * 2),
    "backward": lambda layer: layer.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 2,)),
    "before backward": lambda layer: layer.register_full_backward_pre_hook(
        lambda m, dy: (dy[0] * 2,)
    ),
    "a forward of its own": lambda layer: setattr(
        layer, "forward", functools.partial(_doubled, layer.forward)
    ),
}


def _doubled(forward, x):
    return forward(x * 2)


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("name", QKV)
def test_hooks_on_a_member(name, hook, together):
    """And as accelerate's hooks are: a forward that may change the input, or move the weight."""
    plain, fused = pair()
    for block in (plain, fused):
        hook(getattr(block, name))
    close(results(fused), results(plain))
    assert together == ([3] if hook is HOOKS["after"] else [])


@pytest.mark.parametrize("hook", ["forward_pre", "forward", "full_backward"])
def test_hooks_on_every_module(hook, together):
    plain, fused = pair()
    seen = []
    register = getattr(nn.modules.module, f"register_module_{hook}_hook")
    handle = register(lambda m, *rest: seen.append(m))
    try:
        close(results(fused), results(plain))
    finally:
        handle.remove()
    assert {fused.q, fused.k, fused.v} <= set(seen) and together == []


def test_compiled_and_transformed(together):
    """Plain layers in one graph; what q computes under torch.func is of no use outside."""
    plain, fused = pair()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    close([compiled(X)], [plain(X)])
    one = torch.ones(())
    torch.func.grad(lambda scale: (fused.q(X) * scale).sum())(one)
    assert fused.k(X).data_ptr() and together == [] and nothing_held()


def test_what_a_layer_would_refuse(together):
    """The error is the plain layer's own."""
    plain, fused = pair()
    for wrong in (torch.ones(3, 5), X.double()):
        said = []
        for block in (plain, fused):
            with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
                block(wrong)
            said.append(str(error.value))
        assert said[0] == said[1] and "projections" not in said[1]
    assert together == []


def test_autocast(together):
    plain, fused = pair()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = results(fused), results(plain)
    assert found[0].dtype == torch.bfloat16 and together == [3]
    close(found, expected, 5e-2)


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


# Copies

COPIES = [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))]


@pytest.mark.parametrize("how", COPIES, ids=["deepcopy", "pickle"])
def test_copies_are_siblings_of_their_own(how, together):
    plain, block = pair()
    copied = how(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    close(results(copied), results(plain))
    assert together == [3]


@pytest.mark.parametrize("how", COPIES, ids=["deepcopy", "pickle"])
def test_a_copy_without_its_parent(how, together):
    """A shallow copy shares the groups of a module that has gone since; a layer has none."""
    plain, block = pair()
    alone = how(block.q)
    close([alone(X)], [plain.q(X)])
    assert alone._siblings.members() is None
    assert len(pickle.dumps(alone)) < 1.1 * len(pickle.dumps(plain.q))
    shallow, gone = copy.copy(block), weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None
    copied = how(shallow)
    close(results(copied), results(plain))
    assert together == [] and copied.q._siblings.members() is None
    close(results(how(copied)), results(plain))


def test_replicas_compute_with_their_own_parameters(together):
    """As nn.DataParallel makes them: its copies of k and v are not in the group."""
    plain, fused = pair(targets=["o"])
    fused = copy.deepcopy(fused)
    replica, expected = fused._replicate_for_data_parallel(), plain(X)
    for name in (*QKV, "o"):
        layer = getattr(fused, name)._replicate_for_data_parallel()
        setattr(replica, name, layer)
    for name in QKV:
        for parameter, value in getattr(plain, name).named_parameters():
            setattr(getattr(replica, name), parameter, value)
            nn.init.zeros_(getattr(getattr(fused, name), parameter))
    close([replica(X)], [expected])
    assert together == []


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


def test_any_order(monkeypatch):
    """Whatever comes before it, each call and each backward gives what plain layers give."""
    monkeypatch.setattr(siblings, "_MISSES", 1 << 30)  # else they would soon be plain layers
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
