# SPDX-License-Identifier: Apache-2.0
"""Siblings run as one operator, and as plain layers wherever that could tell."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from test_stacks import ATTENTION, MODELS, loss_of
from tiny_models import bert, bits, llama, same
from torch import nn
from torch.nn.parallel.replicate import replicate
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoRAConfig, inject, patch_peft, unpatch_peft
from fastlora.layers import siblings
from fastlora.layers.siblings import FrozenLinear
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
        self.between = lambda x: x
        self.used = QKV

    def forward(self, x, other=None):
        y = {"q": self.q(x)}
        x = self.between(x)
        for name in ("k", "v"):
            if name in self.used:
                y[name] = getattr(self, name)(x if other is None else other)
        parts = [y.get(name, torch.zeros(*x.shape[:-1], 4)) for name in QKV]
        return self.o(torch.cat(parts, -1))


def config(**changes):
    return LoRAConfig(**{"r": 3, "target_modules": "all-linear", **changes})


def pair(how=(QKV,), **changes):
    """The same block twice with adapters that do something: as plain layers, and as siblings."""
    blocks = []
    for fuse_siblings in (False, how):
        block = Block()
        torch.manual_seed(1)
        inject(block, config(init_lora_weights=False, **changes), fuse_siblings=fuse_siblings)
        blocks.append(block)
    return blocks


def results(block, *args, seed=2, **kwargs):
    """Return the output and every gradient."""
    torch.manual_seed(seed)
    x = X.clone().requires_grad_()
    y = block(x, *args, **kwargs)
    trained = [p for p in block.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), [x, *trained], allow_unused=True)
    return [y, *grads]


def close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def nothing_held():
    return getattr(siblings._slot, "held", None) is None


@pytest.fixture(autouse=True)
def no_leftovers():
    siblings._slot.held = None
    yield
    siblings._slot.held = None


# As one operator


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("targets", [["q", "k", "v", "o"], ["q", "v"], ["k"], ["v", "o"]])
def test_the_same_outputs_gradients_and_dropout(targets, p, together):
    plain, fused = pair(target_modules=targets, lora_dropout=p)
    close(results(fused), results(plain))
    assert together == [3] and nothing_held()


@pytest.mark.parametrize("how", [{"x": X}, X, [QKV], [["q", "k", "v"]]], ids=str)
def test_ways_to_say_which(how, together):
    plain, fused = pair(how=how)
    close(results(fused), results(plain))
    assert together == [3]


def test_in_the_report():
    block = Block()
    report = inject(block, config(), fuse_siblings={"x": X})
    assert report.siblings == [("", QKV)]
    assert "  siblings: q, k, v\n" in f"{report}\n"
    model = llama()
    report = inject(model, config(target_modules=["q_proj", "v_proj"]), fuse_siblings=True)
    names = ("q_proj", "k_proj", "v_proj")
    assert report.siblings == [(f"model.layers.{i}.self_attn", names) for i in range(2)]
    assert "  siblings: q_proj, k_proj, v_proj x2\n" in f"{report}\n"


def test_finding_them_leaves_the_model_as_it_was():
    """No mode, no random number, no hook and no gradient is left behind."""
    model = llama()
    model.model.layers[0].train()
    before, state = bits(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="no module has linear layers named"):
        inject(model, config(), fuse_siblings=[("q_proj", "nothing")])
    from fastlora.layers.sibling_search import find

    found = find(model, True, [model.model.layers[0].self_attn.q_proj])
    assert [group.names for group in found] == [("q_proj", "k_proj", "v_proj")]
    assert same(before, bits(model)) and torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_operator_is_one_node_of_the_graph(together):
    """Autograd adds up no gradients of x: all three outputs come from one function."""
    _, block = pair()
    x = X.clone().requires_grad_()
    ys = [getattr(block, name)(x) for name in QKV]
    assert len({y.grad_fn for y in ys}) == 1 and together == [3]


def test_only_x_and_the_small_s_are_kept():
    """Bytes kept for backward: x once, and s, beside what the model holds anyway."""
    _, block = pair()
    held = {t.untyped_storage().data_ptr() for t in block.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in held:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = [getattr(block, name)(x) for name in QKV]
    assert sum(kept.values()) == 4 * (3 * 6 + 3 * 3 * 3) and len(ys) == 3


# Whole models


EXAMPLES = {
    "ViT": {"pixel_values": torch.zeros(1, 3, 8, 8)},
    "diffusion": {
        "hidden_states": torch.zeros(1, 4, 8, 8),
        "timestep": torch.tensor([1]),
        "class_labels": torch.tensor([1]),
    },
}
# GPT-2 and Phi-3 have one layer each for what others have siblings for.
ALONE = ("GPT-2", "Phi3")


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("name", MODELS)
def test_models(name, together):
    """The plain layers' losses and gradients: in float64, where rounding hides nothing."""
    targets = ATTENTION if name == "diffusion" else "all-linear"
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = []
        for how in (EXAMPLES.get(name, True), False):
            model = MODELS[name]()
            torch.manual_seed(3)
            asked = config(target_modules=targets, init_lora_weights=False)
            inject(model, asked, fuse_siblings=how)
            found.append(step(model.to(dtype), name))
        (loss, grads), (plain_loss, plain_grads) = found
        assert loss.item() == pytest.approx(plain_loss.item(), abs=10 * tolerance)
        assert (grads - plain_grads).norm() <= tolerance * plain_grads.norm()
    assert bool(together) != (name in ALONE)


