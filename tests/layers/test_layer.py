# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear`: a drop-in for nn.Linear, its adapter, merging, state and life cycle."""

import copy
import itertools
import math
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from fastlora import LoRALinear


def layer_with(linear=None, dtype=torch.float32, **arguments):
    """A layer whose adapter is not the identity."""
    layer = LoRALinear.from_linear((linear or nn.Linear(12, 10)).to(dtype), **arguments)
    nn.init.normal_(layer.lora_B)
    return layer


def merged_layer(*arguments):
    layer = layer_with(*arguments)
    layer.merge()
    return layer


def base(layer, x):
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    return F.linear(x, weight, layer.bias)


def formula(layer, x):
    return base(layer, x) + layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)


def test_starts_as_its_base_and_trains_only_the_adapter():
    linear = nn.Linear(12, 10, dtype=torch.bfloat16)
    same = {"bias": True, "device": "cpu", "dtype": torch.bfloat16}
    layer = LoRALinear.from_linear(linear, 3, 6, **same, adapter_dtype=torch.bfloat16)
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    assert torch.equal(layer(x), linear(x))
    assert torch.equal(layer(input=x), linear(input=x))  # a drop-in has nn.Linear's keyword too
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.lora_B.grad.dtype == torch.bfloat16


def test_constructor_is_that_of_a_linear():
    layers = []
    for kind in (nn.Linear, LoRALinear):
        torch.manual_seed(1)
        layers.append(kind(12, 10, bias=False, dtype=torch.bfloat16))
    assert torch.equal(layers[0].weight, layers[1].weight) and layers[1].bias is None
    assert isinstance(layers[1], nn.Linear) and layers[1].lora_A.dtype == torch.float32  # as PEFT
    assert LoRALinear(4, 4, dtype=torch.float64).lora_A.dtype == torch.float64


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora):
    layer, x = layer_with(r=4, lora_alpha=6, use_rslora=rslora), torch.randn(3, 5, 12)
    assert layer.scaling == 6 / (math.sqrt(4) if rslora else 4)
    assert_close(layer(x), formula(layer, x))


@pytest.mark.parametrize("method", [True, "gaussian", False])
def test_initialisation_follows_peft(method):
    layer = LoRALinear(256, 128, r=8, init_lora_weights=method)
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=method)
    theirs = get_peft_model(nn.Sequential(nn.Linear(256, 128)), config).base_model.model[0]
    for mine, other in (layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B):
        drawn = other["default"].weight
        assert mine.shape == drawn.shape
        assert mine.std().item() == pytest.approx(drawn.std().item(), rel=0.15)
        assert mine.abs().max().item() == pytest.approx(drawn.abs().max().item(), rel=0.35)


def test_dropout_is_a_child_and_read_at_each_call():
    layer, x = layer_with(nn.Linear(12, 10).eval(), lora_dropout=0.5), torch.randn(64, 12)
    whole = formula(layer, x)
    assert type(layer.lora_dropout) is nn.Dropout and not layer.lora_dropout.training
    assert_close(layer(x), whole)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lora_dropout.p = 0.0  # as trl's disable_dropout_in_model
    assert_close(layer(x), whole)
    layer.eval().lora_dropout.train().p = 1.0  # Monte Carlo: the child alone drops
    assert_close(layer(x), base(layer, x))
    layer.lora_dropout = nn.Identity()
    assert_close(layer.train()(x), whole)
    layer.lora_dropout = nn.ReLU()
    with pytest.raises(TypeError, match=r"lora_dropout must be an nn\.Dropout, got ReLU"):
        layer(x)


