# SPDX-License-Identifier: Apache-2.0
"""Under PEFT, not fused: PEFT's own code runs and the reason is said; and what bad input gets."""

import hashlib
import inspect
import re
import sys
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
from peft_models import Quantised, Subclass, X, add, config, layers, pair, run, same, wrapped
from tiny_models import mlp
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import weight_norm

from fastlora import patch_peft, unpatch_peft
from fastlora.peft import register
from fastlora.peft.linear import FusedLinear

# What is not fused runs PEFT's own code, and says so


class Input(torch.Tensor):
    pass


def own_bias(layer):
    base = layer.base_layer
    bias = base.bias.detach().clone() + 1
    del base.bias
    base.register_buffer("bias", bias)


def own_forward(layer):
    layer.forward = types.MethodType(lambda self, x: lora.Linear.forward(self, 2 * x), layer)


def quantised(layer):
    layer.base_layer.__class__ = Subclass


def own_weight(kind, dtype=torch.float32):
    def change(layer):
        weight = layer.base_layer.weight.detach().to(dtype)
        layer.base_layer.weight = kind(weight, requires_grad=False)

    return change


def narrow(*parts):
    return lambda layer: [getattr(layer, part).bfloat16() for part in parts]


def in_part(path, change, *given):
    return lambda layer: change(layer.get_submodule(path), *given)


OBSERVED = "its base layer has hooks, or a forward of its own, and would not be called"
KIND, PLAIN = "its base layer is a .*", ", not a plain nn.Linear or Conv1D"
HOOK, PRE_HOOK = nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook
BF16, LAYER = "torch.bfloat16", ", not PEFT's plain lora.Linear"
# What is done to the LoRA layer of a model, and the reason.
CHANGES = [
    (quantised, f"{KIND}peft_models.Subclass{PLAIN}"),
    (own_weight(Quantised), "its weight is a Quantised of torch.float32, not a dense float"),
    (own_weight(nn.Parameter, torch.int8), "its weight is a Parameter of torch.int8, not a dense"),
    (own_bias, "its base layer's bias is no parameter"),
    (own_forward, "it has a forward set on the object, as accelerate's hooks and X-LoRA do"),
    (in_part("base_layer", weight_norm), f"{KIND}parametrize.ParametrizedLinear{PLAIN}"),
    (in_part("base_layer", HOOK, lambda m, x, y: 2 * y), OBSERVED),
    # As accelerate does with the layers of a model on several devices.
    (in_part("base_layer", add_hook_to_module, ModelHook()), OBSERVED),
    (in_part("lora_A.default", PRE_HOOK, lambda m, x: (2 * x[0],)), "has hooks on its own parts"),
    (narrow("lora_A", "lora_B"), f"is {BF16} and {BF16} on a base of torch.float32"),
    (narrow("base_layer", "lora_B"), f"is torch.float32 and {BF16} on a base of {BF16}"),
    (
        lambda layer: layer.scaling.update(default=torch.ones(1)),
        r"adapter 'default' is scaled by tensor\(\[1.\]\), no finite number",
    ),
    (
        lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.0)}),
        "adapter 'default' drops by a torch.nn.modules.dropout.AlphaDropout",
    ),
]
ADALORA = peft.AdaLoraConfig(target_modules=["0"], total_step=10)


def made(change, **changes):
    def make():
        change(model := wrapped(**changes))
        return model

    return make


def asked(make, **changes):
    return lambda: get_peft_model(make(), config(target_modules=["0"], **changes))


# Models, the reason, and inputs but for X.
MODELS = [
    *(
        (made(lambda model, of=change: of(layers(model)[0]), target_modules=["0"]), why)
        for change, why in CHANGES
    ),
    (asked(mlp, init_lora_weights="mica"), r"'default' is a variant of LoRA \(MiCALinearVariant\)"),
    (
        asked(lambda: mlp().bfloat16(), lora_bias=True),
        f"a bias of torch.float32 on a base of {BF16}",
    ),
    (asked(lambda: nn.Sequential(nn.Embedding(4, 6))), f"Embedding{LAYER}", torch.tensor([0, 3])),
    (asked(lambda: nn.Sequential(nn.Conv1d(6, 3, 1))), f"Conv1d{LAYER}", X.T),
    (
        asked(lambda: nn.ModuleDict({"0": nn.MultiheadAttention(6, 2)})),
        f"a peft.tuners.lora.layer.MultiheadAttention{LAYER}",
        *(X, X, X),
    ),
    (lambda: get_peft_model(mlp(), ADALORA), f"a peft.tuners.adalora.layer.SVDLinear{LAYER}"),
]