def step(model, name):
    """Return the loss of a step, and every gradient in one vector; in the model's own dtype."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = []
    handle = model.register_forward_hook(lambda module, args, y: kept.append(y))
    loss = loss_of(AsDouble(model) if trained[0].dtype == torch.float64 else model, name)
    handle.remove()
    if name != "diffusion":  # transformers computes losses in float32
        logits = kept[0].logits
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype)
        loss = (logits.flatten() * weights).sum()
    grads = torch.autograd.grad(loss, trained)
    return loss.detach(), torch.cat([grad.flatten() for grad in grads])


class AsDouble:
    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        args = [a.double() if a.is_floating_point() else a for a in args]
        kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
        return self.model(*args, **kwargs)


# What a group may not assume


def checkpointed(block, reentrant):
    return lambda x: checkpoint(block, x, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout(reentrant, together):
    """The same elements are dropped when forward runs again; nothing is left over."""
    _, block = pair(lora_dropout=0.4)
    expected = block_grads(block, block)
    assert together == [3]
    close(block_grads(block, checkpointed(block, reentrant)), expected)
    assert together == [3] * 3 and nothing_held()


def block_grads(block, function):
    torch.manual_seed(2)
    x = X.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()  # reentrant checkpointing knows no grad()
    found = [y, x.grad, *(p.grad for p in block.parameters() if p.requires_grad)]
    for parameter in block.parameters():
        parameter.grad = None
    return found


def test_several_forwards_before_a_backward(together):
    plain, fused = pair()
    found = []
    for block in (plain, fused):
        xs = [X.clone().requires_grad_(), (X * 2).requires_grad_()]
        ys = [block(xs[0]), block(xs[1]), block(xs[0])]
        trained = [p for p in block.parameters() if p.requires_grad]
        loss = sum(y.square().sum() * (i + 1) for i, y in enumerate(ys))
        found.append([*ys, *torch.autograd.grad(loss, [*xs, *trained])])
    close(*reversed(found))
    assert together == [3, 3, 3] and nothing_held()


def test_an_exception_half_way(together):
    """What it left behind serves nobody, and goes when the next group begins."""
    plain, fused = pair()

    def fails(x):
        raise KeyError("half way")

    fused.between = fails
    with pytest.raises(KeyError):
        fused(X)
    assert not nothing_held()
    fused.between = lambda x: x
    close(results(fused), results(plain))
    assert together == [3, 3] and nothing_held()
    # The same tensor again, for a sibling that is not the first one.
    fused.between = fails
    with pytest.raises(KeyError):
        fused(X)
    with torch.no_grad():
        fused.v.lora_B["default"].add_(1.0)
        plain.v.lora_B["default"].add_(1.0)
    close([fused.v(X)], [plain.v(X)])


def test_many_threads(together):
    plain, fused = pair()
    inputs = [X + i for i in range(8)]
    expected = [plain(x) for x in inputs]
    wrong, rounds = [], threading.Barrier(8, timeout=60)

    def between(x):
        rounds.wait()  # until every thread holds outputs of its own
        return x

    fused.between = between

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


def test_a_member_that_is_skipped(together):
    """Right all the same; that its output was made for nothing is said once."""
    plain, fused = pair()
    plain.used = fused.used = ("q", "k")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            close(results(fused), results(plain))
    with pytest.warns(UserWarning, match=r"^v: computed beside 'q' and not called .* 3 times"):
        close(results(fused), results(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(results(fused), results(plain))
    assert together == [3] * 5


def test_another_tensor(together):
    """Cross-attention: k and v read what q does not."""
    plain, fused = pair()
    close(results(fused, X * 2), results(plain, X * 2))
    close([fused(X, X * 2)], [plain(X, X * 2)])  # alike in all but what it holds
    equal = X.clone()
    close(results(fused, equal), results(plain, equal))


def test_a_member_alone(together):
    plain, fused = pair()
    close([fused.k(X), fused.v(X)], [plain.k(X), plain.v(X)])
    assert together == []
    close([fused.q(X), fused.q(X), fused.k(X), fused.k(X)], [plain.q(X)] * 2 + [plain.k(X)] * 2)


def test_x_written_to_in_between(together):
    plain, fused = pair()
    for block in (plain, fused):
        block.between = lambda x: x.mul_(2.0)
    with torch.no_grad():
        expected, found = plain(X.clone()), fused(X.clone())
    close([found], [expected])
    assert together == [3]


def test_another_stream(together, monkeypatch):
    """What one stream has computed, or is about to, another one computes itself."""
    current = ["first"]
    monkeypatch.setattr(siblings, "_stream", lambda x: current[0])
    plain, fused = pair()
    for block in (plain, fused):

        def switched(x):
            current[0] = "second"
            return x

        block.between = switched
    close(results(fused), results(plain))
    current[0] = "first"
    misses = fused.q._siblings.misses
    close(results(fused), results(plain))
    assert together == [3, 3] and fused.q._siblings.misses > misses > 0
    fused.between, current[0] = (lambda x: x), "second"
    misses = fused.q._siblings.misses
    results(fused)
    assert fused.q._siblings.misses == misses  # all on one stream again


CHANGES = {
    "eval": lambda block: block.eval(),
    "no adapter": lambda block: block.v.set_adapter([]),
    "merged": lambda block: block.v.merge(),
    "disabled": lambda block: setattr(block.v, "disable_adapters", True),
    "scaling": lambda block: block.v.scaling.update(default=3.0),
    "B": lambda block: nn.init.ones_(block.v.lora_B["default"]),
    "B's memory": lambda block: setattr(block.v.lora_B["default"], "data", torch.ones(4, 3)),
    "weight": lambda block: nn.init.ones_(block.v.weight),
    "a new weight": lambda block: setattr(block.v, "weight", nn.Parameter(torch.ones(4, 6))),
    "a new layer": lambda block: setattr(block, "v", nn.Linear(6, 4)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_in_between(change, together):
    """After q has computed for all, v becomes another layer than it was."""
    plain, fused = pair(lora_dropout=0.5 if change is CHANGES["eval"] else 0.0)
    found = []
    for block in (plain, fused):

        def between(x, block=block):
            torch.manual_seed(9)
            change(block)
            return x

        block.between = between
        torch.manual_seed(4)
        with torch.no_grad():
            found.append(block(X))
    close(found[:1], found[1:])
    assert together == [3]


def test_gradients_asked_for_in_between(together):
    """By x, or by an adapter that was frozen."""
    _, block = pair(target_modules=["q", "v"])
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


def test_nothing_follows_a_frozen_sibling():
    """With x and k frozen nothing after k needs a gradient, nor keeps what it would take."""
    _, block = pair(target_modules=["q"])
    found = [getattr(block, name)(X).requires_grad for name in QKV]
    assert found == [True, False, False]


def test_a_sibling_on_each_side_of_a_checkpoint(together):
    plain, fused = pair()
    found = []
    for block in (plain, fused):
        x = X.clone().requires_grad_()
        y = block.q(x)
        inside = checkpoint(lambda x, b=block: b.k(x) * b.v(x), x, use_reentrant=False)
        trained = [p for p in block.parameters() if p.requires_grad]
        loss = y.square().sum() + inside.square().sum()
        found.append(torch.autograd.grad(loss, [x, *trained], allow_unused=True))
    close(*found)


def test_a_sibling_trained_in_full():
    model = Block()
    asked = config(target_modules=["q", "v"], modules_to_save=["k"])
    report = inject(model, asked, fuse_siblings={"x": X})
    assert report.siblings == [("", ("q", "v"))]
    results(model)


def test_one_layer_under_two_names():
    model = Block()
    model.k = model.q
    with pytest.raises(ValueError, match="no module has linear layers named"):
        inject(model, config(), fuse_siblings=[("q", "k")])


def test_a_model_of_inference_mode():
    with torch.inference_mode():
        model = Block()
        inject(model, config(), fuse_siblings={"x": X})
        model(X.clone())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_before(change):
    plain, fused = pair(lora_dropout=0.5)
    for block in (plain, fused):
        torch.manual_seed(9)
        change(block)
    close(results(fused), results(plain))


def test_gradients_switched_on_in_between(together):
    """What q has computed without a graph has no gradient to give."""
    _, block = pair()
    with torch.no_grad():
        block.q(X)
    y = block.v(X)
    assert y.requires_grad
    block.q(X)
    with torch.no_grad():
        assert not block.v(X).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert block.k(X).dtype == torch.bfloat16


def test_inference_mode(together):
    """Its tensors do not tell whether they were written to."""
    plain, fused = pair()
    with torch.inference_mode():
        x = X.clone()
        close([fused(x)], [plain(x)])
    assert together == []


HOOKS = {
    "before": lambda layer: layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "after": lambda layer: layer.register_forward_hook(lambda m, args, y: y * 2),
    "backward": lambda layer: layer.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 2,)),
    "before backward": lambda layer: layer.register_full_backward_pre_hook(
        lambda m, dy: (dy[0] * 2,)
    ),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("name", QKV)
def test_hooks_on_a_member(name, hook, together):
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


def test_a_forward_of_its_own(together):
    """As accelerate's hooks are: it may change the input, or where the weight lies."""
    plain, fused = pair()
    for block in (plain, fused):
        own = block.k.forward
        block.k.forward = lambda x, own=own: own(x * 2)
    close(results(fused), results(plain))
    assert together == []


