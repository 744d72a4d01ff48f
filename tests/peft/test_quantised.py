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
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import patch_peft, unpatch_peft
from fastlora.operator import weights
from fastlora.peft import linear

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")

BNB = ("nf4", "fp4", "int8")
KINDS = (*BNB, "torchao int8", "torchao float8")
NAMES = ("q", "k", "v", "gate", "up", "down")
X = torch.linspace(-1, 1, 2 * 24 * 64).reshape(2, 24, 64).sin()


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


def model(kind: str, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    block = Block().to(dtype)
    if kind in BNB:
        for parent in (block, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, quantised(child, kind))
        block.is_loaded_in_8bit, block.is_loaded_in_4bit = kind == "int8", kind != "int8"
    elif kind != "dense":
        how = "Int8WeightOnlyConfig" if kind == "torchao int8" else "Float8WeightOnlyConfig"
        torchao.quantize_(block, getattr(torchao, how)())
    config = {"target_modules": list(NAMES), "r": 4, "init_lora_weights": False, **changes}
    return get_peft_model(block, LoraConfig(**config))


def results(wrapped, x=X):
    """Return the output and the gradients of x and of all adapters."""
    x = x.detach().requires_grad_()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    y = wrapped(x)
    return [y, *torch.autograd.grad((y.float() ** 2).mean(), [x, *trained])]


def apart(found, right) -> list[float]:
    pairs = zip(found, right, strict=True)
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]


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
    wrapped, exact = model(kind, torch.bfloat16).train(), model("dense", torch.float64)
    for path, layer in wrapped.named_modules():
        if hasattr(layer, "base_layer"):
            of = exact.get_submodule(path).base_layer
            of.weight.data = dense_of(layer.base_layer)
    for name, p in wrapped.named_parameters():
        if "lora_" in name or "bias" in name:
            exact.get_parameter(name).data = p.data.double()
    x = X.bfloat16()
    right, theirs = (
        results(exact, x.double()),
        apart(results(wrapped, x), results(exact, x.double())),
    )
    patch_peft(wrapped, fuse_siblings=[("q", "k", "v"), ("gate", "up")])
    ours = apart(results(wrapped, x), right)
    assert all(a < 1.5 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert sum(ours) < 1.1 * sum(theirs)


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


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
def test_a_weight_that_was_packed_for_inference_has_gradients():
    """bitsandbytes packs it in place in a forward without gradients, for good."""
    wrapped = model("nf4", torch.bfloat16)
    patch_peft(wrapped)
    before = results(wrapped, X.bfloat16())
    with torch.no_grad():
        y = wrapped.eval()(X.bfloat16())
    assert wrapped.base_model.model.q.base_layer.weight.quant_state.packing_format_for_cpu
    found = results(wrapped.train(), X.bfloat16())
    assert max(apart(found, before)) < 0.03 and apart([found[0]], [y]) < [0.02]


def reason(wrapped) -> str:
    (why,) = {why for name, why in patch_peft(wrapped).not_fused if name.endswith(".q")}
    return why


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_takes_quantised_weights(kind):
    if kind in BNB:
        w = quantised(nn.Linear(64, 32, bias=False), kind).weight
    else:
        block = Block()
        torchao.quantize_(block, torchao.Int8WeightOnlyConfig())
        w = block.k.weight
    x, a, b = X.clone().requires_grad_(), torch.randn(4, 64), torch.randn(32, 4).requires_grad_()
    whole = weights.dense(weights.quantised(w, torch.float32))
    for impl in ("auto", "blocks", "library", "eager", "reference"):
        found, right = (
            torch.autograd.grad((fastlora.lora_linear(x, of, a, b, impl=impl) ** 2).sum(), [x, b])
            for of in (w, whole)
        )
        assert max(apart(found, right)) < 1e-6
    assert torch.equal(F.linear(X, weights.quantised(w, torch.float32)), F.linear(X, whole))
    with pytest.raises(TypeError, match="impl='triton' reads dense weights"):
        fastlora.lora_linear(x, w, a, b, impl="triton")
    with pytest.raises(ValueError, match=r"lora_A must be \[R, 64\]"):
        fastlora.lora_linear(x, w, a[:, :3], b)