def assert_as_peft(found, expected):
    """The same bits, or the same error."""
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", range(len(MODELS)))
def test_what_is_not_fused(case, fused):
    """PEFT's own code runs, before and after, and the reason is said."""
    make, why, *inputs = MODELS[case]
    torch.manual_seed(5)
    model = make()
    layer, kinds = layers(model)[0], [type(module) for module in model.modules()]
    dtype = next(layer.get_base_layer().parameters()).dtype
    inputs = inputs or (X.to(dtype) if dtype.is_floating_point else X,)
    expected = run(layer, *inputs)
    with pytest.warns(UserWarning, match=f"fused nothing(?s:.*){why}"):
        report = patch_peft(model)
    assert report.fused == [] and len(report.not_fused) == len(layers(model))
    assert re.search(why, report.not_fused[0][1])
    assert_as_peft(run(layer, *inputs), expected)
    assert fused == []
    unpatch_peft(model)
    assert [type(module) for module in model.modules()] == kinds


def test_an_adapter_on_another_device_and_one_inside_another(fused):
    moved = layers(wrapped())[0]
    moved.lora_A.to("meta")
    moved.lora_B.to("meta")
    outer = lora.Linear(layers(wrapped())[0], "outer", config(), r=2, lora_alpha=2)
    report = patch_peft(nn.Sequential(moved, outer))
    assert report.fused == ["1.base_layer"] and [name for name, _ in report.not_fused] == ["0", "1"]
    (_, device), (_, inside) = report.not_fused
    assert device == "adapter 'default' is on meta, its base layer on cpu"
    assert "its base layer is a peft.tuners.lora.layer.Linear, not" in inside
    outer(X)
    assert len(fused) == 1


def test_a_variant_beside_a_plain_adapter(fused):
    """The choice is made at each call: what is active decides."""
    plain, model, _ = pair()
    for each in (plain, model):
        add(each, init_lora_weights="mica")
    for active in ("other", ["default", "other"]):
        for each in (plain, model):
            each.base_model.set_adapter(active)
        with pytest.warns(UserWarning, match="adapter 'other' is a variant"):
            patch_peft(model)
        assert torch.equal(plain(X), model(X)) and fused == []
    for each in (plain, model):
        each.set_adapter("default")
    same(plain, model)
    assert len(fused) == 4


NESTED = torch.nested.nested_tensor([X, X[:2]])
INPUTS = [NESTED, X.to_sparse(), X.to_mkldnn(), X.as_subclass(Input), X.double(), X.tolist(), None]


@pytest.mark.parametrize(
    ("given", "autocast"),
    [*((given, False) for given in INPUTS), (torch.arange(12).reshape(2, 6), True)],
    ids=["nested", "sparse", "mkldnn", "subclass", "double", "list", "None", "integers"],
)
def test_inputs_that_only_peft_can_answer(given, autocast, fused):
    plain, model, _ = pair()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = (run(layers(each)[0], given) for each in (plain, model))
    assert type(found) is type(expected) and fused == []
    if isinstance(expected, str) or type(given) is Input:
        assert_as_peft(found, expected)


def test_hooks_on_every_module(fused):
    plain, model, _ = pair()
    expected = plain(X)
    called = []
    with register_module_forward_hook(lambda module, *_: called.append(type(module))):
        assert torch.equal(model(X), expected)
    assert fused == [] and called.count(nn.Linear) == 3 * 2 + 1
    model(X)
    assert len(fused) == 2


def test_traced(fused):
    plain, model, _ = pair()
    traced = torch.jit.trace(model, X, check_trace=False)
    assert torch.equal(traced(X), plain(X)) and fused == []


