# SPDX-License-Identifier: Apache-2.0
"""Quantised bases under PEFT, fused: its outputs and gradients, and no dense weight kept."""

import copy
import pickle
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from results import X, apart, results
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import patch_peft, unpatch_peft
from fastlora.operator import weights
from fastlora.peft import linear

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
hqq = pytest.importorskip("hqq.core.quantize", reason="needs hqq")

BNB = ("nf4", "fp4", "int8")
TORCHAO = {
    "torchao int8": torchao.Int8WeightOnlyConfig(),
    "torchao float8": torchao.Float8WeightOnlyConfig(),
    "torchao int4": torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)),
}
LINEAR = (*BNB, *TORCHAO)  # an ``nn.Linear`` all the same
KINDS = (*LINEAR, "hqq")
NAMES = ("q", "k", "v", "gate", "up", "down")


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down, self.act = nn.Linear(128, 64, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.mlp = MLP()

    def forward(self, x):
        x = self.q(x) + torch.cat([self.k(x), self.v(x)], -1).tanh()
        return x + self.mlp(x)


def quantised(layer: nn.Linear, kind: str) -> nn.Module:
    shape = layer.in_features, layer.out_features, layer.bias is not None
    if kind == "hqq":
        how = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
        return hqq.HQQLinear(layer, how, compute_dtype=layer.weight.dtype, device="cpu")
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False)
    else:
        how = {"quant_type": kind, "compress_statistics": kind == "nf4"}
        how["quant_storage"] = torch.uint8 if kind == "nf4" else layer.weight.dtype  # as for FSDP
        made = bnb.nn.Linear4bit(*shape, compute_dtype=layer.weight.dtype, **how)
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=made, **how)
    made.bias = layer.bias
    return made.to("cpu")


def model(kind: str, dtype=torch.float32, seed: int = 0, **changes):
    torch.manual_seed(seed)
    block = Block().to(dtype)
    if kind in TORCHAO:
        torchao.quantize_(block, TORCHAO[kind])
    elif kind != "dense":
        for parent in (block, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, quantised(child, kind))
    if kind in BNB:
        block.is_loaded_in_8bit, block.is_loaded_in_4bit = kind == "int8", kind != "int8"
    config = {"target_modules": list(NAMES), "r": 4, "init_lora_weights": False, **changes}
    return get_peft_model(block, LoraConfig(**config))


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_in_float32(kind, fused, together):
    wrapped = model(kind)
    right = results(wrapped)
    assert patch_peft(wrapped).not_fused == [] and max(apart(results(wrapped), right)) < 1e-6
    assert len(fused) == len(NAMES)
    report = patch_peft(wrapped, fuse_siblings=[("q", "k", "v"), ("gate", "up")])
    assert [path.rpartition(".")[2] for path, _ in report.gated_mlps] == ["mlp"]
    assert max(apart(results(wrapped), right)) < 1e-6 and together == [3]
    unpatch_peft(wrapped)
    assert type(wrapped.base_model.model.q).__module__.startswith("peft.")
    assert all(map(torch.equal, results(wrapped), right))


@torch.no_grad()
def dense_of(base: nn.Module) -> torch.Tensor:
    """Return what the library multiplies by, as it is for bfloat16."""
    bias, base.bias = base.bias, None
    columns = base.train()(torch.eye(base.in_features, dtype=torch.bfloat16))
    base.bias = bias
    return columns.t().double()


@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_the_truth_than_peft(kind):
    """In bfloat16 under float32 adapters; the truth is of the weights that the library reads."""
    x, ours, theirs = X.bfloat16(), [], []
    for seed in range(6):  # one result alone scatters by a factor of two
        wrapped = model(kind, torch.bfloat16, seed).train()
        exact = model("dense", torch.float64, seed)
        for path, layer in wrapped.named_modules():
            if hasattr(layer, "base_layer"):
                of = exact.get_submodule(path).base_layer
                of.weight.data = dense_of(layer.base_layer)
                if of.bias is not None:
                    of.bias.data = layer.base_layer.bias.detach().double()
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                exact.get_parameter(name).data = p.data.double()
        right = results(exact, x.double())
        theirs.append(apart(results(wrapped, x), right))
        patch_peft(wrapped, fuse_siblings=[("q", "k", "v"), ("gate", "up")])
        ours.append(apart(results(wrapped, x), right))
    ours, theirs = (torch.tensor(each).square().mean(0).sqrt() for each in (ours, theirs))
    assert (ours < 1.7 * theirs).all() and ours.sum() < 1.1 * theirs.sum(), ours / theirs