@pytest.mark.parametrize("make", [nn.Linear, lambda k, n: Conv1D(n, k)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(make, dtype):
    """And merging writes into the weight's own memory, as others may hold it."""
    linear, x = make(12, 10).to(dtype), torch.randn(4, 12, dtype=dtype)
    flat = torch.randn(200, dtype=dtype)
    linear.weight = nn.Parameter(flat[:120].view_as(linear.weight))
    nn.init.normal_(linear.bias)
    layer, bits = layer_with(linear, dtype, lora_dropout=0.5).eval(), flat.clone()
    assert (layer.in_features, layer.out_features) == (12, 10)
    weight, unmerged = layer.weight, layer(x)
    assert not torch.allclose(unmerged, base(layer, x), atol=0.1)
    layer.merge()
    assert layer.merged and layer.weight is weight and not torch.equal(flat, bits)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    assert_close(layer.train()(x), unmerged, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer(x), base(layer, x))
    assert "r=8, scaling=1, merged\n" in repr(layer)
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()
    layer.eval().unmerge()
    layer.unmerge()
    assert layer.weight is weight and torch.equal(flat, bits) and not layer.merged
    assert torch.equal(layer(x), unmerged)


def test_two_layers_of_one_weight_do_not_merge_into_each_other():
    linear = nn.Linear(12, 10)
    bits = linear.weight.detach().clone()
    one, other = merged_layer(linear), layer_with(linear)
    copies = pickle.loads(pickle.dumps([one, other]))
    for second in (other, copies[1]):
        with pytest.raises(RuntimeError, match="shared with another layer that is merged"):
            second.merge()
        assert not second.merged
    one.unmerge()
    other.merge()
    other.unmerge()
    assert torch.equal(linear.weight, bits)


def test_layers_made_meanwhile_disturb_no_merge():
    """Here at each line that runs; another thread makes them at any time."""
    layer, other, made = layer_with(), LoRALinear(4, 4), [merged_layer()]

    def trace(*_):
        made.append(copy.copy(other))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        layer.merge()
    finally:
        sys.settrace(before)


COMPUTED = {
    "is computed": parametrizations.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "is on the meta device": lambda layer: layer.to("meta"),
}


@pytest.mark.parametrize("why", COMPUTED)
def test_a_weight_that_is_not_the_layer_s_own_is_not_merged(why):
    for layer, what in (layer_with(), "merge"), (merged_layer(), "unmerge"):
        COMPUTED[why](layer)
        before, x = copy.deepcopy(layer.state_dict()), torch.randn(3, 12)
        with pytest.raises(RuntimeError, match=f"cannot {what}: the weight .*{why}"):
            getattr(layer, what)()
        assert layer.merged == (what == "unmerge")
        assert before.keys() == layer.state_dict().keys()
        if "meta" not in why:
            assert_close(layer.state_dict(), before)
            assert layer.merged or torch.allclose(layer(x), formula(layer, x), atol=1e-5)


def test_sharded(one_process):
    """FSDP2: made on the meta device, given memory and drawn as shards; computes as it is."""
    with torch.device("meta"):
        layer = LoRALinear(12, 10, r=4, init_lora_weights=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    x, other = torch.randn(3, 12), LoRALinear(12, 10, r=4)
    other.load_state_dict({name: p.detach().full_tensor() for name, p in layer.named_parameters()})
    assert all(0.05 < p.abs().max() < 1 for p in other.parameters())
    for each in (layer, other):
        y = each(x)
        assert_close(y, formula(other, x))
        y.sum().backward()
    assert_close(layer.lora_B.grad.full_tensor(), other.lora_B.grad)
    layer.reshard()
    with pytest.raises(RuntimeError, match="is a DTensor, not a plain tensor"):
        layer.merge()


def test_safe_merge_refuses_infinities_and_changes_nothing():
    layer = layer_with(dtype=torch.float16)
    nn.init.constant_(layer.lora_B, 60000.0)
    bits = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="would put NaN or infinity"):
        layer.merge(safe=True)
    assert torch.equal(layer.weight, bits) and not layer.merged
    layer.merge()
    assert layer.weight.isinf().any()


def test_a_base_checkpoint_loads_unchanged():
    linear, layer = nn.Linear(12, 10), layer_with()
    before = layer.lora_B.clone()
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert torch.equal(layer.lora_B, before)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    half = {k: v for k, v in layer.state_dict().items() if k != "lora_B"}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B"):
        layer.load_state_dict(half)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(merged_layer(nn.Linear(12, 9)).state_dict())
    assert not layer.merged


KEPT = {"all": ("0.",), "the base": ("0.weight", "0.bias", "0.base"), "the adapter": ("0.lora",)}


@pytest.mark.filterwarnings("ignore:.*unmerged for loading")
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(
    ("saved", "into", "assign"), list(itertools.product([False, True], repeat=3))
)
def test_no_state_has_the_adapter_twice(saved, into, assign, kept):
    """Saved merged or not, loaded into a merged layer or another: what is in it, and once."""
    one, other = (nn.Sequential(layer_with(r=4)) for _ in range(2))
    expected = copy.deepcopy(other)
    for name, value in one.named_parameters():
        if name.startswith(KEPT[kept]):
            expected.get_parameter(name).data.copy_(value)
    x, own = torch.randn(3, 12), one[0].weight.detach().clone()
    for layer in [one[0]] * saved + [other[0]] * into:
        layer.merge()
    state = {k: v.clone() for k, v in one.state_dict().items() if k.startswith(KEPT[kept])}
    merged = saved and kept != "the adapter"
    assert ("0.base_weight" in state) == merged
    for _ in range(2):  # what is assigned may not be written to
        other.load_state_dict(state, strict=kept != "the adapter", assign=assign)
    assert other[0].merged == merged
    y = one(x) if merged else expected(x)  # merged by another adapter is what it was saved as
    assert_close(other(x), y, rtol=1e-4, atol=1e-4)
    other[0].unmerge()
    assert all(map(torch.equal, other.parameters(), expected.parameters()))
    assert kept == "the adapter" or torch.equal(other[0].weight, own)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("into", [False, True])
def test_a_state_of_tied_weights(into, first):
    """The plain layer of a merged weight comes before the merged one, or after."""

    def made(merge):
        layers = [nn.Linear(12, 12), layer_with(nn.Linear(12, 12))]
        layers[0].weight = layers[1].weight
        if merge:
            layers[1].merge()
        return nn.Sequential(*layers[:: 1 if first == 0 else -1]), layers[1]

    (model, layer), (other, another), x = made(True), made(into), torch.randn(3, 12)
    other.load_state_dict(model.state_dict())
    assert_close(other(x), model(x))
    layer.unmerge()
    another.unmerge()
    assert_close(other(x), model(x))


def test_states_of_some_layers_and_for_plain_ones():
    model, x = nn.Sequential(merged_layer(), merged_layer(nn.Linear(10, 5))), torch.randn(3, 12)
    plain = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 5))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(plain(x), model(x))
    with pytest.warns(UserWarning, match=r"^1\.is merged: unmerged for loading"):
        model.load_state_dict({"1.bias": torch.ones(5)}, strict=False)
    assert model[0].merged and not model[1].merged


