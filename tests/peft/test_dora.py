# SPDX-License-Identifier: Apache-2.0
"""DoRA under PEFT, fused: its outputs, its gradients, and never a norm of what has changed."""

import copy
import pickle
import weakref

import peft.tuners.lora.dora as dora_of_peft
import pytest
import test_quantised
import torch
from peft import get_peft_model
from peft_models import X, add, layers, same_kinds, wrapped
from peft_models import config as dora_config
from results import apart, results
from tiny_models import gpt2, llama, mlp, tokens, train_a_little
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastlora import load_adapter, patch_peft, save_adapter, unpatch_peft
from fastlora.layers import dora
from fastlora.operator import plans, weights
from fastlora.operator.dropout import keep_mask

MAKE = {"linear": mlp, "no bias": lambda: mlp(bias=False), "Conv1D": gpt2}
TARGETS = {"Conv1D": ["c_attn", "c_fc"]}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
WIDE = torch.linspace(-1, 1, 2 * 24 * 64).reshape(2, 24, 64).sin()  # of test_quantised's block


class Mask(nn.Module):
    """Drops what the fused layers do with a seed."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = keep_mask(torch.tensor([7]), range(x.shape[:-1].numel()), x.shape[-1], self.p)
        return x * keep.view(x.shape) / (1 - self.p)


def made(kind="linear", dtype=torch.float64, **changes):
    """PEFT's model with magnitudes that are not those of the start."""
    names = {"target_modules": TARGETS.get(kind, ["0", "2"])}
    torch.manual_seed(0)
    return wrapped(MAKE[kind]().to(dtype), use_dora=True, **{**names, **changes})


def block(kind="dense", dtype=torch.float32, **changes):
    return train_a_little(test_quantised.model(kind, dtype, use_dora=True, **changes)).train()


