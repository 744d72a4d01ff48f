# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear`: a drop-in for nn.Linear, its adapters, merging, state and life cycle."""

from __future__ import annotations

import copy
import io
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastlora import LoRALinear


def layer_with(names=("default",), r=4, dropout=0.0, dtype=torch.float32, **kwargs):
    layer = LoRALinear.from_linear(nn.Linear(12, 10).to(dtype), r=r, lora_dropout=dropout, **kwargs)
    for name in names[1:]:
        layer.add_adapter(name, r=r + 1, lora_dropout=dropout, lora_alpha=3)
    for name in names:
        nn.init.normal_(layer.lora_B[name])
    return layer


def formula(layer, x, names):
    y = F.linear(x, layer.weight, layer.bias)
    for name in names:
        y = y + layer.scaling[name] * F.linear(F.linear(x, layer.lora_A[name]), layer.lora_B[name])
    return y


def test_starts_as_its_base_and_trains_only_the_adapter():
    linear = nn.Linear(12, 10)
    layer = LoRALinear.from_linear(linear, r=3, lora_alpha=6)
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default", "lora_B.default"}
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.lora_B["default"].grad is not None


def test_constructor_is_that_of_a_linear():
    layer = LoRALinear(12, 10, r=2, lora_alpha=4, bias=False, dtype=torch.bfloat16)
    assert isinstance(layer, nn.Linear) and layer.bias is None
    assert layer.weight.shape == (10, 12) and layer.weight.dtype == torch.bfloat16
    assert layer.lora_A["default"].dtype == torch.float32  # as PEFT: float32 under 16 bits
    assert LoRALinear(4, 4, dtype=torch.float64).lora_A["default"].dtype == torch.float64
    half = LoRALinear(4, 4, dtype=torch.float16, adapter_dtype=torch.float16)
    assert half.lora_A["default"].dtype == torch.float16


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora):
    layer = LoRALinear(12, 10, r=4, lora_alpha=6, use_rslora=rslora)
    assert layer.scaling["default"] == (6 / math.sqrt(4) if rslora else 6 / 4)


@pytest.mark.parametrize("method", [True, "gaussian", "orthogonal", False])
def test_initialisation_follows_peft(method):
    torch.manual_seed(0)
    layer = LoRALinear(256, 128, r=8, init_lora_weights=method)
    model = nn.Sequential(nn.Linear(256, 128))
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=method)
    theirs = get_peft_model(model, config).base_model.model[0]
    for mine, other in (
        (layer.lora_A["default"], theirs.lora_A["default"].weight),
        (layer.lora_B["default"], theirs.lora_B["default"].weight),
    ):
        assert mine.shape == other.shape
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.15)
        assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.35)
    assert (layer.lora_B["default"] == 0).all() == (method in (True, "gaussian"))
    change = layer.lora_B["default"] @ layer.lora_A["default"]
    assert (change.abs().max() < 1e-6) == (method is not False)