@pytest.mark.parametrize(("kind", "tokens"), [("nf4", "few"), *((kind, "many") for kind in KINDS)])
def test_one_weight_is_dense_at_a_time_and_none_is_kept(kind, tokens, request, monkeypatch):
    if tokens == "few":
        request.getfixturevalue("few")
    alive, most, own = [], [], weights.Quantised.dense

    def dense(self):
        most.append(sum(ref() is not None for ref in alive))
        made = own(self)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(weights.Quantised, "dense", dense)
    wrapped = model(kind, torch.bfloat16, lora_dropout=0.1)
    patch_peft(wrapped, fuse_siblings=[("q", "k", "v"), ("gate", "up")])
    y = wrapped(X.bfloat16().requires_grad_())
    assert not any(ref() is not None for ref in alive) and len(alive) == len(NAMES)
    y.float().sum().backward()
    assert len(alive) == 2 * len(NAMES) and not any(most)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_elements(reentrant):
    """Where its first forward has no gradients as well."""
    found = []
    for again in (False, True):
        wrapped = model("nf4", torch.bfloat16, lora_dropout=0.5).train()
        patch_peft(wrapped)
        x = X.bfloat16().requires_grad_()
        torch.manual_seed(7)
        y = checkpoint(wrapped, x, use_reentrant=reentrant) if again else wrapped(x)
        y.float().sum().backward()
        found.append([y, x.grad, *(p.grad for p in wrapped.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", KINDS)
def test_inference_is_the_librarys(kind, fused):
    """It multiplies by fewer bits where nothing has to be differentiated."""
    wrapped = model(kind, torch.bfloat16).eval()
    with torch.no_grad():
        before = wrapped(X.bfloat16())
        patch_peft(wrapped)
        assert torch.equal(wrapped(X.bfloat16()), before) and not fused


@pytest.mark.parametrize("kind", BNB)
def test_a_model_is_copied_saved_and_merged_as_by_peft(kind, tmp_path):
    plain = model(kind, torch.bfloat16)
    wrapped = copy.deepcopy(plain)
    patch_peft(wrapped)
    right = results(wrapped, X.bfloat16())
    assert all(map(torch.equal, results(copy.deepcopy(wrapped), X.bfloat16()), right))
    found = pickle.loads(pickle.dumps(wrapped))  # its weights are plain parameters
    assert type(found.base_model.model.q) is type(wrapped.base_model.model.q)
    if kind != "int8":  # whose scales are gone
        assert all(map(torch.equal, results(found, X.bfloat16()), right))
    wrapped.add_adapter("other", LoraConfig(target_modules=["q"], r=2))
    assert patch_peft(wrapped).not_fused == []
    wrapped.delete_adapter("other")
    merged = [m.merge_and_unload().state_dict() for m in (plain, wrapped)]
    assert merged[0].keys() == merged[1].keys()
    for a, b in zip(*(m.values() for m in merged), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # of bytes that may be NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_under_autocast_outputs_have_peft_s_dtype(kind, dtype):
    wrapped = model(kind, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        before = wrapped.base_model.model.q(X.to(dtype))
        patch_peft(wrapped)
        after = wrapped.base_model.model.q(X.to(dtype))
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.05)


def _sharded(rank: int, store: str) -> None:
    """Run a process whose layers hold half of each weight, whose class is lost between."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    wrapped = model("nf4", torch.bfloat16)
    patch_peft(wrapped)
    x, right = X.bfloat16().requires_grad_(), results(wrapped, X.bfloat16())
    fully_shard(wrapped.base_model.model.q)
    fully_shard(wrapped)
    with mock.patch.object(linear, "lora_sum", wraps=linear.lora_sum) as fused:
        y = wrapped(x)
    (y.float() ** 2).mean().backward()
    assert fused.call_count == len(NAMES)
    assert torch.equal(y, right[0]) and torch.equal(x.grad, right[1])
    dist.destroy_process_group()


def test_shards_of_fsdp2(tmp_path):
    mp.spawn(_sharded, (str(tmp_path / "store"),), nprocs=2)


# Without PEFT


@pytest.mark.parametrize("kind", LINEAR)
def test_layers_without_peft(kind):
    wrapped = model(kind)
    right, adapters = results(wrapped), [p for p in wrapped.parameters() if p.requires_grad]
    block = wrapped.unload()
    before = block.state_dict()
    report = fastlora.replace_linears(block, list(NAMES), r=4, lora_alpha=8)
    assert len(report.fused) == len(NAMES)
    found = fastlora.lora_state_dict(block)
    for own, other in zip(found.values(), adapters, strict=True):
        own.copy_(other.detach())
    assert max(apart(results(block), right)) < 1e-6
    again, kept = copy.deepcopy(block), block.state_dict()
    assert kept.keys() == {*before, *found}  # as the library saves it, and the adapters
    again.load_state_dict(found, strict=False)
    assert all(map(torch.equal, results(again), results(block)))
    with torch.no_grad():  # its library rounds x, or scales
        torch.testing.assert_close(again.eval()(X), block(X), rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError, match=r"cannot merge: the weight is a .*, not a plain tensor"):
        block.q.merge()


# Traps


def test_the_search_for_siblings_packs_nothing():
    wrapped = model("nf4", torch.bfloat16)
    for module in wrapped.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True  # then it packs on any CPU
    assert patch_peft(wrapped, fuse_siblings=X.bfloat16()).siblings
    weight = wrapped.base_model.model.q.base_layer.weight
    assert not getattr(weight.quant_state, "packing_format_for_cpu", False)
    assert all(module.training for module in wrapped.modules())


def test_a_weight_that_was_packed_for_inference_has_gradients():
    """bitsandbytes packs it in place in a forward without gradients, for good."""
    wrapped = model("nf4", torch.bfloat16)
    patch_peft(wrapped)
    before = results(wrapped, X.bfloat16())
    if bnb.functional.has_avx512bf16():
        with torch.no_grad():
            y = wrapped.eval()(X.bfloat16())
        assert apart([before[0]], [y]) < [0.02]
    else:  # as that forward does
        for module in wrapped.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                packed = bnb.functional._convert_weight_packed_for_cpu
                w = module.weight
                w.data, w.quant_state = packed(w.data, w.quant_state)
    assert wrapped.base_model.model.q.base_layer.weight.quant_state.packing_format_for_cpu
    assert max(apart(results(wrapped.train(), X.bfloat16()), before)) < 0.03


def reason(wrapped) -> str:
    return dict(patch_peft(wrapped).not_fused)["base_model.model.q"]


def test_why_a_layer_is_not_fused():
    wrapped = model("int8")
    wrapped.base_model.model.q.base_layer.weight.SCB = None
    assert "its scales (SCB) are missing" in reason(wrapped)
    wrapped = model("nf4")
    base = wrapped.base_model.model.q.base_layer
    base.quant_state = base.weight.quant_state = None
    assert "its quant_state is missing" in reason(wrapped)
    block = Block()
    torchao.quantize_(block, torchao.Int8DynamicActivationInt8WeightConfig())
    wrapped = get_peft_model(block, LoraConfig(target_modules=["q", "k"]))
    assert "quantises x as well, which has no gradient" in reason(wrapped)


# The operator


@pytest.mark.parametrize("kind", LINEAR)
def test_the_operator_takes_quantised_weights(kind):
    layer = nn.Sequential(nn.Linear(64, 32, bias=False))
    if kind in BNB:
        w = quantised(layer[0], kind).weight
    else:
        torchao.quantize_(layer, TORCHAO[kind])
        w = layer[0].weight
    a, b = torch.randn(4, 64), torch.randn(32, 4).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        whole, x = weights.dense(weights.quantised(w, dtype)), X.to(dtype).requires_grad_()
        for impl in ("auto", "blocks", "library", "eager", "reference"):
            found = []
            for of in (w, whole):
                torch.manual_seed(1)
                given = {"dropout_p": 0.3, "training": dtype == torch.bfloat16, "impl": impl}
                y = fastlora.lora_linear(x, of, a, b, **given)
                found.append(torch.autograd.grad((y.float() ** 2).sum(), [x, b]))
            assert max(apart(*found)) < 1e-6
        assert torch.equal(F.linear(x, weights.quantised(w, dtype)), F.linear(x, whole))
    x = X
    with pytest.raises(TypeError, match="impl='triton' reads dense weights"):
        fastlora.lora_linear(x, w, a, b, impl="triton")
    with pytest.raises(ValueError, match=r"lora_A must be \[R, 64\]"):
        fastlora.lora_linear(x, w, a[:, :3], b)
