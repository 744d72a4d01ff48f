# SPDX-License-Identifier: Apache-2.0
"""Under PEFT, not fused: PEFT's own code runs and the reason is said; and what bad input gets."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import textwrap
import types
import warnings

import numpy as np
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model
from peft.tuners import lora
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import X, add, config, layers, pair, run, same, wrapped
from tiny_models import mlp
from torch import nn

from fastlora import patch_peft, unpatch_peft
from fastlora.peft.linear import FusedLinear
from fastlora.peft.patch import register

# What is not fused runs PEFT's own code, and says so


class Subclass(nn.Linear):
    """As quantised layers are: a linear layer of a kind that is not known here."""


class Weight(nn.Parameter):
    pass


def dora(model):
    return get_peft_model(model, config(use_dora=True))


def narrow(layer, *parts):
    for part in parts:
        getattr(layer, part).to(torch.bfloat16)


def quantised(layer):
    layer.base_layer.__class__ = Subclass


def own_bias(layer):
    base = layer.base_layer
    bias = base.bias.detach().clone() + 1
    del base.bias
    base.register_buffer("bias", bias)


def own_forward(layer):
    layer.forward = types.MethodType(lambda self, x: lora.Linear.forward(self, 2 * x), layer)


def eight_bits(layer):
    weight = layer.base_layer.weight.to(torch.int8)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def subclassed(layer):
    layer.base_layer.weight = Weight(layer.base_layer.weight.detach())


def rescaled(layer):
    layer.scaling["default"] = torch.ones(1)


def other_dropout(layer):
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)


def hooked_adapter(layer):
    layer.lora_A["default"].register_forward_pre_hook(lambda m, a: (2 * a[0],))


def double(module, given, output):
    return 2 * output


OBSERVED = "its base layer has hooks, or a forward of its own, and would not be called"
PLAIN = "not a plain nn.Linear or Conv1D"
# What is done to the LoRA layer of a model, and the reason.
CHANGES = {
    quantised: f"its base layer is a test_peft_reasons.Subclass, {PLAIN}",
    subclassed: "its weight is a Weight of torch.float32, not a dense float",
    own_bias: "its base layer's bias is no parameter",
    rescaled: "adapter 'default' is scaled by tensor([1.]), no finite number",
    eight_bits: "its weight is a Parameter of torch.int8, not a dense float",
    lambda layer: nn.utils.parametrizations.weight_norm(layer.base_layer): (
        f"its base layer is a torch.nn.utils.parametrize.ParametrizedLinear, {PLAIN}"
    ),
    lambda layer: layer.base_layer.register_forward_hook(double): OBSERVED,
    # As accelerate does with the layers of a model on several devices.
    lambda layer: add_hook_to_module(layer.base_layer, ModelHook()): OBSERVED,
    hooked_adapter: "adapter 'default' has hooks on its own parts, which would not be called",
    own_forward: "it has a forward set on the object, as accelerate's hooks and X-LoRA do",
    lambda layer: narrow(layer, "lora_A", "lora_B"): (
        "adapter 'default' is torch.bfloat16 and torch.bfloat16 on a base of torch.float32"
    ),
    lambda layer: narrow(layer, "base_layer", "lora_B"): (
        "adapter 'default' is torch.float32 and torch.bfloat16 on a base of torch.bfloat16"
    ),
    other_dropout: "adapter 'default' drops by a torch.nn.modules.dropout.AlphaDropout",
}
# Models, what their layer gets, and the reason.
MODELS = {
    "dora": (dora, "adapter 'default' is a variant of LoRA (DoraLinearVariant)"),
    "Embedding": (lambda _: nn.Sequential(nn.Embedding(4, 6)), torch.tensor([0, 3])),
    "Conv1d": (lambda _: nn.Sequential(nn.Conv1d(6, 3, 1)), X.T),
    "MultiheadAttention": (lambda _: nn.ModuleDict({"0": nn.MultiheadAttention(6, 2)}), X, X, X),
    "wide bias": (
        lambda model: wrapped(model.bfloat16(), target_modules=["0"], lora_bias=True),
        "adapter 'default' has a bias of torch.float32 on a base of torch.bfloat16",
    ),
}


def check_not_fused(model, why, fused, *inputs):
    """PEFT's own code runs, before and after, and the reason is said."""
    layer = layers(model)[0]
    dtype = next(layer.get_base_layer().parameters()).dtype
    inputs = inputs or (X.to(dtype) if dtype.is_floating_point else X,)
    kinds = [type(module) for module in model.modules()]
    expected = run(layer, *inputs)
    with pytest.warns(UserWarning, match="fused nothing") as warned:
        report = patch_peft(model)
    reasons = dict(report.not_fused)
    assert report.fused == [] and len(reasons) == len(layers(model))
    assert next(iter(reasons.values())) == why and why in str(warned[-1].message)
    found = run(layer, *inputs)
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert fused == []
    unpatch_peft(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(("change", "why"), CHANGES.items(), ids=range(len(CHANGES)))
def test_what_is_not_fused(change, why, fused):
    model = wrapped(target_modules=["0"])
    change(layers(model)[0])
    check_not_fused(model, why, fused)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_not_fused(name, fused):
    torch.manual_seed(5)
    make, *rest = MODELS[name]
    if isinstance(rest[0], str):
        check_not_fused(make(mlp()), rest[0], fused)
    else:
        model = get_peft_model(make(None), config(target_modules=["0"]))
        why = f"a peft.tuners.lora.layer.{name}, not PEFT's plain lora.Linear"
        check_not_fused(model, why, fused, *rest)


def test_an_adapter_on_another_device(fused):
    """Nothing is computed there."""
    model = wrapped(target_modules=["0"])
    layers(model)[0].lora_A.to("meta")
    layers(model)[0].lora_B.to("meta")
    with pytest.warns(UserWarning, match="adapter 'default' is on meta, its base layer on cpu"):
        patch_peft(model)


def test_a_nested_adapter_is_not_fused(fused):
    outer = lora.Linear(layers(wrapped())[0], "outer", config(), r=2, lora_alpha=2)
    model = nn.Sequential(outer)
    report = patch_peft(model)
    assert report.fused == ["0.base_layer"]
    ((name, why),) = report.not_fused
    assert name == "0" and "its base layer is a peft.tuners.lora.layer.Linear, not" in why
    outer(X)
    assert len(fused) == 1


def test_a_variant_beside_a_plain_adapter(fused):
    """The choice is made at each call: what is active decides."""
    plain, model, _ = pair()
    for each in (plain, model):
        add(each, use_dora=True)
        each.set_adapter("other")
    assert torch.equal(plain(X), model(X)) and fused == []
    with pytest.warns(UserWarning, match="adapter 'other' is a variant"):
        patch_peft(model)
    for each in (plain, model):
        each.base_model.set_adapter(["default", "other"])
    assert torch.equal(plain(X), model(X)) and fused == []
    for each in (plain, model):
        each.set_adapter("default")
    same(plain, model)
    assert len(fused) == 4


def test_an_input_of_a_kind_that_is_not_known(fused):
    class Input(torch.Tensor):
        pass

    plain, model, _ = pair()
    x = X.as_subclass(Input)
    assert torch.equal(layers(model)[0](x), layers(plain)[0](x)) and fused == []


@pytest.mark.parametrize(
    "given",
    [
        torch.nested.nested_tensor([X, X[:2]]),
        X.to_sparse(),
        X.to_mkldnn(),
        X.double(),
        X.tolist(),
        None,
    ],
    ids=["nested", "sparse", "mkldnn", "double", "list", "None"],
)
def test_inputs_that_only_peft_can_answer(given, fused):
    plain, model, _ = pair()
    expected, found = (run(layers(each)[0], given) for each in (plain, model))
    assert type(found) is type(expected) and fused == []
    if isinstance(expected, str):
        assert found == expected


def test_an_integer_input_under_autocast(fused):
    plain, model, _ = pair()
    ids = torch.arange(12).reshape(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(layers(model)[0], ids) == run(layers(plain)[0], ids) and fused == []


def test_hooks_on_every_module(fused):
    plain, model, _ = pair()
    expected = plain(X)
    called = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(type(m)))
    try:
        assert torch.equal(model(X), expected)
    finally:
        hook.remove()
    assert fused == [] and called.count(nn.Linear) == 3 * 2 + 1
    model(X)
    assert len(fused) == 2


def test_traced(fused):
    plain, model, _ = pair()
    traced = torch.jit.trace(model, X, check_trace=False)
    assert torch.equal(traced(X), plain(X)) and fused == []


def test_scalings_as_numbers_and_tensors(fused):
    plain, model, _ = pair()
    kinds = [3, 0.5, torch.tensor(2.0), np.float32(2), np.int64(2), float("inf")]
    for scaling in kinds:
        fused.clear()
        for each in (plain, model):
            for layer in layers(each):
                layer.scaling["default"] = scaling
        torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5, equal_nan=True)
        own = type(scaling) in (int, float, torch.Tensor) and scaling != float("inf")
        assert len(fused) == (2 if own else 0), scaling