def test_from_linear_takes_the_class_s_arguments():
    linear = nn.Linear(12, 10, bias=False, dtype=torch.bfloat16)
    same = {"bias": False, "device": "cpu", "dtype": torch.bfloat16}
    layer = LoRALinear.from_linear(linear, 4, 8, 0.1, **same, adapter_dtype=torch.bfloat16)
    assert layer.weight is linear.weight and layer.lora_A["default"].dtype == torch.bfloat16
    for wrong, message in (
        ({"bias": True}, "bias=True, but the linear layer, .* has no bias"),
        ({"device": "meta"}, "device=meta, but the weight, which is shared, is on cpu"),
        ({"dtype": torch.float32}, "dtype=torch.float32, but .* is torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            other = nn.Linear(12, 10, bias=False, dtype=torch.bfloat16)
            LoRALinear.from_linear(other, **{**same, **wrong})
        assert other.weight.requires_grad


def test_a_base_checkpoint_loads_unchanged():
    linear, layer = nn.Linear(12, 10), layer_with()
    before = layer.lora_B["default"].clone()
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert torch.equal(layer.lora_B["default"], before)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A.default", "lora_B.default"}
    other = layer_with()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.lora_A["default"], layer.lora_A["default"])
    half = {k: v for k, v in layer.state_dict().items() if k != "lora_B.default"}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B.default"):
        other.load_state_dict(half)


@pytest.mark.parametrize("names", [["a"], ["default", "a"], ["default", "a", "b"], []])
def test_active_adapters_add_up(names):
    layer = layer_with(("default", "a", "b"))
    layer.set_adapter(names)
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(layer(x), formula(layer, x, names))
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {f"lora_{f}.{n}" for n in names for f in "AB"}


def test_several_adapters_with_dropout_drop_independently():
    layer = layer_with(("default", "a"), dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.lora_A["a"][:4].copy_(layer.lora_A["default"])
        layer.lora_A["a"][4:].zero_()
        layer.lora_B["a"].zero_()
        layer.lora_B["a"][:, :4].copy_(-layer.lora_B["default"])
    layer.scaling["a"] = layer.scaling["default"]
    layer.set_adapter(["default", "a"])
    x = torch.randn(64, 12)
    assert layer(x).abs().mean() > 0.1  # one shared mask would cancel to zero
    torch.testing.assert_close(layer.eval()(x), torch.zeros(64, 10))
    layer.train().lora_dropout["default"] = 0.0
    y, z = layer(x), layer(x)
    assert not torch.equal(y, z)


def test_gradients_of_several_adapters():
    layer = layer_with(("default", "a"))
    layer.set_adapter(["default", "a"])
    x = torch.randn(7, 12)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    mine = torch.autograd.grad(layer(x).square().sum(), parameters)
    theirs = torch.autograd.grad(formula(layer, x, ["default", "a"]).square().sum(), parameters)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_several_adapters_with_dropout_keep_no_dropped_input():
    layer = layer_with(("default", "a", "b"), dropout=0.5)
    layer.set_adapter(["default", "a", "b"])
    x = torch.randn(512, 12)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in (x, *layer.parameters())}
    assert not [t.shape for t in kept if t.numel() >= x.numel() and t.data_ptr() not in own]
    # What backward draws again is what forward drew: y is linear in B, and db its slope.
    b = layer.lora_B["b"]
    torch.manual_seed(0)
    before = layer(x).sum()
    (db,) = torch.autograd.grad(before, b)
    with torch.no_grad():
        b[0, 0] += 1.0
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x).sum() - before, db[0, 0], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_several_adapters_compile(dropout):
    layer = layer_with(("default", "a"), dropout=dropout)
    layer.set_adapter(["default", "a"])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 12)
    compiled(x).sum().backward()
    assert layer.lora_A["a"].grad.isfinite().all() and layer.lora_A["a"].grad.any()
    torch.testing.assert_close(compiled.eval()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(dtype):
    layer = layer_with(("default", "a"), dtype=dtype).eval()
    weight, bits = layer.weight, layer.weight.detach().clone()
    layer.set_adapter(["default", "a"])
    x = torch.randn(4, 12).to(dtype)
    unmerged = layer(x)
    layer.merge()
    assert layer.merged and layer.weight is not weight
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(layer(x), unmerged, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(RuntimeError, match="already merged: default, a"):
        layer.merge()
    layer.unmerge()
    layer.unmerge()
    assert layer.weight is weight and torch.equal(layer.weight, bits) and not layer.merged
    assert torch.equal(layer(x), unmerged)


def test_merge_leaves_a_shared_weight_alone():
    embedding = nn.Embedding(10, 12)
    linear = nn.Linear(12, 10, bias=False)
    linear.weight = embedding.weight
    layer = LoRALinear.from_linear(linear, init_lora_weights=False)
    before = embedding.weight.detach().clone()
    layer.merge()
    assert torch.equal(embedding.weight, before)
    layer.unmerge()
    assert layer.weight is embedding.weight


def test_safe_merge_refuses_infinities_and_changes_nothing():
    layer = layer_with(dtype=torch.float16)
    with torch.no_grad():
        layer.lora_B["default"].fill_(60000.0)
    weight = layer.weight
    with pytest.raises(ValueError, match="default would put NaN or infinity"):
        layer.merge(safe=True)
    assert layer.weight is weight and not layer.merged
    layer.merge()
    assert layer.weight.isinf().any()


def test_merging_nothing_and_disabled_adapters():
    layer = layer_with()
    x = torch.randn(2, 12)
    base = F.linear(x, layer.weight, layer.bias)
    layer.disable_adapters = True
    assert torch.equal(layer(x), base)
    layer.merge()
    assert torch.equal(layer(x), base)  # merged and disabled is the base too
    layer.disable_adapters = False
    assert not torch.allclose(layer(x), base)
    layer.unmerge()
    layer.set_adapter([])
    layer.merge()
    assert not layer.merged and torch.equal(layer(x), base)


def test_switching_and_deleting_while_merged_unmerges_first():
    layer = layer_with(("default", "a"))
    weight = layer.weight
    layer.merge()
    with pytest.warns(UserWarning, match="unmerged first"):
        layer.set_adapter("a")
    assert layer.weight is weight
    layer.merge()
    with pytest.warns(UserWarning, match="'a' is merged"):
        layer.delete_adapter("a")
    assert layer.weight is weight and layer.active_adapters == () and list(layer.r) == ["default"]
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A.default", "lora_B.default"}


def test_merged_layers_can_be_moved_and_cast():
    layer = layer_with()
    bits = layer.weight.detach().double()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.weight.dtype == torch.float64 and torch.equal(layer.weight, bits)
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad


def test_loading_into_a_merged_layer_unmerges_it_first():
    layer, other = layer_with(), layer_with()
    weight = layer.weight
    layer.merge()
    with pytest.warns(UserWarning, match="merged: unmerged for loading"):
        layer.load_state_dict(other.state_dict())
    assert not layer.merged and layer.weight is weight
    assert torch.equal(layer.weight, other.weight)


def test_a_merged_layer_has_the_state_of_an_unmerged_one():
    layer = layer_with()
    keys, count = list(layer.state_dict()), sum(p.numel() for p in layer.parameters())
    layer.merge()
    assert list(layer.state_dict()) == keys
    assert sum(p.numel() for p in layer.parameters()) == count
    layer.unmerge()
    assert list(layer.state_dict()) == keys and "_base_weight" in layer._buffers


def test_conv1d():
    torch.manual_seed(0)
    conv = Conv1D(10, 12)
    nn.init.normal_(conv.bias)
    x = torch.randn(3, 12)
    layer = LoRALinear.from_linear(conv)
    assert (layer.in_features, layer.out_features) == (12, 10)
    torch.testing.assert_close(layer(x), conv(x))
    assert layer.state_dict()["weight"].shape == (12, 10)
    nn.init.normal_(layer.lora_B["default"])
    y = layer(x)
    assert not torch.allclose(y, conv(x))
    layer.merge()
    torch.testing.assert_close(layer(x), y)


def test_same_as_peft_forward_and_backward():
    base = nn.Sequential(nn.Linear(12, 10))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(base), config)
    layer = LoRALinear.from_linear(base[0], r=4, lora_alpha=6)
    other = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].copy_(other.lora_A["default"].weight)
        layer.lora_B["default"].copy_(other.lora_B["default"].weight)
    x = torch.randn(5, 12, requires_grad=True)
    mine = torch.autograd.grad(
        layer(x).square().sum(), [x, layer.lora_A["default"], layer.lora_B["default"]]
    )
    expected = torch.autograd.grad(
        theirs(x).square().sum(),
        [x, other.lora_A["default"].weight, other.lora_B["default"].weight],
    )
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_attributes_and_hooks_come_along():
    linear = nn.Linear(12, 10).eval()
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(1))
    linear.note = "mine"
    layer = LoRALinear.from_linear(linear)
    layer(torch.randn(1, 12))
    assert seen and layer.note == "mine" and not layer.training
    layer.register_forward_hook(lambda *_: None)
    assert len(linear._forward_hooks) == 1 and not hasattr(linear, "lora_A")