def test_compiled(together):
    """Plain layers in one graph."""
    plain, fused = pair()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    close([compiled(X)], [plain(X)])
    assert together == [] and nothing_held()


def test_what_a_layer_would_refuse(together):
    """The error is the plain layer's own."""
    plain, fused = pair()
    for wrong in (torch.ones(3, 5), X.double()):
        said = []
        for block in (plain, fused):
            with pytest.raises((ValueError, TypeError)) as error:
                block(wrong)
            said.append(str(error.value))
        assert said[0] == said[1] and "projections" not in said[1]
    assert together == []


def test_autocast(together):
    plain, fused = pair()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = results(fused), results(plain)
    assert found[0].dtype == torch.bfloat16 and together == [3]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=5e-2)


def test_several_adapters(together):
    plain, fused = pair()
    for block in (plain, fused):
        torch.manual_seed(6)
        inject(block, config(r=2, init_lora_weights=False), "other")
        fastlora.set_adapter(block, ["default", "other"])
    close(results(fused), results(plain))
    assert together == [3]


def test_merged_and_disabled(together):
    plain, fused = pair()
    for block in (plain, fused):
        with fastlora.disable_adapters(block):
            block(X)
    assert together == []
    for block in (plain, fused):
        fastlora.merge(block)
    close([fused(X)], [plain(X)])
    for block in (plain, fused):
        fastlora.unmerge(block)
    close(results(fused), results(plain))
    assert together == [3]