def test_on_the_meta_device_under_autocast(fused):
    plain, model, _ = pair()
    for each in (plain, model):
        each.to("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X.to("meta")).shape == plain(X.to("meta")).shape == (3, 5)
        unpatch_peft(model)
        assert patch_peft(model).not_fused == []


def test_function_transforms(fused):
    plain, model, _ = pair()
    tangent = torch.cos(X)
    for each in (torch.func.jvp, torch.func.vjp):
        expected, found = (
            each(m, (X,), (tangent,)) if each is torch.func.jvp else each(m, X)
            for m in (plain, model)
        )
        if each is torch.func.vjp:
            expected, found = ((y, pull(torch.ones_like(y))[0]) for y, pull in (expected, found))
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert len(fused) == 4


def test_adapters_of_other_methods_are_listed():
    asked = peft.AdaLoraConfig(target_modules=["0"], total_step=10)
    model = get_peft_model(mlp(), asked)
    with pytest.warns(UserWarning, match="fused nothing"):
        report = patch_peft(model)
    assert report.not_fused[0][1] == (
        "a peft.tuners.adalora.layer.SVDLinear, not PEFT's plain lora.Linear"
    )


# What bad input gets


def test_a_model_without_lora():
    with pytest.raises(ValueError, match="has no LoRA layer of PEFT's; patch_peft"):
        patch_peft(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        patch_peft("model")


@pytest.mark.parametrize("part", ["whole", "in place", "inside"])
def test_a_compiled_model(part):
    model = wrapped()
    if part == "inside":
        model.base_model.model = torch.compile(model.base_model.model)
    elif part == "in place":
        model.compile()
    given = torch.compile(model) if part == "whole" else model
    with pytest.raises(ValueError, match="is compiled: patch the model first, then compile it"):
        patch_peft(given)
    assert all(type(layer) is lora.Linear for layer in layers(model))


def test_unpatching_a_compiled_model(fused):
    plain, model, _ = pair()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), plain(X), rtol=1e-5, atol=1e-6)
    unpatch_peft(compiled)
    assert all(type(layer) is lora.Linear for layer in layers(model))
    fused.clear()
    assert torch.equal(compiled(X), plain(X)) and fused == []