def test_deepcopy_and_pickle():
    layer = layer_with(("default", "a"), dropout=0.1)
    layer.merge()
    x = torch.randn(2, 12)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        other.unmerge()
        assert torch.equal(other.weight, layer._base_weight)
        assert other.weight.data_ptr() != layer._base_weight.data_ptr()


def test_meta_device():
    layer = LoRALinear(12, 10, r=2, device="meta")
    y = layer(torch.empty(3, 12, device="meta"))
    assert y.shape == (3, 10) and y.is_meta
    real = layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.fill_(777.0)
    real.reset_parameters()
    x = torch.randn(3, 12)
    assert all(p.abs().max() < 2 for p in real.parameters())
    assert (real.lora_B["default"] == 0).all() and (real.lora_A["default"] != 0).any()
    assert torch.equal(real(x), F.linear(x, real.weight, real.bias))


def test_compiles_in_one_graph_and_trains():
    layer = layer_with(("default", "a"), dropout=0.0)
    layer.set_adapter(["default", "a"])
    x = torch.randn(3, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(x)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert layer.lora_A["a"].grad is not None


def test_threads_share_a_layer():
    layer = layer_with()
    x = torch.randn(16, 12)
    expected = layer(x)
    results = []
    threads = [threading.Thread(target=lambda: results.append(layer(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(r, expected) for r in results)


def test_repr_names_the_adapters():
    text = repr(layer_with(("default", "a")))
    assert "default: r=4, scaling=2" in text and "active=['default']" in text


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def quantised():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: nn.Embedding(3, 3),
            "must be an nn.Linear or a transformers Conv1D, got Embedding",
        ),
        (lambda: Twice(3, 3), "is a Twice, whose forward is not that of nn.Linear"),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, "belongs to nn.MultiheadAttention"),
        (lambda: LoRALinear(3, 3), "is a LoRALinear already"),
        (quantised, "torch.int8, not a dense float"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "forward|computes its"),
    ],
)
def test_what_cannot_become_a_lora_layer(make, message):
    with pytest.raises(TypeError, match=message):
        LoRALinear.from_linear(make())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be an int, got float"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha must be finite, got nan"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number"),
        ({"lora_dropout": 1.1}, ValueError, "lora_dropout must be between 0 and 1, got 1.1"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be.*got 'pissa'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, ValueError, "needs an even r, got 3"),
        ({"lora_alpha": 1e299}, ValueError, "lora_alpha must be finite, got 1e"),
        ({"init_lora_weights": 0}, ValueError, "init_lora_weights must be.*got 0"),
        ({"adapter_dtype": torch.bfloat16}, TypeError, "got torch.bfloat16"),
        (
            {"adapter_dtype": torch.int8},
            TypeError,
            r"must be the base's.*got torch.int8",
        ),
    ],
)
def test_wrong_hyperparameters_change_nothing(change, error, message):
    layer = layer_with()
    with pytest.raises(error, match=message):
        layer.add_adapter("other", **change)
    assert list(layer.r) == ["default"] and set(layer.lora_A) == {"default"}
    with pytest.raises(error, match=message):
        LoRALinear(4, 4, **change)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "update"])
def test_wrong_adapter_names(name):
    with pytest.raises(ValueError, match="adapter name must be"):
        layer_with().add_adapter(name)
    with pytest.raises(TypeError, match="adapter name must be a str, got int"):
        layer_with().add_adapter(3)


def test_unknown_and_repeated_adapters():
    layer = layer_with(("default", "foo"))
    for call in (layer.set_adapter, layer.delete_adapter, layer.delta_weight):
        with pytest.raises(ValueError, match=r"no adapter named 'foobar'.*'default', 'foo'"):
            call("foobar")
    with pytest.raises(ValueError, match="must differ"):
        layer.set_adapter(["foo", "foo"])
    with pytest.raises(ValueError, match="adapter 'foo' exists already"):
        layer.add_adapter("foo")
    assert layer.active_adapters == ("default",)