def test_an_adapter_for_a_frozen_sibling(together):
    """k becomes a LoRA layer later, and keeps its place."""
    plain, fused = pair(target_modules=["q", "v"])
    assert type(fused.k) is FrozenLinear
    for block in (plain, fused):
        torch.manual_seed(6)
        inject(block, config(target_modules=["k"], init_lora_weights=False), "other")
        fastlora.set_adapter(block, ["default", "other"])
    close(results(fused), results(plain))
    assert together == [3] and type(fused.k) is fastlora.LoRALinear


# Copies


@pytest.mark.parametrize("how", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_are_siblings_of_their_own(how, together):
    _, block = pair(target_modules=["q", "v"])
    block.between = torch.nn.functional.relu  # a lambda cannot be pickled
    copied = how(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    plain, _ = pair(target_modules=["q", "v"])
    plain.between = block.between
    close(results(copied), results(plain))
    assert together == [3]


def test_a_copy_of_one_member_brings_nobody_along(together):
    plain, fused = pair()
    alone = copy.deepcopy(fused.q)
    close([alone(X)], [plain.q(X)])
    assert together == [] and alone._siblings.members() is None
    assert len(pickle.dumps(alone)) < 1.1 * len(pickle.dumps(plain.q))


def test_replicas_compute_with_their_own_parameters(together, monkeypatch):
    """As nn.DataParallel makes them: its copies of k and v are not in the group."""
    plain, fused = pair()
    copied = copy.deepcopy(fused)
    replica = fused._replicate_for_data_parallel()
    for name in (*QKV, "o"):
        layer = getattr(fused, name)._replicate_for_data_parallel()
        setattr(replica, name, layer)
        for parameter, value in getattr(copied, name).named_parameters(recurse=False):
            setattr(layer, parameter, value)
        layer.lora_A, layer.lora_B = getattr(copied, name).lora_A, getattr(copied, name).lora_B
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
        close([replica(X)], [plain(X)])
    assert replicate and together == []


def test_a_model_that_is_dropped_is_freed():
    _, block = pair()
    block(X)
    import weakref

    gone = weakref.ref(block.v)
    del block
    gc.collect()
    assert gone() is None


# Under PEFT


def wrapped(**changes):
    asked = {"r": 3, "target_modules": ["q", "v"], "init_lora_weights": False, **changes}
    torch.manual_seed(1)
    return get_peft_model(Block(), LoraConfig(**asked))


@pytest.mark.parametrize("targets", [["q", "v"], ["q", "k", "v", "o"]])
def test_under_peft(targets, together):
    plain, patched = wrapped(target_modules=targets), wrapped(target_modules=targets)
    kinds, keys = [type(m) for m in patched.modules()], list(patched.state_dict())
    report = patch_peft(patched, fuse_siblings=[QKV])
    assert report.siblings == [("base_model.model", QKV)] and "siblings: q, k, v" in str(report)
    assert list(patched.state_dict()) == keys
    close(results(patched), results(plain))
    assert together == [3]
    with patched.disable_adapter(), plain.disable_adapter():
        close([patched(X)], [plain(X)])
    plain.merge_adapter()
    patched.merge_adapter()
    close([patched(X)], [plain(X)])
    patched.unmerge_adapter()
    plain.unmerge_adapter()
    assert together == [3]
    unpatch_peft(patched)
    assert [type(m) for m in patched.modules()] == kinds
    assert not any("sibling" in key for m in patched.modules() for key in vars(m))
    close([patched(X)], [plain(X)])
    assert together == [3]


def test_an_adapter_of_peft_s_for_a_frozen_sibling(together):
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
    assert type(patched.base_model.model.k) is lora.Linear
    merged, expected = patched.merge_and_unload(), plain.merge_and_unload()
    close([merged(X)], [expected(X)])


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("copied", [False, True])
def test_unloaded_models_are_plain(how, copied):
    """No class and no group of ours is left, also of a gated MLP that only down had made one."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        asked = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        models.append(get_peft_model(llama(), asked))
    plain, patched = models
    report = patch_peft(patched, fuse_siblings=True)
    assert report.siblings and report.gated_mlps
    if copied:
        patched = copy.deepcopy(patched)
    plain, patched = (getattr(model, how)() for model in (plain, patched))
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in patched.modules()] == [vars(m).keys() for m in plain.modules()]
    close([loss_of(patched)], [loss_of(plain)])
    with pytest.raises(ValueError, match=r"holds no LoRALinear .* what was merged runs as a plain"):
        fastlora.explain(patched)


def test_a_trained_model_of_transformers(together):
    """The input that it brings along is found through PEFT's wrapper."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    report = patch_peft(model, fuse_siblings=True)
    assert [names for _, names in report.siblings] == [("q_proj", "k_proj", "v_proj")] * 2
    assert [names for _, names in report.gated_mlps] == [("gate_proj", "up_proj", "down_proj")] * 2
    loss_of(model).backward()
    assert together == [3] * 2


# What bad input gets


class Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)

    def forward(self, x):
        return self.q(x)


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        (True, ValueError, "Block brings no input along to find siblings with; give one"),
        ({"y": X}, ValueError, "Block raised TypeError on the example input .*'y'"),
        (torch.ones(2, 5), ValueError, "Block raised RuntimeError on the example input"),
        ([("q", "w")], ValueError, r"no module has linear layers named \('q', 'w'\)"),
        ([("q",)], ValueError, "a group is two names or more"),
        ([("q", "k"), ("k", "v")], ValueError, "each in one group only"),
        ("q", TypeError, "must be True, an example input .* got 'q'"),
        (3, TypeError, "must be True, an example input .* got 3"),
        ([], TypeError, r"must be True, an example input .* got \[\]"),
    ],
    ids=str,
)
def test_wrong_ways_to_say_which(how, kind, said):
    block = Block()
    before = bits(block)
    with pytest.raises(kind, match=said):
        inject(block, config(), fuse_siblings=how)
    assert same(before, bits(block))
    model = wrapped()
    before = bits(model)
    with pytest.raises(kind, match=said.replace("Block", ".*")):
        patch_peft(model, fuse_siblings=how)
    assert same(before, bits(model))


def test_no_siblings_are_no_error(together):
    model = nn.Sequential(Empty())
    assert inject(model, config(), fuse_siblings=X).siblings == []
    assert bert().dummy_inputs  # what transformers brings along