CHANGES = {
    "double": nn.Module.double,
    "half": nn.Module.half,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("change", CHANGES)
def test_merged_layers_are_moved_cast_and_copied(change):
    layer = layer_with()
    bits = layer.weight.detach().clone()
    layer.merge()
    other = CHANGES[change](layer)
    x = torch.randn(3, 12).to(other.weight.dtype)
    assert torch.equal(other(x), base(other, x))
    other.unmerge()
    assert torch.equal(other.weight, bits.to(x.dtype)) and isinstance(other.weight, nn.Parameter)
    assert_close(other(x), formula(other, x), rtol=1e-2, atol=1e-2)
    assert other is layer or (layer.merged and other.weight.data_ptr() != layer.weight.data_ptr())


def test_attributes_and_hooks_come_along():
    linear, seen = nn.Linear(12, 10).eval(), []
    linear.register_forward_hook(lambda *_: seen.append(1))
    linear.note = "mine"
    layer = LoRALinear.from_linear(linear)
    layer(torch.randn(1, 12))
    assert seen and layer.note == "mine" and not layer.training
    layer.register_forward_hook(lambda *_: None)
    assert len(linear._forward_hooks) == 1 and not hasattr(linear, "lora_A")


def test_meta_device():
    layer, x = LoRALinear(12, 10, r=2, device="meta"), torch.randn(3, 12)
    assert layer(x.to("meta")).shape == (3, 10)
    real = copy.deepcopy(layer).to_empty(device="cpu")
    for parameter in real.parameters():
        nn.init.constant_(parameter, 777.0)
    real.merge()
    real.reset_parameters()
    assert all(p.abs().max() < 2 for p in real.parameters()) and not real.merged
    assert (real.lora_B == 0).all() and (real.lora_A != 0).any()
    layer.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(layer(x), real(x)) and not layer.weight.requires_grad


def test_compiles_in_one_graph_and_trains_under_autocast():
    layer, x = layer_with(lora_dropout=0.5), torch.randn(6, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.lora_A.grad.isfinite().all() and layer.lora_A.grad.any()
    assert_close(compiled.eval()(x), layer(x))
    layer.merge()
    assert_close(compiled(x), base(layer, x))


def after(change, *args):
    linear = nn.Linear(4, 4)
    change(linear, *args)
    return linear


INT8 = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
COMPUTES = "linear computes its weight or bias"
WRONG_TYPES = [
    (lambda: nn.Embedding(3, 3), {}, "linear must be an nn.Linear or a .* Conv1D, got Embedding"),
    (lambda: LoRALinear(3, 3), {}, "linear is a LoRALinear with a forward of its own"),
    (lambda: after(setattr, "forward", len), {}, "linear is a Linear with a forward of its own"),
    (lambda: nn.MultiheadAttention(4, 2).out_proj, {}, "linear belongs to nn.MultiheadAttention"),
    (lambda: after(setattr, "weight", INT8), {}, "torch.int8, not a dense float"),
    (lambda: after(nn.Module.compile), {}, "linear is compiled by itself"),
    (lambda: after(parametrizations.weight_norm), {}, rf"{COMPUTES} \(parametrized"),
    (lambda: after(prune.identity, "bias"), {}, f"{COMPUTES}.*, pruned"),
    (None, {"r": 2.0}, "r must be an int, 1 or more, got 2.0"),
    (None, {"r": True}, "r must be an int, 1 or more, got True"),
    (None, {"lora_alpha": "8"}, "lora_alpha must be finite, got '8'"),
    (None, {"adapter_dtype": torch.bfloat16}, "adapter_dtype must be .* got torch.bfloat16"),
]
WRONG_VALUES = [
    (None, {"bias": False}, "bias=False, but linear's, which is shared, is True"),
    (None, {"device": "meta"}, "device=meta, but linear's, .* is cpu"),
    (None, {"dtype": torch.half}, "dtype=torch.float16, but linear's, .* is torch.float32"),
    (None, {"r": 0}, "r must be an int, 1 or more, got 0"),
    (None, {"lora_alpha": math.nan}, "lora_alpha must be finite, got nan"),
    (None, {"lora_alpha": 1e299}, r"lora_alpha must be finite, got 1e\+299"),
    (None, {"lora_dropout": 1.1}, "lora_dropout must be between 0 and 1, got 1.1"),
    (None, {"lora_dropout": math.nan}, "lora_dropout must be between 0 and 1, got nan"),
    (None, {"init_lora_weights": "pissa"}, "init_lora_weights must be a bool .* got 'pissa'"),
    (None, {"init_lora_weights": 0}, "init_lora_weights must be a bool .* got 0"),
]
REFUSED = [(TypeError, *case) for case in WRONG_TYPES]
REFUSED += [(ValueError, *case) for case in WRONG_VALUES]


@pytest.mark.parametrize(("error", "make", "arguments", "message"), REFUSED)
def test_what_cannot_become_a_lora_layer(error, make, arguments, message):
    linear = nn.Linear(4, 4) if make is None else make()
    trains = [p.requires_grad for p in linear.parameters()]
    with pytest.raises(error, match=message):
        LoRALinear.from_linear(linear, **arguments)
    assert [p.requires_grad for p in linear.parameters()] == trains