@pytest.mark.parametrize(
    ("scaling", "calls"),
    [(3, 2), (0.5, 2), (torch.tensor(2.0), 2), (np.float32(2), 0), (np.int64(2), 0), (np.inf, 0)],
)
def test_scalings_as_numbers_and_tensors(scaling, calls, fused):
    plain, model, _ = pair()
    for layer in (*layers(plain), *layers(model)):
        layer.scaling["default"] = scaling
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert len(fused) == calls


def test_on_the_meta_device_under_autocast():
    _, model, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.to("meta")(X.to("meta")).shape == (3, 5)
        assert patch_peft(model).not_fused == []


def test_unpatching_a_compiled_model(fused):
    plain, model, _ = pair()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), plain(X), rtol=1e-5, atol=1e-6)
    unpatch_peft(compiled)
    fused.clear()
    assert torch.equal(compiled(X), plain(X)) and fused == []


@pytest.mark.parametrize("version", ["0.18.1", "0.22.0", "1.0.0.dev0"])
def test_a_release_that_was_not_tested(monkeypatch, version):
    model = wrapped()
    monkeypatch.setattr(peft, "__version__", version)
    said = rf"PEFT {re.escape(version)} was not tested .* of 0.19 up to before 0.22"
    for call, given in ((patch_peft, model), (unpatch_peft, model), (register, config())):
        with pytest.raises(RuntimeError, match=said):
            call(given)
    assert all(type(layer) is lora.Linear for layer in layers(model))
    for tested in ("0.19.0", "0.21.3.dev0", "0.21rc1"):
        monkeypatch.setattr(peft, "__version__", tested)
        assert len(patch_peft(model).fused) == 2


class Chatty(FusedLinear):
    def forward(self, x):
        return super().forward(x)


def half_chatty(model):
    patch_peft(model)
    layers(model)[1].__class__ = Chatty


def compiled_inside(model):
    model.base_model.model = torch.compile(model.base_model.model)


COMPILED = "is compiled: patch the model first, then compile it"
REFUSED = [
    (patch_peft, mlp, ValueError, "has no LoRA layer of PEFT's; patch_peft"),
    (patch_peft, lambda: "model", TypeError, r"model must be an nn\.Module, got str"),
    # A warning that is an error.
    (patch_peft, lambda: wrapped(init_lora_weights="mica"), UserWarning, "fused nothing"),
    (patch_peft, lambda: torch.compile(wrapped()), ValueError, COMPILED),
    (patch_peft, made(nn.Module.compile), ValueError, COMPILED),
    (patch_peft, made(compiled_inside), ValueError, COMPILED),
    (
        unpatch_peft,
        made(half_chatty),
        ValueError,
        r"Chatty is not .* undone: its methods call super\(\)",
    ),
    (register, peft.IA3Config, TypeError, r"must be a peft\.LoraConfig, got IA3Config"),
]


@pytest.mark.parametrize(("call", "make", "error", "message"), REFUSED)
def test_what_is_refused(call, make, error, message):
    """Nothing is half patched or half unpatched."""
    given = make()
    kinds = [type(m) for m in given.modules()] if isinstance(given, nn.Module) else []
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("error")
        call(given)
    assert not kinds or [type(m) for m in given.modules()] == kinds


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'fastlora-kernels\[peft\]'"):
        patch_peft(mlp())


# PEFT may change
CONTRACT = {
    lora.Linear.forward: "5320b1b104cd75f9",
    lora.LoraLayer._check_forward_args: "e28e56f62b9f79fe",
    BaseTunerLayer._cast_input_dtype: "177c4ea07e6c2449",
    LoraModel._create_new_module: "1024a600735d4fec",
}


@pytest.mark.parametrize("function", CONTRACT, ids=lambda function: function.__qualname__)
def test_what_the_fused_forward_stands_in_for(function):
    """A new hash: read what has changed in PEFT, mend FusedLinear, then note the new one."""
    source = textwrap.dedent(inspect.getsource(function))
    # Without docstring and comments it is the same on every Python.
    source = re.sub(r'"{3}.*?"{3}', "", source, flags=re.DOTALL)
    lines = [line.split("#")[0].rstrip() for line in source.splitlines()]
    found = hashlib.sha256("\n".join(filter(None, lines)).encode())
    assert found.hexdigest()[:16] == CONTRACT[function]
