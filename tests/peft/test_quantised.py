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
from peft.tuners import lora
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers.integrations import finegrained_fp8

import fastlora
from fastlora import patch_peft, unpatch_peft
from fastlora.operator import plans, weights
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


# Layers that alone multiply by their weight


class Packed(nn.Module):
    """As gptqmodel's layers are, to which that class's name is given."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        for name in ("weight", "bias"):
            self.register_buffer(name, getattr(layer, name).detach())

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


Packed.__module__, Packed.__qualname__ = "gptqmodel.nn_modules.qlinear", "BaseQuantLinear"


def opaque(kind: str, dtype: torch.dtype, **changes) -> lora.LoraLayer:
    layer, config = nn.Linear(64, 48, dtype=dtype), LoraConfig(init_lora_weights=False, **changes)
    kinds = {"gptq": GPTQLoraLinear, "awq": AwqLoraLinear, "fp8": lora.Linear}
    if kind == "fp8":
        base = finegrained_fp8.FP8Linear(64, 48, (16, 32), has_bias=True)
        base.weight.data = layer.weight.detach().to(base.weight.dtype)
        base.weight_scale_inv.data = torch.rand(3, 2) + 0.5
        base.bias.data = layer.bias.detach()
    else:
        base = Packed(layer)
    base.requires_grad_(False)
    made = kinds[kind](base, "default", config, r=4, lora_alpha=8)
    made.lora_A.float(), made.lora_B.float()  # as `get_peft_model` does
    return made


@pytest.fixture
def fp8_products(monkeypatch):
    """Where FP8's kernel is not: x is rounded as it would round it."""

    def product(x, w, scales, size, bias, *rest):
        wide = finegrained_fp8._dequantize_fp8_weight(w, scales, size, x.dtype)
        return F.linear(x.to(w.dtype).to(x.dtype), wide, bias)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)


@pytest.mark.usefixtures("fp8_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "gptq", "awq"])
def test_the_rest_is_added_to_what_an_opaque_layer_makes(kind, dtype, fused):
    layer, x = opaque(kind, dtype), X.to(dtype)
    right, alone = results(layer, x), layer.base_layer(x)
    assert patch_peft(layer).not_fused == []
    found = results(layer, x)
    assert max(apart(found, right)) < (1e-6 if dtype == torch.float32 else 0.01) and len(fused) == 1
    with torch.no_grad():  # here it is fused too
        assert apart([layer(x)], right[:1]) < [0.01] and len(fused) == 2
    layer.enable_adapters(False)
    assert torch.equal(layer(x), alone)


@pytest.mark.usefixtures("fp8_products")
@pytest.mark.parametrize("impl", ["auto", "library"])
@pytest.mark.parametrize("several", [False, True])
def test_an_opaque_layer_keeps_no_dropped_input(impl, several, monkeypatch):
    """Its adapters' gradients are those of what was dropped: y is linear in B, and db its slope."""
    monkeypatch.setattr(plans, "FORCED", impl)
    layer, x = opaque("gptq", torch.float32, lora_dropout=0.5), X.clone().requires_grad_()
    if several:
        config = LoraConfig(init_lora_weights=False, lora_dropout=0.5)
        layer.update_layer("more", 3, 8, config)
        layer.set_adapter(["default", "more"])
    patch_peft(layer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    given = {x.data_ptr(), layer.base_layer.weight.data_ptr()}
    wide = [t for t in kept if t.numel() >= x.numel() and t.data_ptr() not in given]
    assert not wide and len(kept) > 3
    b = layer.lora_B["default"].weight
    torch.manual_seed(3)
    before = layer(x)
    (db,) = torch.autograd.grad(before.sum(), b)
    with torch.no_grad():
        b[0, 0] += 1.0
    torch.manual_seed(3)
    torch.testing.assert_close((layer(x) - before).sum(), db[0, 0], rtol=1e-3, atol=1e-2)


def test_an_opaque_layer_that_does_not_differentiate_is_left_to_peft():
    layer = opaque("gptq", torch.float32)
    layer.base_layer.SUPPORTS_TRAINING = False
    assert "multiplied by a kernel without gradients" in patch_peft(layer).not_fused[0][1]


def test_gradients_of_an_opaque_layer_are_differentiable():
    layer, x = opaque("awq", torch.float64), X.double()[:, :3].clone().requires_grad_()
    layer.double()
    patch_peft(layer)
    assert torch.autograd.gradgradcheck(layer, x)
    tangents = torch.func.jvp(layer, (x,), (x,))[1]
    torch.testing.assert_close(tangents, layer(x) - layer(torch.zeros_like(x)))
    y = torch.compile(layer, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))