@pytest.mark.parametrize("version", ["0.18.1", "0.22.0", "1.0.0.dev0"])
@pytest.mark.parametrize("call", [patch_peft, unpatch_peft, register])
def test_a_release_that_was_not_tested(monkeypatch, version, call):
    model = wrapped()
    monkeypatch.setattr(peft, "__version__", version)
    said = rf"PEFT {re.escape(version)} was not tested .* of 0.19 up to before 0.22"
    with pytest.raises(RuntimeError, match=said):
        call(model if call is not register else config())
    assert all(type(layer) is lora.Linear for layer in layers(model))


@pytest.mark.parametrize("version", ["0.19.0", "0.21.2", "0.21.3.dev0"])
def test_releases_that_were(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    assert len(patch_peft(wrapped()).fused) == 2


def test_without_peft(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'fastlora-kernels\[peft\]'"):
        patch_peft(mlp())


def test_registering_something_else():
    with pytest.raises(TypeError, match=r"must be a peft\.LoraConfig, got IA3Config"):
        register(peft.IA3Config(target_modules=["0"]))


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = dora(mlp())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="fused nothing"):
            patch_peft(model)
    assert all(type(layer) is lora.Linear for layer in layers(model))
    assert "_create_new_module" not in vars(model.base_model)


def test_registered_configs_leave_quantised_weights_to_peft(monkeypatch):
    """By the weight, as torchao keeps a plain nn.Linear around its own tensors."""
    base = nn.Linear(6, 8)
    base.weight = Weight(base.weight.detach())
    model = get_peft_model(nn.Sequential(base), register(config(target_modules=["0"])))
    assert type(layers(model)[0]) is lora.Linear


class Chatty(FusedLinear):
    def forward(self, x):
        return super().forward(x)


def test_a_class_that_cannot_be_taken_back():
    """Nothing is half unpatched."""
    _, model, _ = pair()
    layers(model)[1].__class__ = Chatty
    with pytest.raises(ValueError, match=r"Chatty is not to be undone: its methods call super\(\)"):
        unpatch_peft(model)
    assert type(layers(model)[0]) is FusedLinear


# PEFT may change

CONTRACT = {
    lora.Linear.forward: "5320b1b104cd75f9",
    lora.LoraLayer._check_forward_args: "e28e56f62b9f79fe",
    BaseTunerLayer._cast_input_dtype: "177c4ea07e6c2449",
    LoraModel._create_new_module: "1024a600735d4fec",
}


def code_of(function):
    """Return a hash of the code without docstring and comments, the same on every Python."""
    source = textwrap.dedent(inspect.getsource(function))
    (node,) = ast.parse(source).body
    lines = source.splitlines()
    if ast.get_docstring(node) is not None:
        del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    lines = [line.split("#")[0].rstrip() for line in lines]
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("function", CONTRACT, ids=lambda function: function.__qualname__)
def test_what_the_fused_forward_stands_in_for(function):
    """A new hash: read what has changed in PEFT, mend FusedLinear, then note the new one."""
    assert code_of(function) == CONTRACT[function]