def given(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def grads(model, x):
    model.zero_grad()
    given(model, x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", MAKE)
def test_as_peft(kind, p, few, fused, monkeypatch, request):
    if few:
        request.getfixturevalue("few")
    monkeypatch.setattr("fastlora.functional.new_seed", lambda _: torch.tensor([7]))
    plain = made(kind, lora_dropout=p)
    model = copy.deepcopy(plain)
    for layer in layers(plain) if p else ():
        layer.lora_dropout["default"] = Mask(p)
    assert patch_peft(model).not_fused == []
    for training in (True, False):
        for each in (plain, model):
            each.train(training)
            for module in each.modules():  # of the model itself
                if type(module) is nn.Dropout and module.p == 0.1:
                    module.p = 0.0
        x = tokens() if kind == "Conv1D" else X.double()
        torch.testing.assert_close(given(model, x), given(plain, x), **EXACT)
        found, right = grads(model, x), grads(plain, x)
        assert found.keys() == right.keys() and any("magnitude" in name for name in right)
        torch.testing.assert_close(found, right, **EXACT)
    assert len(fused) == 4 * len(layers(model))
    unpatch_peft(model)
    same_kinds(model, made(kind, lora_dropout=p))


def test_dropout_is_by_the_layer_s_mode():
    """As in PEFT: whatever the mode of its dropout."""
    plain = made(lora_dropout=0.4).eval()
    for layer in layers(plain):
        layer.lora_dropout.train()
    model = copy.deepcopy(plain)
    patch_peft(model)
    torch.testing.assert_close(model(X.double()), plain(X.double()), **EXACT)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_the_frozen_layer_at_the_start(adapter, p, few, request):
    """To the bit wherever PEFT's is; also where a bias would be rounded twice."""
    if few:
        request.getfixturevalue("few")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(torch.bfloat16)
    nn.init.normal_(model[0].bias)
    changes = {"target_modules": ["0"], "use_dora": True, "lora_dropout": p}
    config = dora_config(**changes)
    plain = get_peft_model(model, config, autocast_adapter_dtype=adapter == torch.float32)
    if adapter == torch.float32:  # PEFT has rounded it
        layer = layers(plain)[0]
        norms = torch.linalg.norm(layer.base_layer.weight.float(), dim=1)
        layer.lora_magnitude_vector["default"].weight.data = norms.data
    x = torch.randn(300, 64, dtype=torch.bfloat16)
    with plain.disable_adapter():
        frozen = plain(x)
    assert torch.equal(plain.train()(x), frozen)
    patch_peft(plain)
    assert torch.equal(plain(x), frozen)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_no_further_from_the_truth_than_peft(adapter):
    ours, theirs, x = [], [], WIDE.bfloat16()
    for seed in range(4):
        model = test_quantised.model("dense", torch.bfloat16, seed, use_dora=True)
        train_a_little(model)
        if adapter == torch.bfloat16:
            for layer in layers(model):
                for own in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                    own.to(adapter)
        right = results(copy.deepcopy(model).double(), x.double())
        theirs.append(apart(results(model, x), right))
        patch_peft(model, fuse_siblings=[("q", "k", "v"), ("gate", "up")])
        ours.append(apart(results(model, x), right))
    ours, theirs = (torch.tensor(each).square().mean(0).sqrt() for each in (ours, theirs))
    assert (ours < 1.7 * theirs).all() and ours.sum() < 1.1 * theirs.sum(), ours / theirs


def test_siblings_and_a_gated_mlp(fused, together):
    model = block(dtype=torch.float64)
    right = results(model, WIDE.double())
    report = patch_peft(model, fuse_siblings=[("q", "k", "v"), ("gate", "up")])
    assert len(report.gated_mlps) == 1
    assert max(apart(results(model, WIDE.double()), right)) < 1e-12
    assert together == [3] and fused == []


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq"])
def test_a_quantised_base(kind, p, fused, monkeypatch):
    """In evaluation too. PEFT itself has no dense weight of int8 on a CPU."""
    monkeypatch.setattr("fastlora.functional.new_seed", lambda _: torch.tensor([7]))
    model, plain = (block(kind, lora_dropout=p) for _ in range(2))
    for layer in layers(plain):
        if p:
            layer.lora_dropout["default"] = Mask(p)
        if kind == "int8":
            base = layer.base_layer
            dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            dense.weight.data = weights.quantised(base.weight, torch.float32, base).dense()
            dense.bias, layer.base_layer = base.bias, dense.requires_grad_(False)
    assert patch_peft(model).not_fused == []
    for training in (True, False):
        found, right = (results(each.train(training), WIDE) for each in (model, plain))
        assert max(apart(found, right)) < 2e-6
        with torch.no_grad():
            assert apart([model(WIDE)], [right[0]])[0] < 2e-6
    assert len(fused) == 4 * 6


def test_autocast(fused):
    plain = made(dtype=torch.float32)
    model = copy.deepcopy(plain)
    patch_peft(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, right = model(X), plain(X)
    assert y.dtype == right.dtype == torch.bfloat16 and len(fused) == 2
    exact = copy.deepcopy(plain).double()
    wanted = [[p for p in m.parameters() if p.requires_grad] for m in (model, plain, exact)]
    found, theirs, right = (
        [y.detach(), *torch.autograd.grad(y.float().square().mean(), of)]
        for y, of in zip((y, right, exact(X.double())), wanted, strict=True)
    )
    assert sum(apart(found, right)) < 1.1 * sum(apart(theirs, right))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    model, x = made(lora_dropout=0.3).train(), X.double().requires_grad_()
    patch_peft(model)
    torch.manual_seed(1)
    right = torch.autograd.grad(model(x).square().sum(), x)
    torch.manual_seed(1)
    y = checkpoint(model, x, use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, right[0], **EXACT)


def test_training_as_peft_does():
    """Fifty steps of a decoder: losses and what is trained."""
    found = []
    for fuse in (False, True):
        model = wrapped(llama().double(), use_dora=True, target_modules="all-linear")
        if fuse:
            assert patch_peft(model, fuse_siblings=True).not_fused == []
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
        losses = []
        for _ in range(50):
            loss = model(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        found.append((torch.stack(losses), trained))
    (losses, trained), right = found[1], found[0]
    torch.testing.assert_close(losses, right[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(trained, right[1], rtol=1e-7, atol=1e-7)
    assert losses[-1] < 0.8 * losses[0]


def test_compiled_in_one_graph():
    model = made(dtype=torch.float32, lora_dropout=0.3)
    patch_peft(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for training in (True, False):
        model.train(training)
        torch.manual_seed(1)
        right = grads(model, X)
        torch.manual_seed(1)
        found = grads(compiled, X)
        torch.testing.assert_close(list(found.values()), list(right.values()))
    assert counter.frame_count == 2


def changed(write):
    """A change of one of PEFT's layers between two evaluations."""

    def change(model):
        with torch.no_grad():
            write(layers(model)[0])

    return change


def another(weight):
    weight.data = weight * 2


def loaded(model):
    state = {n: t + 0.1 for n, t in model.state_dict().items() if "lora_" in n}
    model.load_state_dict(state, strict=False)


def merged(model):
    """And unmerged: the weight is another by what that rounds."""
    model.merge_adapter()
    model.unmerge_adapter()


def trained_unseen(model):
    """As by an optimizer of which PyTorch knows nothing."""
    mode = model.training
    model.train()
    layers(model)[0].lora_A["default"].weight.data.mul_(2.0)
    model.train(mode)


CHANGES = {
    "lora_A": changed(lambda layer: layer.lora_A["default"].weight.mul_(2)),
    "lora_B": changed(lambda layer: layer.lora_B["default"].weight.mul_(2)),
    "magnitude": changed(lambda layer: layer.lora_magnitude_vector["default"].weight.mul_(2)),
    "weight": changed(lambda layer: layer.base_layer.weight.mul_(2)),
    "another weight": changed(lambda layer: another(layer.base_layer.weight)),
    "scaling": changed(lambda layer: layer.scale_layer(0.5)),
    "loading": loaded,
    "merging": merged,
    "training": trained_unseen,
    "another dtype": lambda model: model.float().double(),
    "another adapter": lambda model: (add(model, use_dora=True), model.set_adapter("other")),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_no_norm_of_what_has_changed(change, training):
    plain = made()
    model = copy.deepcopy(plain)
    patch_peft(model)
    for each in (plain, model):
        each.double().train(training)
        each(X.double())
        CHANGES[change](each)
    if change not in ("merging", "another dtype"):
        assert not torch.allclose(plain(X.double()), made()(X.double()))
    torch.testing.assert_close(model(X.double()), plain(X.double()), **EXACT)


def test_memory_that_is_used_again():
    """By another weight, of which nothing else is new."""
    model = made(target_modules=["0"]).eval()
    patch_peft(model)
    base, memory = layers(model)[0].base_layer, bytearray(8 * 8 * 6)

    def take(values):
        t = torch.frombuffer(memory, dtype=torch.float64).view(8, 6)
        base.weight.data = t.copy_(values)
        return t.data_ptr()

    values = base.weight.detach().clone()
    before, right = take(values), model(X.double())
    base.weight.data = torch.empty(0)  # as where a model is moved away
    assert take(2 * values) == before
    found = model(X.double())
    unpatch_peft(model)
    assert not torch.allclose(found, right)
    torch.testing.assert_close(found, model(X.double()), **EXACT)


def test_norms_are_made_once_in_evaluation(monkeypatch):
    model, made_of, own = made().eval(), [], dora.norm
    patch_peft(model)
    monkeypatch.setattr(dora, "norm", lambda *args: made_of.append(0) or own(*args))
    right = model(X.double())
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for _ in range(3):
            assert torch.equal(copied(X.double()), right)
    assert len(made_of) == 3 * 2  # a copy has none
    frozen, norm = [], torch.linalg.vector_norm
    seen = lambda *a, **k: frozen.append(0) or norm(*a, **k)  # noqa: E731
    monkeypatch.setattr(torch.linalg, "vector_norm", seen)
    for n in (1, 2):
        model.train()  # as trainers do before each step
        model(X.double())
        assert len(made_of) == 6 + 2 * n and not frozen  # the weight's are kept
    model(X.double())
    assert len(made_of) == 12  # whatever PyTorch has seen of what optimizers do


def test_gradients_after_inference_mode():
    """What was kept there may be saved for backward."""
    model = made().eval()
    right = grads(model, X.double())
    patch_peft(model)
    with torch.inference_mode():
        model(X.double())
    torch.testing.assert_close(grads(model, X.double()), right, **EXACT)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("impl", ["auto", "library"])
def test_one_weight_is_dense_at_a_time(impl, p, monkeypatch):
    monkeypatch.setattr(plans, "FORCED", impl)
    plans.forget()
    alive, most, own = [], [], weights.Quantised.dense

    def dense(self):
        most.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(made := own(self)))
        return made

    monkeypatch.setattr(weights.Quantised, "dense", dense)
    model = block("nf4", torch.bfloat16, lora_dropout=p)
    patch_peft(model, fuse_siblings=[("q", "k", "v"), ("gate", "up")])
    results(model, WIDE.bfloat16())
    assert len(alive) > 12 and not any(most)
    plans.forget()


@pytest.mark.parametrize("caching", [False, True])
def test_merging_and_files_are_peft_s(caching, tmp_path, monkeypatch):
    monkeypatch.setattr(dora_of_peft, "ENABLE_DORA_CACHING", caching)
    plain = made().eval()
    model = copy.deepcopy(plain)
    patch_peft(model)
    assert torch.allclose(model(X.double()), plain(X.double()), **EXACT)
    for each, kept in ((plain, caching), (model, False)):  # PEFT's cache is PEFT's
        assert all(bool(magnitude(each)._dora_cache) == kept for _ in layers(each))
    for each in (plain, model):
        each.merge_adapter()
    assert torch.equal(model(X.double()), plain(X.double()))
    for each in (plain, model):
        each.unmerge_adapter()
    torch.testing.assert_close(model(X.double()), plain(X.double()), **EXACT)
    save_adapter(model, tmp_path)
    other = load_adapter(mlp().double(), tmp_path)
    torch.testing.assert_close(other.eval()(X.double()), plain(X.double()))


def both(model, **changes):
    add(model, target_modules=["0"], **changes)
    model.base_model.set_adapter(["default", "other"])


def magnitude(model):
    return layers(model)[0].lora_magnitude_vector["default"]


SEVERAL = "several adapters are active, and some are DoRA's"
REASONS = {
    "another beside it": (lambda model: both(model, use_dora=True), SEVERAL),
    "a plain one beside it": (both, SEVERAL),
    "hooks": (
        lambda model: magnitude(model).register_forward_hook(lambda *_: None),
        "adapter 'default' has hooks on its magnitude",
    ),
    "dtype": (
        lambda model: magnitude(model).half(),
        "adapter 'default' has a magnitude of Parameter, torch.float16 on cpu",
    ),
}


@pytest.mark.parametrize("why", REASONS)
def test_what_is_left_to_peft(why):
    plain, (change, said) = made(target_modules=["0"]), REASONS[why]
    change(plain)
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match=said):
        patch_peft(model)
    assert torch.equal(model(X.double()), plain(X.double()))
